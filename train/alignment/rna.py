"""Aligns the mean feature norms of the two modalities: RNA (Planamente et al., Eq. 3 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.masked_means import compute_mean_norm
from echoshift.train.alignment.two_streams import StreamFeatures, StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


def relative_norm_loss(visual: Tensor, audio: Tensor, heard: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute (mean |f^v| / mean |f^a| - 1)^2, float32 [].

    Means are over the batch: of `visual` [B, D] over the rows that count (bool [B]; all by default), of `audio` [B, D]
    over those of them that are heard, bool [B]. 0 where no row that counts is heard, or no audio feature isn't zero.
    """
    counted = torch.ones_like(heard) if counted is None else counted
    of_visual, of_audio = compute_mean_norm(visual, counted), compute_mean_norm(audio, counted & heard)
    exists = of_audio > 0
    ratio = of_visual / torch.where(exists, of_audio, 1.0)
    return torch.where(exists, (ratio - 1).square(), 0.0)


def relative_norm_loss_by_source(features: StreamFeatures, domains: Tensor, n_sources: int) -> Tensor:
    """Compute the sum of one RNA term a source domain, float32 []; `domains` int64 [B] of 0 .. n_sources - 1."""
    visual, audio, heard = features
    terms = [relative_norm_loss(visual, audio, heard, domains == source) for source in range(n_sources)]
    return torch.stack(terms).sum()


class RelativeNormAlignment(nn.Module):
    """The two streams with RNA on the source, one term a source domain, and, where it is seen, on the target."""

    loss_names = ("class", "RNA source", "RNA target")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [3]."""
        features, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(features, step.source.labels, dropouts)
        of_source = relative_norm_loss_by_source(features, step.source.domains, self.streams.n_sources)
        of_target = torch.zeros_like(of_source)
        if target is not None:
            of_target = relative_norm_loss(*target)
        weight = self.config.rna.weight
        return torch.stack([self.config.class_weight * of_class, weight * of_source, weight * of_target])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
