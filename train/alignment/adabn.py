"""Normalises the target by its own statistics: AdaBN (Li et al., Pattern Recognition 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


class AdaptiveBatchNorm(nn.Module):
    """The two streams with BatchNorm whose running statistics are kept a domain.

    The source alone trains the weights. Each step also sends the target's batch through the projections, in training
    mode and without a gradient, so that the target's statistics follow the weights as they are; a target segment is
    predicted with those. With weights that stand still, they come to the mean and variance of the target's features.
    """

    loss_names = ("class",)

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes, per_domain_statistics=True)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the cross-entropy, float32 [1], and moves both domains' statistics."""
        features = self.streams.encode(step.source.inputs, "source")
        of_class = self.streams.compute_class_loss(features, step.source.labels, dropouts)
        if step.target is not None:
            with torch.no_grad():
                self.streams.encode(step.target.inputs, "target")
        return torch.stack([self.config.class_weight * of_class])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K], with the statistics of the domain."""
        return self.streams.predict(inputs, domain)
