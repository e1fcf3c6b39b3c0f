"""Pulls the mean feature norm of each modality to a given value: HNA (Planamente et al., section 5.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.masked_means import compute_mean_norm
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


def hard_norm_loss(visual: Tensor, audio: Tensor, heard: Tensor, norm: Tensor) -> Tensor:
    """Compute (mean |f^v| - R)^2 + (mean |f^a| - R)^2, float32 [].

    Means are over the batch: of `visual` [B, D], and of those rows of `audio` [B, D] that are heard, bool [B]; without
    any, the audio term is 0. `norm` is R, float [].
    """
    of_visual = compute_mean_norm(visual, torch.ones_like(heard))
    of_audio = torch.where(heard.any(), (compute_mean_norm(audio, heard) - norm).square(), 0.0)
    return (of_visual - norm).square() + of_audio


def find_middle_norm(visual: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
    """Find the norm half-way between those of the modalities, float32 [], without a gradient.

    Where nothing is heard it is the visual one's.
    """
    of_visual = compute_mean_norm(visual.detach(), torch.ones_like(heard))
    return torch.where(heard.any(), (of_visual + compute_mean_norm(audio.detach(), heard)) / 2, of_visual)


class HardNormAlignment(nn.Module):
    """The two streams with HNA on the source and, where it is seen, on the target.

    R is the configured norm, or half-way between the norms that the run's first source batch shows; it is a buffer, and
    stays as it is from then on.
    """

    loss_names = ("class", "HNA source", "HNA target")
    norm: Tensor

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)
        self.register_buffer("norm", torch.tensor(config.hna.norm))

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [3]."""
        features, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(features, step.source.labels, dropouts)
        if self.config.hna.norm == 0:
            self.norm.copy_(torch.where(step.progress == 0, find_middle_norm(*features), self.norm))
        # A copy, because what the backward pass keeps may not change in place.
        norm = self.norm.clone()
        of_source = hard_norm_loss(*features, norm)
        of_target = torch.zeros_like(of_source)
        if target is not None:
            of_target = hard_norm_loss(*target, norm)
        weight = self.config.hna.weight
        return torch.stack([self.config.class_weight * of_class, weight * of_source, weight * of_target])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
