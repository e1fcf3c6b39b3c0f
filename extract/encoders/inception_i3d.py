"""I3D, the inflated Inception network of Carreira and Zisserman (CVPR 2017), with TensorFlow's padding.

The names of the modules are those of the widespread PyTorch checkpoints (rgb_imagenet.pt, flow_imagenet.pt).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from echoshift.extract.encoders.registry import EncoderEntry, Shapes
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from echoshift.extract.encoders.network import EncoderNetwork

_BATCH_NORM_EPS = 1e-3
_BATCH_NORM_MOMENTUM = 0.01

# Channels of the branches: 1x1; reduction and 3x3; reduction and 3x3; 1x1 after pooling (GoogLeNet, Table 1).
_MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_N_STEM = 192
_N_POOLED = 1024
_N_CLASSES = 400
_TRUNK = (
    "Conv3d_1a_7x7",
    "MaxPool3d_2a_3x3",
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    "MaxPool3d_3a_3x3",
    "Mixed_3b",
    "Mixed_3c",
    "MaxPool3d_4a_3x3",
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
)
_HEAD = ("MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c")
_LOGIT_WINDOW = (2, 7, 7)


def build_i3d(n_channels: int) -> EncoderNetwork:
    """Build the network for RGB (3 channels) or flow (2)."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from echoshift.extract.encoders.inference_form import FusedConv, replace_modules, same_padding
    from echoshift.extract.encoders.network import EncoderNetwork, check_clip_shape

    class SamePaddedConv(nn.Module):
        """A 3D convolution with `SAME` padding, then BatchNorm and ReLU unless it is the classifier."""

        def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, *, is_classifier: bool = False) -> None:
            super().__init__()
            self.conv3d = nn.Conv3d(n_in, n_out, kernel, stride, bias=is_classifier)
            self.bn: nn.BatchNorm3d | None = None
            if not is_classifier:
                self.bn = nn.BatchNorm3d(n_out, eps=_BATCH_NORM_EPS, momentum=_BATCH_NORM_MOMENTUM)

        def forward(self, x: Tensor) -> Tensor:
            conv = self.conv3d
            x = conv(F.pad(x, same_padding(x.shape[2:], conv.kernel_size, conv.stride)))
            return x if self.bn is None else F.relu(self.bn(x))

    class SamePaddedMaxPool(nn.Module):
        """A 3D max pooling in which the padding never wins."""

        def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
            super().__init__()
            self.kernel, self.stride = kernel, stride

        def forward(self, x: Tensor) -> Tensor:
            # The same as padding with -inf, without the copy: ceil_mode lets the last window reach beyond the end.
            before = same_padding(x.shape[2:], self.kernel, self.stride)[-2::-2]
            return F.max_pool3d(x, self.kernel, self.stride, before, ceil_mode=True)

    class InceptionBlock(nn.Module):
        """Four branches side by side, concatenated over the channels."""

        def __init__(self, n_in: int, widths: tuple[int, int, int, int, int, int]) -> None:
            super().__init__()
            self.b0 = SamePaddedConv(n_in, widths[0], 1)
            self.b1a = SamePaddedConv(n_in, widths[1], 1)
            self.b1b = SamePaddedConv(widths[1], widths[2], 3)
            self.b2a = SamePaddedConv(n_in, widths[3], 1)
            self.b2b = SamePaddedConv(widths[3], widths[4], 3)
            self.b3a = SamePaddedMaxPool((3, 3, 3), (1, 1, 1))
            self.b3b = SamePaddedConv(n_in, widths[5], 1)

        def forward(self, x: Tensor) -> Tensor:
            branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x)))
            return torch.cat(branches, dim=1)

    class InceptionI3D(EncoderNetwork):
        """I3D with 3 (RGB) or 2 (flow) input channels, split after Mixed_4f (METHODS 4).

        x: [B, n_channels, T, H, W], x / 127.5 - 1; any T, H and W. Outputs of one clip at T = 32, 224 x 224:
            trunk [832, 8, 14, 14]; pooled [1024]: Mixed_5c averaged over space and time; pooled_max [1024];
            logits [400]: averaged over time as the authors do, windows of 2 x 7 x 7 at stride 1, so that the first and
            the last position count half. Fewer than 2 x 7 x 7 positions (T < 9 or a side below 193) are averaged whole.
        """

        trunk_names = ("trunk",)
        head_names = ("pooled", "pooled_max", "logits")
        stages: ClassVar = {
            "Conv3d_1a_7x7": ("Conv3d_1a_7x7",),
            "Conv3d_2b_1x1": ("Conv3d_2b_1x1",),
            "Conv3d_2c_3x3": ("Conv3d_2c_3x3",),
            **{name: (name,) for name in _MIXED},
            "classifier": ("logits",),
        }
        split_stage = "Mixed_5b"
        classified_output = "pooled"
        trunk_channels: ClassVar = {"trunk": _count_mixed("Mixed_4f")}

        def __init__(self) -> None:
            super().__init__()
            self.add_module("Conv3d_1a_7x7", SamePaddedConv(n_channels, 64, 7, stride=2))
            self.add_module("MaxPool3d_2a_3x3", SamePaddedMaxPool((1, 3, 3), (1, 2, 2)))
            self.add_module("Conv3d_2b_1x1", SamePaddedConv(64, 64, 1))
            self.add_module("Conv3d_2c_3x3", SamePaddedConv(64, _N_STEM, 3))
            self.add_module("MaxPool3d_3a_3x3", SamePaddedMaxPool((1, 3, 3), (1, 2, 2)))
            self.add_module("MaxPool3d_4a_3x3", SamePaddedMaxPool((3, 3, 3), (2, 2, 2)))
            self.add_module("MaxPool3d_5a_2x2", SamePaddedMaxPool((2, 2, 2), (2, 2, 2)))
            n_outs = [_N_STEM, *(_count_mixed(name) for name in _MIXED)]
            for (name, widths), (n_in, _) in zip(_MIXED.items(), pairwise(n_outs), strict=True):
                self.add_module(name, InceptionBlock(n_in, widths))
            self.logits = SamePaddedConv(_N_POOLED, _N_CLASSES, 1, is_classifier=True)
            self.dropout = nn.Dropout(0.5)

        def trunk(self, x: Tensor) -> dict[str, Tensor]:
            check_clip_shape(x, n_channels)
            for name in _TRUNK:
                x = self.get_submodule(name)(x)
            return {"trunk": x}

        def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            top = self._compute_top(trunk_outputs)
            window = [min(n, w) for n, w in zip(top.shape[2:], _LOGIT_WINDOW, strict=True)]
            return {**self._pool(top), "logits": self.classify(F.avg_pool3d(top, window, stride=1))}

        def classify(self, features: Tensor) -> Tensor:
            return self.logits(self.dropout(features)).mean(dim=(2, 3, 4))

        def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return self._pool(self._compute_top(trunk_outputs))

        def _compute_top(self, trunk_outputs: Mapping[str, Tensor]) -> Tensor:
            top = trunk_outputs["trunk"]
            for name in _HEAD:
                top = self.get_submodule(name)(top)
            return top.float()  # whatever the precision of the convolutions, means are float32

        def _pool(self, top: Tensor) -> dict[str, Tensor]:
            return {"pooled": top.mean(dim=(2, 3, 4)), "pooled_max": top.amax(dim=(2, 3, 4))}

        def fuse(self, dtype: torch.dtype) -> bool:
            def fuse_conv(layer: SamePaddedConv) -> nn.Module:
                if layer.bn is None:  # the classifier
                    return layer
                return FusedConv(layer.conv3d, layer.bn, has_relu=True, dtype=dtype, is_same=True)

            replace_modules(self, SamePaddedConv, fuse_conv)
            return True

    return InceptionI3D()


