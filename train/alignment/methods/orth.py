"""Orth: features of the two modalities in orthogonal directions (Planamente et al., section 5.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod, compute_masked_mean

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


def orthogonality_loss(visual: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
    """Compute the mean of cos(f^v, f^a)^2 over the segments that are heard, float32 []; 0 where none is.

    `visual` and `audio` are float [B, D], `heard` bool [B].
    """
    from torch.nn.functional import cosine_similarity

    return compute_masked_mean(cosine_similarity(visual.float(), audio.float(), dim=-1).square(), heard)


class Orthogonality(AlignmentMethod):
    """The two streams with Orth on the source and, where it is seen, on the target."""

    class Settings(SpecModel):
        """What Orth weighs [?]."""

        weight: float = Field(default=1.0, ge=0)

    reads = ("orth",)
    loss_names = ("class", "Orth source", "Orth target")

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute Orth's terms."""
        terms = {"Orth source": self.settings.weight * orthogonality_loss(*source)}
        if target is not None:
            terms["Orth target"] = self.settings.weight * orthogonality_loss(*target)
        return terms
