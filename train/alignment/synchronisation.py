"""Asks whether pictures and sound belong together: the self-supervised task SS (Munro and Damen, CVPR 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.masked_means import compute_masked_mean
from echoshift.train.alignment.two_streams import StreamFeatures, StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs

_TOGETHER, _APART = 1, 0


def build_synchronisation_head(width: int, n_hidden: int) -> nn.Sequential:
    """Build what judges a pair, [B, 2 * width] -> [B, 2]."""
    return nn.Sequential(nn.Linear(2 * width, n_hidden), nn.ReLU(), nn.Linear(n_hidden, 2))


def find_strangers(sound: Tensor, heard: Tensor) -> Tensor:
    """Find the segments to which the sound before them in the batch is foreign, bool [B].

    The pair that doesn't belong together is a segment's pictures and the sound of the segment before it, the first's
    that of the last: never its own, unless the batch has the segment twice, or it has one segment alone. A batch that
    joins two shuffles of a small target may; so a pair counts only where the sounds that went in, `sound` [B, ...],
    differ, and the other one is heard (bool [B]).
    """
    other = sound.roll(1, dims=0)
    return (other != sound).flatten(1).any(dim=1) & heard.roll(1, dims=0)


def synchronisation_loss(
    head: nn.Module, visual: Tensor, audio: Tensor, heard: Tensor, are_strangers: Tensor
) -> Tensor:
    """Compute the cross-entropy of judging pairs, float32 []; 0 without any pair.

    Each segment's features, `visual` and `audio` [B, D], are a pair that belongs together where it is heard (bool [B]),
    and its pictures with the sound before it are one that doesn't, where `are_strangers` (bool [B], `find_strangers`).
    """
    together = head(torch.cat([visual, audio], dim=-1))
    apart = head(torch.cat([visual, audio.roll(1, dims=0)], dim=-1))
    labels = torch.cat([torch.full_like(heard, _TOGETHER), torch.full_like(heard, _APART)]).long()
    each = F.cross_entropy(torch.cat([together, apart]).float(), labels, reduction="none")
    return compute_masked_mean(each, torch.cat([heard, are_strangers]))


class Synchronisation(nn.Module):
    """The two streams with SS on the source and, where it is seen, on the target."""

    loss_names = ("class", "SS source", "SS target")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)
        self.synchronised = build_synchronisation_head(config.network.width, config.synchronisation.n_hidden)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [3]."""
        features, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(features, step.source.labels, dropouts)
        of_source = self._judge(features, step.source.inputs)
        of_target = torch.zeros_like(of_source)
        if step.target is not None and target is not None:
            of_target = self._judge(target, step.target.inputs)
        weight = self.config.synchronisation.weight
        return torch.stack([self.config.class_weight * of_class, weight * of_source, weight * of_target])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)

    def _judge(self, features: StreamFeatures, inputs: FeatureBatch) -> Tensor:
        return synchronisation_loss(self.synchronised, *features, find_strangers(inputs.audio, inputs.has_audio))
