"""SS: whether frames and audio belong together, a self-supervised task (Munro and Damen, CVPR 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod, compute_masked_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs

_TOGETHER, _APART = 1, 0


def build_synchronisation_head(width: int, n_hidden: int) -> nn.Sequential:
    """Build what judges a pair, [B, 2 * width] -> [B, 2]."""
    from torch import nn

    return nn.Sequential(nn.Linear(2 * width, n_hidden), nn.ReLU(), nn.Linear(n_hidden, 2))


def find_strangers(sound: Tensor, heard: Tensor) -> Tensor:
    """Find the segments to which the sound before them in the batch is foreign, bool [B].

    The pair that doesn't belong together is a segment's frames and the sound of the segment before it, the first's
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
    and its frames with the sound before it are one that doesn't, where `are_strangers` (bool [B], `find_strangers`).
    """
    import torch
    from torch.nn.functional import cross_entropy

    together = head(torch.cat([visual, audio], dim=-1))
    apart = head(torch.cat([visual, audio.roll(1, dims=0)], dim=-1))
    labels = torch.cat([torch.full_like(heard, _TOGETHER), torch.full_like(heard, _APART)]).long()
    each = cross_entropy(torch.cat([together, apart]).float(), labels, reduction="none")
    return compute_masked_mean(each, torch.cat([heard, are_strangers]))


class Synchronisation(AlignmentMethod):
    """The two streams with SS on the source and, where it is seen, on the target."""

    class Settings(SpecModel):
        """What SS weighs and how wide its head's hidden layer is; 5 to 1 of cross-entropy are those of [M]."""

        weight: float = Field(default=5.0, ge=0)
        n_hidden: int = Field(default=100, gt=0)

    reads: ClassVar[tuple[str, ...]] = ("synchronisation",)
    loss_names: ClassVar[tuple[str, ...]] = ("class", "SS source", "SS target")

    def add_heads(self: AlignmentMethod) -> None:
        """Add what judges pairs."""
        n_hidden = self.config.synchronisation.n_hidden
        self.synchronised = build_synchronisation_head(self.config.network.width, n_hidden)

    def compute_terms(
        self: AlignmentMethod, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute SS's terms."""
        parts = [("SS source", source, step.source.inputs)]
        if target is not None and step.target is not None:
            parts.append(("SS target", target, step.target.inputs))
        terms = {}
        for name, features, inputs in parts:
            strangers = find_strangers(inputs.audio, inputs.has_audio)
            loss = synchronisation_loss(self.get_submodule("synchronised"), *features, strangers)
            terms[name] = self.config.synchronisation.weight * loss
        return terms
