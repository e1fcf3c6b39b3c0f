"""The batches of cached features that methods see, and what a method is; a target's has no label field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Domain = Literal["source", "target"]


class FeatureBatch(NamedTuple):
    """The cached features of B segments; a named tuple, so that torch.func can map over it.

    Attributes:
        visual: by output name: `pooled` float32 [B, n_clips, C]; tokens [B, n_clips, n_tokens, C].
        audio: one feature a segment, float32 [B, C_a]; zeros where there is no sound.
        has_audio: bool [B].
    """

    visual: Mapping[str, Tensor]
    audio: Tensor
    has_audio: Tensor


class SourceFeatures(NamedTuple):
    """A labelled batch.

    Attributes:
        inputs: of B segments.
        labels: class indices int64 [B], or, multi-label, float32 [B, K] of 0 and 1.
        domains: which of the shift's source domains each segment is of, int64 [B].
    """

    inputs: FeatureBatch
    labels: Tensor
    domains: Tensor


class TargetFeatures(NamedTuple):
    """An unlabelled batch of the target.

    `pseudo_labels` are what an earlier network takes the segments for: class indices int64 [B], -1 where it says
    nothing; multi-label, float32 [B, K] of 0 and 1, a row of NaN where it says nothing.
    """

    inputs: FeatureBatch
    pseudo_labels: Tensor


class LabelledTargetFeatures(NamedTuple):
    """A batch of the target's labelled part (semi-supervised CharadesEgo)."""

    inputs: FeatureBatch
    labels: Tensor


class StepInputs(NamedTuple):
    """What one step of training sees; a part that a run has no segments of is None, never an empty batch."""

    source: SourceFeatures
    target: TargetFeatures | None
    labelled: LabelledTargetFeatures | None
    progress: Tensor  # share of the steps that are done, float32 [], 0 at the first; for ramps


class Dropouts:
    """The dropout masks of one step, so that a run sees the same ones alone and in a stack of runs.

    A method asks for them in the same order in every step; each call takes the next numbers of `draws`, which are
    uniform in 0..1, float32 [n]. With draws None nothing is dropped; what was asked for is counted in `n_taken` either
    way, so that a first pass says how many numbers a step needs.
    """

    def __init__(self, draws: Tensor | None = None) -> None:
        self._draws = draws
        self.n_taken = 0

    def drop(self, values: Tensor, p: float) -> Tensor:
        """Drop each value with probability p and scales the rest by 1 / (1 - p)."""
        if p == 0:
            return values
        keep = self.draw_keep(values.shape, p)
        return values if keep is None else values * (keep * (1 / (1 - p)))

    def draw_keep(self, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Return what is kept, float of 0 and 1 of this shape, each 0 with probability p; None: keep all."""
        n = 1
        for size in shape:
            n *= size
        start, self.n_taken = self.n_taken, self.n_taken + n
        if self._draws is None:
            return None
        return (self._draws[start : start + n] >= p).to(self._draws.dtype).view(shape)


class Method(Protocol):
    """What is trained: an nn.Module with these two, each pure but for BatchNorm's running statistics.

    A method holds no state of the loop. It is built on the CPU with weights that its seed decides. Neither of the two
    may look at values (no `if` on a tensor, no `.item()`, no boolean indexing), so that runs stack under
    torch.func.vmap and steps can be captured in CUDA graphs; masked means take the place of selections.
    """

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Name the terms of the loss, in the order of `losses`."""
        ...

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms of the loss, float32 [n_terms]; the loss is their sum. In training mode."""
        ...

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]: softmax, or sigmoid where the task is multi-label. In eval mode."""
        ...