def plan_outputs(clip: ClipSpec, frame: FrameSpec | AudioSpec) -> Shapes:
    """Compute the shape of every output for one clip."""
    assert isinstance(frame, FrameSpec), "this encoder sees frames or flow"
    side = -(-frame.crop // 16)
    trunk = (_count_mixed("Mixed_4f"), -(-clip.n_frames // 4), side, side)
    return {"trunk": trunk, "pooled": (_N_POOLED,), "pooled_max": (_N_POOLED,), "logits": (_N_CLASSES,)}


def _count_mixed(name: str) -> int:
    widths = _MIXED[name]
    return widths[0] + widths[2] + widths[4] + widths[5]


def _make_entry(name: str, n_channels: int, clip: ClipSpec, frame: FrameSpec) -> EncoderEntry:
    return EncoderEntry(
        name=name,
        modality=frame.input,
        revision=2,
        clip=clip,
        frame=frame,
        build=partial(build_i3d, n_channels),
        output_shapes=plan_outputs,
    )


ENTRIES = (
    _make_entry(
        "i3d_rgb",
        3,
        ClipSpec(n_frames=32, stride=2, rate_hz=60, n_clips=5),
        FrameSpec(input="rgb", short_side=256, crop=224, mean=(127.5,) * 3, std=(127.5,) * 3),
    ),
    _make_entry(
        "i3d_flow",
        2,
        ClipSpec(n_frames=32, stride=1, rate_hz=30, n_clips=5),
        FrameSpec(input="flow", short_side=256, crop=224, mean=(127.5,) * 2, std=(127.5,) * 2),
    ),
)
