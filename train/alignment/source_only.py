"""Trains on the labelled source alone: source only, DeepAll (several sources), BatchNorm (if the network has it)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


class SourceOnly(nn.Module):
    """The two streams with the source's cross-entropy (Planamente et al., section 5)."""

    loss_names = ("class",)

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the cross-entropy, float32 [1]; a target isn't looked at."""
        features = self.streams.encode(step.source.inputs, "source")
        of_class = self.streams.compute_class_loss(features, step.source.labels, dropouts)
        return torch.stack([self.config.class_weight * of_class])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
