"""BN-Inception (Ioffe and Szegedy, ICML 2015, Figure 5) for one-channel spectrograms.

The names of the layers are those of the widespread PyTorch checkpoint (bn_inception-*.pth), which was made from Caffe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from echoshift.extract.encoders.registry import EncoderEntry, Shapes
from echoshift.extract.recipes import PLANAMENTE2021, plan_spectrogram_shape
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from echoshift.extract.encoders.network import EncoderNetwork

_N_STEM, _N_POOLED, _N_CLASSES = 192, 1024, 1000

# Channels of a block: 1x1; reduction and 3x3; reduction and two 3x3; 1x1 after pooling. Two blocks have stride 2: they
# have no 1x1, and pool the input itself.
_WIDTHS = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}
_REDUCING = ("3c", "4e")
_MAX_POOLED = "5b"  # the other blocks pool by the mean
_TRUNK, _HEAD = tuple(_WIDTHS)[:7], tuple(_WIDTHS)[7:]  # 4d's map has a position for 16 x 16 of the input


def _list_convs(block: str, n_in: int) -> list[tuple[str, int, int, int, int]]:
    """List the convolutions of a block, in order: name, channels in and out, kernel, stride."""
    n_1x1, n_reduce, n_3x3, n_double_reduce, n_double, n_pool = _WIDTHS[block]
    stride = 2 if block in _REDUCING else 1
    convs = [
        ("1x1", n_in, n_1x1, 1, 1),
        ("3x3_reduce", n_in, n_reduce, 1, 1),
        ("3x3", n_reduce, n_3x3, 3, stride),
        ("double_3x3_reduce", n_in, n_double_reduce, 1, 1),
        ("double_3x3_1", n_double_reduce, n_double, 3, 1),
        ("double_3x3_2", n_double, n_double, 3, stride),
        ("pool_proj", n_in, n_pool, 1, 1),
    ]
    return [(f"inception_{block}_{name}", a, b, kernel, step) for name, a, b, kernel, step in convs if b]


def _count_channels(last: str) -> int:
    """Count the channels after a block."""
    n = _N_STEM
    for block, (n_1x1, _, n_3x3, _, n_double, n_pool) in _WIDTHS.items():
        n = n_1x1 + n_3x3 + n_double + (n if block in _REDUCING else n_pool)
        if block == last:
            break
    return n


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
            **{f"inception_{block}": tuple(name for name, *_ in _list_convs(block, 0)) for block in _WIDTHS},
            "classifier": ("last_linear",),
        }
        split_stage = "inception_4e"
        classified_output = "pooled"
        trunk_channels: ClassVar = {"map": _count_channels("4d")}

        def __init__(self) -> None:
            super().__init__()
            self.conv1_7x7_s2 = ConvNorm(1, 64, 7, stride=2)
            self.conv2_3x3_reduce = ConvNorm(64, 64, 1)
            self.conv2_3x3 = ConvNorm(64, _N_STEM, 3)
            n = _N_STEM
            for block in _WIDTHS:
                for name, n_in, n_out, kernel, stride in _list_convs(block, n):
                    self.add_module(name, ConvNorm(n_in, n_out, kernel, stride))
                n = _count_channels(block)
            self.last_linear = nn.Linear(_N_POOLED, _N_CLASSES)

        def trunk(self, x: Tensor) -> dict[str, Tensor]:
            check_spectrogram_shape(x)
            x = F.max_pool2d(self.conv1_7x7_s2(x), 3, 2, ceil_mode=True)
            x = F.max_pool2d(self.conv2_3x3(self.conv2_3x3_reduce(x)), 3, 2, ceil_mode=True)
            for block in _TRUNK:
                x = self._run_block(block, x)
            return {"map": x}

        def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            top = trunk_outputs["map"]
            for block in _HEAD:
                top = self._run_block(block, top)
            return {"pooled": top.float().mean(dim=(2, 3))}  # means are float32 in any precision

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
            # As in Caffe, zeros around the edges count in the mean.
            pool: Any = F.max_pool2d if block == _MAX_POOLED else F.avg_pool2d
            around = pool(x, 3, 1, padding=1)
            return torch.cat([run("1x1", x), single, double, run("pool_proj", around)], dim=1)

        def classify(self, features: Tensor) -> Tensor:
            return self.last_linear(features)

        def fuse(self, dtype: torch.dtype) -> bool:
            replace_modules(self, ConvNorm, lambda layer: FusedConv(layer.conv, layer.bn, has_relu=True, dtype=dtype))
            return True

    return BNInception()


def plan_outputs(clip: ClipSpec, audio: FrameSpec | AudioSpec) -> Shapes:
    """Compute the shape of every output for one window of audio; the clip has no say in them."""
    assert isinstance(audio, AudioSpec), "this encoder hears"
    # Two poolings leave half a position out, the convolutions of stride 2 don't.
    n_bands, n_windows = (-(-(-(-n // 2) // 2 // 2) // 2) for n in plan_spectrogram_shape(audio))
    return {"map": (_count_channels("4d"), n_bands, n_windows), "pooled": (_N_POOLED,), "logits": (_N_CLASSES,)}


ENTRY = EncoderEntry(
    name="bninception_audio",
    modality="audio",
    revision=1,
    clip=ClipSpec(n_frames=16, stride=2, rate_hz=60, n_clips=5),
    audio=PLANAMENTE2021,
    build=build_bn_inception,
    output_shapes=plan_outputs,
)
