"""RNA: the mean feature norms of the two modalities made alike (Planamente et al., Eq. 3 to 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod, compute_mean_norm

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


def relative_norm_loss(visual: Tensor, audio: Tensor, heard: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute (mean |f^v| / mean |f^a| - 1)^2, float32 [].

    Means are over the batch: of `visual` [B, D] over the rows that count (bool [B]; all by default), of `audio` [B, D]
    over those of them that are heard, bool [B]. 0 where no row that counts is heard, or no audio feature isn't zero.
    """
    import torch

    counted = torch.ones_like(heard) if counted is None else counted
    of_visual, of_audio = compute_mean_norm(visual, counted), compute_mean_norm(audio, counted & heard)
    exists = of_audio > 0
    ratio = of_visual / torch.where(exists, of_audio, 1.0)
    return torch.where(exists, (ratio - 1).square(), 0.0)


def relative_norm_loss_by_source(features: StreamFeatures, domains: Tensor, n_sources: int) -> Tensor:
    """Compute the sum of one RNA term a source domain, float32 []; `domains` int64 [B] of 0 .. n_sources - 1."""
    import torch

    visual, audio, heard = features
    terms = [relative_norm_loss(visual, audio, heard, domains == source) for source in range(n_sources)]
    return torch.stack(terms).sum()


class RelativeNormAlignment(AlignmentMethod):
    """The two streams with RNA on the source, one term a source domain, and, where it is seen, on the target."""

    class Settings(SpecModel):
        """What RNA weighs; not in the paper, 1 in the family's later code (METHODS 7)."""

        weight: float = Field(default=1.0, ge=0)

    reads: ClassVar[tuple[str, ...]] = ("rna",)
    loss_names: ClassVar[tuple[str, ...]] = ("class", "RNA source", "RNA target")

    def compute_terms(
        self: AlignmentMethod, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute RNA's terms."""
        weight, n_sources = self.config.rna.weight, self.streams.n_sources
        terms = {"RNA source": weight * relative_norm_loss_by_source(source, step.source.domains, n_sources)}
        if target is not None:
            terms["RNA target"] = weight * relative_norm_loss(*target)
        return terms
