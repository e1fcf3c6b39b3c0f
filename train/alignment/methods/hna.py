"""HNA: the mean feature norm of each modality pulled to a given value (Planamente et al., section 5.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod, compute_mean_norm

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


def hard_norm_loss(visual: Tensor, audio: Tensor, heard: Tensor, norm: Tensor) -> Tensor:
    """Compute (mean |f^v| - R)^2 + (mean |f^a| - R)^2, float32 [].

    Means are over the batch: of `visual` [B, D], and of those rows of `audio` [B, D] that are heard, bool [B]; without
    any, the audio term is 0. `norm` is R, float [].
    """
    import torch

    of_visual = compute_mean_norm(visual, torch.ones_like(heard))
    of_audio = torch.where(heard.any(), (compute_mean_norm(audio, heard) - norm).square(), 0.0)
    return (of_visual - norm).square() + of_audio


def find_middle_norm(visual: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
    """Find the norm half-way between those of the modalities, float32 [], without a gradient.

    Where nothing is heard it is the visual one's.
    """
    import torch

    of_visual = compute_mean_norm(visual.detach(), torch.ones_like(heard))
    return torch.where(heard.any(), (of_visual + compute_mean_norm(audio.detach(), heard)) / 2, of_visual)


class HardNormAlignment(AlignmentMethod):
    """The two streams with HNA on the source and, where it is seen, on the target.

    R is the configured norm, or half-way between the norms that the run's first source batch shows; it is a buffer, and
    stays as it is from then on.
    """

    class Settings(SpecModel):
        """What HNA weighs [?], and the norm R: 0 is half-way between those that the first batch shows.

        With SGD of lr 0.01 and momentum 0.9, a weight of 1 diverges for features of a norm above 14.
        """

        weight: float = Field(default=0.01, ge=0)
        norm: float = Field(default=0.0, ge=0)

    reads = ("hna",)
    loss_names = ("class", "HNA source", "HNA target")
    norm: Tensor

    def add_heads(self) -> None:
        """Add the norm R."""
        import torch

        self.register_buffer("norm", torch.tensor(self.settings.norm))

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute HNA's terms; the first step's finds R."""
        import torch

        if self.settings.norm == 0:
            self.norm.copy_(torch.where(step.progress == 0, find_middle_norm(*source), self.norm))
        # A copy, because what the backward pass keeps may not change in place.
        norm = self.norm.clone()
        terms = {"HNA source": self.settings.weight * hard_norm_loss(*source, norm)}
        if target is not None:
            terms["HNA target"] = self.settings.weight * hard_norm_loss(*target, norm)
        return terms
