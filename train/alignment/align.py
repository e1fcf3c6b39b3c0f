"""Turns the features of the two modalities to one direction: Align (Planamente et al., section 5.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.masked_means import compute_masked_mean
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


def alignment_loss(visual: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
    """Compute the mean of 1 - cos(f^v, f^a) over the segments that are heard, float32 []; 0 where none is.

    `visual` and `audio` are float [B, D], `heard` bool [B].
    """
    cosines = F.cosine_similarity(visual.float(), audio.float(), dim=-1)
    return compute_masked_mean(1 - cosines, heard)


class AngularAlignment(nn.Module):
    """The two streams with Align on the source and, where it is seen, on the target."""

    loss_names = ("class", "Align source", "Align target")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [3]."""
        features, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(features, step.source.labels, dropouts)
        of_source = alignment_loss(*features)
        of_target = torch.zeros_like(of_source)
        if target is not None:
            of_target = alignment_loss(*target)
        weight = self.config.align.weight
        return torch.stack([self.config.class_weight * of_class, weight * of_source, weight * of_target])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
