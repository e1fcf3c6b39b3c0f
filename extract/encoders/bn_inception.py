"""BN-Inception (Ioffe and Szegedy, ICML 2015, Figure 5) for one-channel spectrograms.

The names of the layers are those of the widespread PyTorch checkpoint (bn_inception-*.pth), which was made from Caffe.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from echoshift.extract.encoders.registry import EncoderEntry, Shapes
from echoshift.extract.sound.recipes import PLANAMENTE2021, plan_spectrogram_shape
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from echoshift.extract.encoders.network import EncoderNetwork

_N_STEM, _N_POOLED, _N_CLASSES = 192, 1024, 1000

# Channels of the branches: 1x1; reduction and 3x3; reduction and two 3x3; 1x1 after pooling, and how that pools.
_Widths = tuple[int, int, int, int, int, int]
_MIXED: dict[str, tuple[_Widths, Literal["avg", "max"]]] = {
    "3a": ((64, 64, 64, 64, 96, 32), "avg"),
    "3b": ((64, 64, 96, 64, 96, 64), "avg"),
    "4a": ((224, 64, 96, 96, 128, 128), "avg"),
    "4b": ((192, 96, 128, 96, 128, 128), "avg"),
    "4c": ((160, 128, 160, 128, 160, 128), "avg"),
    "4d": ((96, 128, 192, 160, 192, 128), "avg"),
    "5a": ((352, 192, 320, 160, 224, 128), "avg"),
    "5b": ((352, 192, 320, 192, 224, 128), "max"),
}
# Blocks of stride 2: reduction and 3x3; reduction and two 3x3; the input itself, pooled.
_REDUCING: dict[str, tuple[int, int, int, int]] = {"3c": (128, 160, 64, 96), "4e": (128, 192, 192, 256)}
_BLOCKS = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
_N_TRUNK_BLOCKS = 7  # up to 4d, whose map has a position for 16 x 16 of the input


def _list_parts(block: str) -> tuple[str, ...]:
    """List the names of a block's convolutions, in order."""
    parts = ["3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2"]
    if block in _MIXED:
        parts = ["1x1", *parts, "pool_proj"]
    return tuple(f"inception_{block}_{part}" for part in parts)


