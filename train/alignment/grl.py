"""Makes the domains' features hard to tell apart: GRL (Ganin and Lempitsky 2015; Munro and Damen 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.masked_means import compute_masked_mean
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs

_SOURCE, _TARGET = 0, 1


def build_discriminator(width: int, n_hidden: int) -> nn.Sequential:
    """Build what tells domains apart, [B, width] -> [B, 2]."""
    return nn.Sequential(nn.Linear(width, n_hidden), nn.ReLU(), nn.Linear(n_hidden, 2))


def compute_reversal(progress: Tensor, peak: float) -> Tensor:
    """Compute the factor of reversed gradients, (2 / (1 + exp(-10 p)) - 1) * peak, for the share p of steps done."""
    return (2 / (1 + torch.exp(-10 * progress)) - 1) * peak


def reverse_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return the values as they are, but for rounding; their gradient is -factor times what comes back.

    Two terms instead of a function of autograd, which needs rules of its own under vmap.
    """
    return (1 + factor) * values.detach() - factor * values


def adversarial_loss(
    discriminator: nn.Module,
    source: Tensor,
    target: Tensor,
    source_counted: Tensor,
    target_counted: Tensor,
    factor: Tensor,
) -> Tensor:
    """Compute the discriminator's cross-entropy, float32 [], whose gradient reaches the features reversed.

    The mean over the rows that count (bool [N] and [M]) of source [N, D] and target [M, D] together.
    """
    logits = discriminator(reverse_gradient(torch.cat([source, target]), factor)).float()
    of_source, of_target = torch.full_like(source_counted, _SOURCE), torch.full_like(target_counted, _TARGET)
    each = F.cross_entropy(logits, torch.cat([of_source, of_target]).long(), reduction="none")
    return compute_masked_mean(each, torch.cat([source_counted, target_counted]))


class GradientReversal(nn.Module):
    """The two streams with a discriminator a modality; silent segments don't count for that of sound."""

    loss_names = ("class", "domain visual", "domain audio")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)
        self.tell_visual = build_discriminator(config.network.width, config.grl.n_hidden)
        self.tell_audio = build_discriminator(config.network.width, config.grl.n_hidden)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [3]."""
        source, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        of_visual = of_audio = torch.zeros_like(of_class)
        if target is not None:
            factor = compute_reversal(step.progress, self.config.grl.peak)
            everything = torch.ones_like(source.heard), torch.ones_like(target.heard)
            of_visual = adversarial_loss(self.tell_visual, source.visual, target.visual, *everything, factor)
            of_audio = adversarial_loss(self.tell_audio, source.audio, target.audio, source.heard, target.heard, factor)
        weight = self.config.grl.weight
        return torch.stack([self.config.class_weight * of_class, weight * of_visual, weight * of_audio])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
