"""MMD: the domains' features brought together, a modality at a time (Long et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from echoshift.pipeline.specs import SpecModel
from echoshift.train.alignment.method import AlignmentMethod

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


def discrepancy_loss(
    source: Tensor, target: Tensor, source_counted: Tensor, target_counted: Tensor, gammas: Sequence[float]
) -> Tensor:
    """Compute the squared MMD of source [N, D] and target [M, D], float32 []; 0 where either has no row that counts.

    The biased estimate, which is never below 0: mean k(s, s') + mean k(t, t') - 2 mean k(s, t) over the rows that count
    (bool [N] and [M]), for k the sum of exp(-|x - y|^2 / gamma) over the gammas. Written here because no kept library
    has it with masks, and it is these lines.
    """
    of_source, of_target = _share(source_counted), _share(target_counted)
    found = of_source @ _compute_kernel(source, source, gammas) @ of_source
    found = found + of_target @ _compute_kernel(target, target, gammas) @ of_target
    found = found - 2 * (of_source @ _compute_kernel(source, target, gammas) @ of_target)
    return found * (source_counted.any() & target_counted.any())


def _share(counted: Tensor) -> Tensor:
    weights = counted.float()
    return weights / weights.sum().clamp(min=1)


def _compute_kernel(left: Tensor, right: Tensor, gammas: Sequence[float]) -> Tensor:
    """Compute the sum of kernels, float32 [N, M]."""
    import torch

    left, right = left.float(), right.float()
    squares = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1)[None] - 2 * left @ right.T
    squares = squares.clamp(min=0)
    kernel = torch.zeros_like(squares)
    for gamma in gammas:
        kernel = kernel + torch.exp(squares * (-1 / gamma))
    return kernel


class MaximumMeanDiscrepancy(AlignmentMethod):
    """The two streams with one MMD term a modality."""

    class Settings(SpecModel):
        """What MMD weighs, and its kernels exp(-d^2 / gamma), gamma = `gamma` * 2^k for k from `k_first` to `k_last`.

        In [M] the gammas divide; its k are -8, -8 + sqrt(2), ... below 8, ours every whole one (METHODS 7).
        """

        weight: float = Field(default=0.2, ge=0)
        gamma: float = Field(default=9.7, gt=0)
        k_first: int = -8
        k_last: int = 8

        @model_validator(mode="after")
        def _check_order(self) -> MaximumMeanDiscrepancy.Settings:
            if self.k_first > self.k_last:
                raise ValueError("`k_first` is above `k_last`")
            return self

        @property
        def gammas(self) -> tuple[float, ...]:
            """The kernels' gammas."""
            return tuple(self.gamma * 2.0**k for k in range(self.k_first, self.k_last + 1))

    reads = ("mmd",)
    adapts = True
    modalities = ("both", "visual", "audio")
    loss_names = ("class", "MMD visual", "MMD audio")

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute the discrepancies."""
        import torch

        if target is None:
            return {}
        gammas, weight = self.settings.gammas, self.settings.weight
        everything = torch.ones_like(source.heard), torch.ones_like(target.heard)
        of_visual = discrepancy_loss(source.visual, target.visual, *everything, gammas)
        of_audio = discrepancy_loss(source.audio, target.audio, source.heard, target.heard, gammas)
        return {"MMD visual": weight * of_visual, "MMD audio": weight * of_audio}
