"""The variants of SlowFast that exist as checkpoints, and the arithmetic of their shapes; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from echoshift.pipeline.errors import SpecError

N_FRAMES_PER_SLOW_FRAME = 4  # alpha of the 8x8 networks
FAST_WIDTH_RATIO = 8  # 1 / beta

SlowSampling = Literal["stride", "linspace"]


@dataclass(frozen=True, slots=True)
class SlowFastVariant:
    """What distinguishes two SlowFast networks of the same shape of output; a checkpoint fits one variant only.

    Attributes:
        depth: 50 or 101; 18 stands for one bottleneck a stage (the demo network).
        fusion_kernel: temporal kernel of the lateral convolutions.
        has_lateral_norm: whether BatchNorm and ReLU follow the lateral convolution. They do in the SlowFast paper's
            own code and PyTorchVideo, they don't in mmaction2.
        slow_sampling: which frames the slow path sees, the rule its weights were trained with: `stride` takes
            0, 4, 8, ... (mmaction2; METHODS 2 "every alpha=4-th"), `linspace` spreads T/4 frames from the first to the
            last and truncates the index (PySlowFast, PyTorchVideo).
        stem_width: channels after the slow stem, 64 in all published networks.
        n_classes: of the classifier.
        zero_init_residual: whether each residual branch starts at zero, as published. Off for the demo network,
            whose random weights are used as they are.
    """

    depth: int
    fusion_kernel: int
    has_lateral_norm: bool
    slow_sampling: SlowSampling
    stem_width: int = 64
    n_classes: int = 400
    zero_init_residual: bool = True

    @property
    def n_slow(self) -> int:
        """The slow path's channels after res5."""
        return 32 * self.stem_width

    @property
    def n_fast(self) -> int:
        """The fast path's channels after res5."""
        return self.n_slow // FAST_WIDTH_RATIO

    @property
    def n_trunk_slow(self) -> int:
        """The slow path's channels after res4 with the lateral joined."""
        return self.n_slow // 2 + 2 * self.n_trunk_fast

    @property
    def n_trunk_fast(self) -> int:
        """The fast path's channels after res4."""
        return self.n_fast // 2


VARIANTS: dict[str, SlowFastVariant] = {
    "slowfast_r50": SlowFastVariant(50, fusion_kernel=7, has_lateral_norm=True, slow_sampling="linspace"),
    "slowfast_r101": SlowFastVariant(101, fusion_kernel=5, has_lateral_norm=True, slow_sampling="linspace"),
    "slowfast_r50_mmaction": SlowFastVariant(50, fusion_kernel=7, has_lateral_norm=False, slow_sampling="stride"),
    "slowfast_r101_mmaction": SlowFastVariant(101, fusion_kernel=7, has_lateral_norm=False, slow_sampling="stride"),
    "slowfast_demo": SlowFastVariant(
        18,
        fusion_kernel=5,
        has_lateral_norm=True,
        slow_sampling="stride",
        stem_width=16,
        n_classes=6,
        zero_init_residual=False,
    ),
}


def plan_slow_indices(n_frames: int, rule: SlowSampling) -> list[int]:
    """Return the indices of the frames that the slow path sees, n_frames / 4 of them.

    Raises SpecError if n_frames isn't a positive multiple of 4.
    """
    alpha = N_FRAMES_PER_SLOW_FRAME
    if n_frames < alpha or n_frames % alpha:
        raise SpecError(f"SlowFast takes a positive multiple of {alpha} frames, not {n_frames}")
    n_slow = n_frames // alpha
    if rule == "stride" or n_slow == 1:
        return list(range(0, n_frames, alpha))
    return [i * (n_frames - 1) // (n_slow - 1) for i in range(n_slow)]


def plan_slowfast_shapes(variant: SlowFastVariant, n_frames: int, side: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every output for one clip of n_frames pictures of side x side."""
    n_slow_frames = len(plan_slow_indices(n_frames, variant.slow_sampling))
    trunk_side = -(-side // 16)
    n_pooled = variant.n_slow + variant.n_fast
    return {
        "trunk_slow": (variant.n_trunk_slow, n_slow_frames, trunk_side, trunk_side),
        "trunk_fast": (variant.n_trunk_fast, n_frames, trunk_side, trunk_side),
        "pooled": (n_pooled,),
        "pooled_avg": (n_pooled,),
        "tokens_slow": (n_slow_frames, variant.n_slow),
        "tokens_fast": (n_frames, variant.n_fast),
        "logits": (variant.n_classes,),
    }