def build_bn_inception() -> EncoderNetwork:
    """Build the network."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from echoshift.extract.encoders.inference_form import FusedConv, replace_modules
    from echoshift.extract.encoders.network import EncoderNetwork, check_spectrogram_shape

    class ConvNorm(nn.Module):
        """A 2D convolution with a bias, BatchNorm and ReLU."""

        def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1) -> None:
            super().__init__()
            self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2)
            self.bn: nn.BatchNorm2d = nn.BatchNorm2d(n_out)

        def forward(self, x: Tensor) -> Tensor:
            """Convolve [B, C, H, W]."""
            return F.relu(self.bn(self.conv(x)))

    class BNInception(EncoderNetwork):
        """BN-Inception with one input channel, split after block 4d.

        x: [B, 1, F, N], F and N at least 16. Outputs for 256 x 256: map [608, 16, 16]; pooled [1024], the mean of block
        5b; logits [1000]. Where a side of a block of stride 2 is odd, its pooling takes one window more than Caffe's,
        so that the branches fit; of 256 x 256, as of 224 x 224, none is.
        """

        trunk_names = ("map",)
        head_names = ("pooled", "logits")
        stages: ClassVar = {
            "conv1": ("conv1_7x7_s2",),
            "conv2": ("conv2_3x3_reduce", "conv2_3x3"),
            **{f"inception_{block}": _list_parts(block) for block in _BLOCKS},
            "classifier": ("last_linear",),
        }
        split_stage = "inception_4e"
        classified_output = "pooled"

        def __init__(self) -> None:
            super().__init__()
            self.conv1_7x7_s2 = ConvNorm(1, 64, 7, stride=2)
            self.conv2_3x3_reduce = ConvNorm(64, 64, 1)
            self.conv2_3x3 = ConvNorm(64, _N_STEM, 3)
            n_outs = _count_channels()
            for block, (n_in, _) in zip(_BLOCKS, pairwise(n_outs), strict=True):
                self._add_block(f"inception_{block}", block, n_in)
            self.last_linear = nn.Linear(_N_POOLED, _N_CLASSES)

        @property
        def trunk_channels(self) -> dict[str, int]:
            """The channels after block 4d."""
            return {"map": _count_channels()[_N_TRUNK_BLOCKS]}

        def trunk(self, x: Tensor) -> dict[str, Tensor]:
            """Compute everything up to and including block 4d."""
            check_spectrogram_shape(x)
            x = F.max_pool2d(self.conv1_7x7_s2(x), 3, 2, ceil_mode=True)
            x = F.max_pool2d(self.conv2_3x3(self.conv2_3x3_reduce(x)), 3, 2, ceil_mode=True)
            for block in _BLOCKS[:_N_TRUNK_BLOCKS]:
                x = self._run_block(block, x)
            return {"map": x}

        def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Compute the blocks from 4e on, their mean over frequency and time, and the logits."""
            features = self.features(trunk_outputs)
            return {**features, "logits": self.last_linear(features["pooled"])}

        def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Compute the blocks from 4e on and their mean over frequency and time."""
            top = trunk_outputs["map"]
            for block in _BLOCKS[_N_TRUNK_BLOCKS:]:
                top = self._run_block(block, top)
            return {"pooled": top.float().mean(dim=(2, 3))}  # means are float32 in any precision

        def _add_block(self, name: str, block: str, n_in: int) -> None:
            stride = 1
            if block in _MIXED:
                (n_1x1, n_reduce, n_3x3, n_double_reduce, n_double, n_pool), _ = _MIXED[block]
                self.add_module(f"{name}_1x1", ConvNorm(n_in, n_1x1, 1))
            else:
                n_reduce, n_3x3, n_double_reduce, n_double = _REDUCING[block]
                n_pool, stride = 0, 2
            self.add_module(f"{name}_3x3_reduce", ConvNorm(n_in, n_reduce, 1))
            self.add_module(f"{name}_3x3", ConvNorm(n_reduce, n_3x3, 3, stride))
            self.add_module(f"{name}_double_3x3_reduce", ConvNorm(n_in, n_double_reduce, 1))
            self.add_module(f"{name}_double_3x3_1", ConvNorm(n_double_reduce, n_double, 3))
            self.add_module(f"{name}_double_3x3_2", ConvNorm(n_double, n_double, 3, stride))
            if n_pool:
                self.add_module(f"{name}_pool_proj", ConvNorm(n_in, n_pool, 1))

        def _run_block(self, block: str, x: Tensor) -> Tensor:
            def run(part: str, values: Tensor) -> Tensor:
                found: Tensor = self.get_submodule(f"inception_{block}_{part}")(values)
                return found

            single = run("3x3", run("3x3_reduce", x))
            double = run("double_3x3_2", run("double_3x3_1", run("double_3x3_reduce", x)))
            if block in _REDUCING:
                # What is pooled comes out of a ReLU, so that zeros never win.
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
                return torch.cat([single, double, F.max_pool2d(x, 3, 2, ceil_mode=True)], dim=1)
            is_mean = _MIXED[block][1] == "avg"
            # As in Caffe, zeros around the edges count in the mean.
            around = F.avg_pool2d(x, 3, 1, padding=1) if is_mean else F.max_pool2d(x, 3, 1, padding=1)
            return torch.cat([run("1x1", x), single, double, run("pool_proj", around)], dim=1)

        def fuse(self, dtype: torch.dtype) -> bool:
            """Fuse every convolution with its norm."""
            replace_modules(self, ConvNorm, lambda layer: FusedConv(layer.conv, layer.bn, has_relu=True, dtype=dtype))
            return True

    return BNInception()


def plan_outputs(clip: ClipSpec, audio: FrameSpec | AudioSpec) -> Shapes:
    """Compute the shape of every output for one window of audio; the clip has no say in them."""
    assert isinstance(audio, AudioSpec), "this encoder hears"
    # Two poolings leave half a position out, the convolutions of stride 2 don't.
    n_bands, n_windows = (-(-(-(-n // 2) // 2 // 2) // 2) for n in plan_spectrogram_shape(audio))
    n_map = _count_channels()[_N_TRUNK_BLOCKS]
    return {"map": (n_map, n_bands, n_windows), "pooled": (_N_POOLED,), "logits": (_N_CLASSES,)}


def _count_channels() -> list[int]:
    """Count the channels that go into each block, and those that come out of the last."""
    counts = [_N_STEM]
    for block in _BLOCKS:
        if block in _MIXED:
            (n_1x1, _, n_3x3, _, n_double, n_pool), _ = _MIXED[block]
            counts.append(n_1x1 + n_3x3 + n_double + n_pool)
        else:
            _, n_3x3, _, n_double = _REDUCING[block]
            counts.append(n_3x3 + n_double + counts[-1])
    return counts


ENTRY = EncoderEntry(
    name="bninception_audio",
    modality="audio",
    revision=1,
    clip=ClipSpec(n_frames=16, stride=2, rate_hz=60, n_clips=5),
    audio=PLANAMENTE2021,
    build=build_bn_inception,
    output_shapes=plan_outputs,
)
