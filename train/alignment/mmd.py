"""Brings the domains' features together, a modality at a time, by the maximum mean discrepancy (Long et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


def discrepancy_loss(
    source: Tensor, target: Tensor, source_counted: Tensor, target_counted: Tensor, gammas: Sequence[float]
) -> Tensor:
    """Compute the squared MMD of source [N, D] and target [M, D], float32 []; 0 where either has no row that counts.

    The biased estimate, which is never below 0: mean k(s, s') + mean k(t, t') - 2 mean k(s, t) over the rows that count
    (bool [N] and [M]), for k the sum of exp(-|x - y|^2 / gamma) over the gammas. Written here because no kept library
    has it with masks, and it is these lines.
    """
    of_source, of_target = _share(source_counted), _share(target_counted)
    found = of_source @ _compute_kernel(source, source, gammas) @ of_source
    found = found + of_target @ _compute_kernel(target, target, gammas) @ of_target
    found = found - 2 * (of_source @ _compute_kernel(source, target, gammas) @ of_target)
    return found * (source_counted.any() & target_counted.any())


def _share(counted: Tensor) -> Tensor:
    weights = counted.float()
    return weights / weights.sum().clamp(min=1)


def _compute_kernel(left: Tensor, right: Tensor, gammas: Sequence[float]) -> Tensor:
    """Compute the sum of kernels, float32 [N, M]."""
    left, right = left.float(), right.float()
    squares = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1)[None] - 2 * left @ right.T
    squares = squares.clamp(min=0)
    kernel = torch.zeros_like(squares)
    for gamma in gammas:
        kernel = kernel + torch.exp(squares * (-1 / gamma))
    return kernel


class MaximumMeanDiscrepancy(nn.Module):
    """The two streams with one MMD term a modality."""

    loss_names = ("class", "MMD visual", "MMD audio")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [3]."""
        source, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        of_visual = of_audio = torch.zeros_like(of_class)
        if target is not None:
            gammas = self.config.mmd.gammas
            all_source, all_target = torch.ones_like(source.heard), torch.ones_like(target.heard)
            of_visual = discrepancy_loss(source.visual, target.visual, all_source, all_target, gammas)
            of_audio = discrepancy_loss(source.audio, target.audio, source.heard, target.heard, gammas)
        weight = self.config.mmd.weight
        return torch.stack([self.config.class_weight * of_class, weight * of_visual, weight * of_audio])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
