"""Align: features of the two modalities in one direction (Planamente et al., section 5.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod, compute_masked_mean

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


def alignment_loss(visual: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
    """Compute the mean of 1 - cos(f^v, f^a) over the segments that are heard, float32 []; 0 where none is.

    `visual` and `audio` are float [B, D], `heard` bool [B].
    """
    from torch.nn.functional import cosine_similarity

    return compute_masked_mean(1 - cosine_similarity(visual.float(), audio.float(), dim=-1), heard)


class AngularAlignment(AlignmentMethod):
    """The two streams with Align on the source and, where it is seen, on the target."""

    class Settings(SpecModel):
        """What Align weighs [?]."""

        weight: float = Field(default=1.0, ge=0)

    reads = ("align",)
    loss_names = ("class", "Align source", "Align target")

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute Align's terms."""
        terms = {"Align source": self.settings.weight * alignment_loss(*source)}
        if target is not None:
            terms["Align target"] = self.settings.weight * alignment_loss(*target)
        return terms
