"""SlowFast 8x8 (Feichtenhofer et al., ICCV 2019) from PyTorchVideo's blocks, for any clip length and frame size.

Only the blocks are PyTorchVideo's (their names are its checkpoints' names). Its own forward isn't used: it changes the
list it is given, and its pooling kernel fits 8x8 frames at 224 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from echoshift.extract.encoders.registry import EncoderEntry, Shapes
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from torch import nn

    from echoshift.extract.encoders.network import EncoderNetwork

_N_TRUNK_BLOCKS = 4  # stem, res2, res3, res4
_RES5, _CLASSIFIER = 4, 6
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


def build_slowfast(variant: SlowFastVariant) -> EncoderNetwork:
    """Build the network of a variant."""
    import torch
    from torch import Tensor

    from echoshift.extract.encoders.inference_form import fuse_pytorchvideo
    from echoshift.extract.encoders.network import EncoderNetwork, check_clip_shape

    class SlowFast(EncoderNetwork):
        """SlowFast 8x8 (Feichtenhofer et al., ICCV 2019), split after res4 with the lateral joined (METHODS 4).

        Wherever both paths share a vector, the slow channels come first. x: RGB [B, 3, T, H, W], T a multiple of 4, any
        H and W. Outputs of one clip at T = 32, 224 x 224:
            trunk_slow [1280, 8, 14, 14], trunk_fast [128, 32, 14, 14];
            pooled [2304]: global maximum (METHODS 5.7); pooled_avg [2304]: global mean, what the classifier sees;
            tokens_slow [8, 2048], tokens_fast [32, 256]: maximum over space alone (CharadesEgo);
            logits [400]: of pooled_avg. PyTorchVideo and PySlowFast instead average over 7 x 7 windows at frames
            larger than 224; at 224 both are the same.
        """

        trunk_names = ("trunk_slow", "trunk_fast")
        head_names = ("pooled", "pooled_avg", "tokens_slow", "tokens_fast", "logits")
        stages: ClassVar = {
            "stem": ("blocks.0",),
            "res2": ("blocks.1",),
            "res3": ("blocks.2",),
            "res4": ("blocks.3",),
            "res5": (f"blocks.{_RES5}",),
            "classifier": (f"blocks.{_CLASSIFIER}",),
        }
        split_stage = "res5"
        classified_output = "pooled_avg"
        trunk_channels: ClassVar = {"trunk_slow": variant.n_trunk_slow, "trunk_fast": variant.n_trunk_fast}

        def __init__(self) -> None:
            super().__init__()
            self.blocks = _build_blocks(variant)

        def trunk(self, x: Tensor) -> dict[str, Tensor]:
            check_clip_shape(x, n_channels=3, multiple_of=N_FRAMES_PER_SLOW_FRAME)
            indices = plan_slow_indices(x.shape[2], variant.slow_sampling)
            slow, fast = x[:, :, torch.tensor(indices, device=x.device)], x
            block: Any
            for block in self.blocks[:_N_TRUNK_BLOCKS]:
                slow, fast = block.multipathway_blocks[0](slow), block.multipathway_blocks[1](fast)
                slow, fast = block.multipathway_fusion([slow, fast])
            return {"trunk_slow": slow, "trunk_fast": fast}

        def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            res5: Any = self.blocks[_RES5]
            paths = res5.multipathway_blocks
            slow, fast = paths[0](trunk_outputs["trunk_slow"]), paths[1](trunk_outputs["trunk_fast"])
            slow, fast = slow.float(), fast.float()  # whatever the precision of the convolutions, means are float32
            tokens_slow, tokens_fast = slow.amax(dim=(3, 4)), fast.amax(dim=(3, 4))
            pooled_avg = torch.cat([slow.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))], dim=1)
            return {
                "pooled": torch.cat([tokens_slow.amax(dim=2), tokens_fast.amax(dim=2)], dim=1),
                "pooled_avg": pooled_avg,
                "tokens_slow": tokens_slow.transpose(1, 2),
                "tokens_fast": tokens_fast.transpose(1, 2),
            }

        def classify(self, features: Tensor) -> Tensor:
            classifier: Any = self.blocks[_CLASSIFIER]
            return classifier.proj(classifier.dropout(features))

        def fuse(self, dtype: torch.dtype) -> bool:
            fuse_pytorchvideo(self, dtype)
            return True

    return SlowFast()


def _build_blocks(variant: SlowFastVariant) -> nn.ModuleList:
    ensure_torchvision()
    from pytorchvideo.models.slowfast import FastToSlowFusionBuilder, create_slowfast
    from torch import nn

    fusion = FastToSlowFusionBuilder(
        slowfast_channel_reduction_ratio=8,
        conv_fusion_channel_ratio=2,
        conv_kernel_size=(variant.fusion_kernel, 1, 1),
        conv_stride=(N_FRAMES_PER_SLOW_FRAME, 1, 1),
        norm=nn.BatchNorm3d if variant.has_lateral_norm else None,
        activation=nn.ReLU if variant.has_lateral_norm else None,
    )
    network = create_slowfast(
        model_depth=variant.depth,
        model_num_class=variant.n_classes,
        stem_dim_outs=(variant.stem_width, variant.stem_width // 8),
        fusion_builder=fusion.create_module,
    )
    if not variant.zero_init_residual:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                nn.init.ones_(module.weight)
    blocks: nn.ModuleList = network.blocks
    return blocks


def plan_outputs(variant: SlowFastVariant, clip: ClipSpec, frame: FrameSpec | AudioSpec) -> Shapes:
    """Compute the shape of every output for one clip."""
    assert isinstance(frame, FrameSpec), "this encoder sees frames"
    n_slow_frames = len(plan_slow_indices(clip.n_frames, variant.slow_sampling))
    trunk_side = -(-frame.crop // 16)
    n_pooled = variant.n_slow + variant.n_fast
    return {
        "trunk_slow": (variant.n_trunk_slow, n_slow_frames, trunk_side, trunk_side),
        "trunk_fast": (variant.n_trunk_fast, clip.n_frames, trunk_side, trunk_side),
        "pooled": (n_pooled,),
        "pooled_avg": (n_pooled,),
        "tokens_slow": (n_slow_frames, variant.n_slow),
        "tokens_fast": (clip.n_frames, variant.n_fast),
        "logits": (variant.n_classes,),
    }


# What mmaction2's networks were trained with (METHODS 2), and PyTorchVideo's and PySlowFast's: 0.45 and 0.225 of 0..1.
_MMACTION2 = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_PYTORCHVIDEO = (114.75,) * 3, (57.375,) * 3
_CLIP = ClipSpec(n_frames=32, stride=2, rate_hz=60, n_clips=5)  # 1.07 s five times
_DEMO_CLIP = ClipSpec(n_frames=8, stride=2, rate_hz=15, n_clips=5)


def _make_entry(name: str, variant: SlowFastVariant) -> EncoderEntry:
    is_demo = name == "slowfast_demo"
    side = 64 if is_demo else 256
    mean, std = _PYTORCHVIDEO if name in ("slowfast_r50", "slowfast_r101") else _MMACTION2
    return EncoderEntry(
        name=name,
        modality="rgb",
        revision=2,
        clip=_DEMO_CLIP if is_demo else _CLIP,
        frame=FrameSpec(input="rgb", short_side=side, crop=side, mean=mean, std=std),
        build=partial(build_slowfast, variant),
        output_shapes=partial(plan_outputs, variant),
        default_weights="random:0" if is_demo else "",
    )


ENTRIES = tuple(_make_entry(name, variant) for name, variant in VARIANTS.items())
