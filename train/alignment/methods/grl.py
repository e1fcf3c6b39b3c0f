"""GRL: domains made hard to tell apart by reversed gradients (Ganin and Lempitsky 2015; Munro and Damen 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod, compute_masked_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs

_SOURCE, _TARGET = 0, 1


def build_discriminator(width: int, n_hidden: int) -> nn.Sequential:
    """Build what tells domains apart, [B, width] -> [B, 2]."""
    from torch import nn

    return nn.Sequential(nn.Linear(width, n_hidden), nn.ReLU(), nn.Linear(n_hidden, 2))


def compute_reversal(progress: Tensor, peak: float) -> Tensor:
    """Compute the factor of reversed gradients, (2 / (1 + exp(-10 p)) - 1) * peak, for the share p of steps done."""
    return (2 / (1 + (-10 * progress).exp()) - 1) * peak


def reverse_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return the values as they are, but for rounding; their gradient is -factor times what comes back."""
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
    import torch
    from torch.nn.functional import cross_entropy

    logits = discriminator(reverse_gradient(torch.cat([source, target]), factor)).float()
    of_source, of_target = torch.full_like(source_counted, _SOURCE), torch.full_like(target_counted, _TARGET)
    each = cross_entropy(logits, torch.cat([of_source, of_target]).long(), reduction="none")
    return compute_masked_mean(each, torch.cat([source_counted, target_counted]))


class GradientReversal(AlignmentMethod):
    """The two streams with a discriminator a modality; silent segments don't count for that of audio."""

    class Settings(SpecModel):
        """How domains are told apart and gradients reversed: discriminators D -> n_hidden -> 2, one a modality.

        The reversed gradient is (2 / (1 + exp(-10 p)) - 1) * `peak` times the discriminator's, p the share of steps
        done.
        """

        weight: float = Field(default=1.0, ge=0)
        peak: float = Field(default=0.2, ge=0)
        n_hidden: int = Field(default=100, gt=0)

    reads: ClassVar[tuple[str, ...]] = ("grl",)
    adapts = True
    modalities: ClassVar[tuple[str, ...]] = ("both", "visual", "audio")
    loss_names: ClassVar[tuple[str, ...]] = ("class", "domain visual", "domain audio")
    told_apart: ClassVar[tuple[str, ...]] = ("visual", "audio")  # the modalities that have a discriminator

    def add_heads(self) -> None:
        """Add the discriminators."""
        for modality in self.told_apart:
            head = build_discriminator(self.config.network.width, self.config.grl.n_hidden)
            self.add_module(f"tell_{modality}", head)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute the adversarial terms."""
        import torch

        if target is None:
            return {}
        factor = compute_reversal(step.progress, self.config.grl.peak)
        counted = {
            "visual": (torch.ones_like(source.heard), torch.ones_like(target.heard)),
            "audio": (source.heard, target.heard),
        }
        terms = {}
        for modality in self.told_apart:
            head, features = (
                self.get_submodule(f"tell_{modality}"),
                (getattr(source, modality), getattr(target, modality)),
            )
            loss = adversarial_loss(head, *features, *counted[modality], factor)
            terms[f"domain {modality}"] = self.config.grl.weight * loss
        return terms
