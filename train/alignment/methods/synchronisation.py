"""SS: whether frames and audio belong together, a self-supervised task (Munro and Damen, CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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

    reads = ("synchronisation",)
    loss_names = ("class", "SS source", "SS target")

    def add_heads(self) -> None:
        """Add what judges pairs."""
        self.synchronised = build_synchronisation_head(self.config.network.width, self.settings.n_hidden)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> Mapping[str, Tensor]:
        """Compute SS's terms."""
        return compute_synchronisation_terms(self, step, source, target)


def compute_synchronisation_terms(
    method: AlignmentMethod, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
) -> dict[str, Tensor]:
    """Compute the weighted terms `SS source` and, where there is a target, `SS target`, of the head `synchronised`."""
    parts = [("SS source", source, step.source.inputs)]
    if target is not None and step.target is not None:
        parts.append(("SS target", target, step.target.inputs))
    weight, head = method.config.synchronisation.weight, method.get_submodule("synchronised")
    terms = {}
    for name, features, inputs in parts:
        strangers = find_strangers(inputs.audio, inputs.has_audio)
        terms[name] = weight * synchronisation_loss(head, *features, strangers)
    return terms
