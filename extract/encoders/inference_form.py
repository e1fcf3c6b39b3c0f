"""Turns a loaded encoder into the form that extraction runs: same outputs, fewer passes over memory.

The trainable network stays as it is, its names are the checkpoints' names; the form has no state dict of use to anyone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from echoshift.extract.encoders.audio_resnet import AudioResNet
from echoshift.extract.encoders.bn_inception import BNInception, ConvNorm
from echoshift.extract.encoders.encoder_network import EncoderNetwork
from echoshift.extract.encoders.fused_layers import FusedConv, FusedLateral, FusedResidualBlock, FusedStem
from echoshift.extract.encoders.inception_i3d import InceptionI3D, SamePaddedConv
from echoshift.extract.encoders.slowfast import SlowFast
from echoshift.extract.encoders.slowonly import SlowOnly
from echoshift.pipeline.errors import SpecError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


def prepare_for_inference(
    network: EncoderNetwork, device: torch.device, precision: Precision = "fp32"
) -> EncoderNetwork:
    """Build the inference form of a network on a device; the network given is left as it is.

    The form has the same `trunk`, `head` and `forward`. Norms are folded into the convolutions, which run in
    `precision` by themselves: no autocast is needed around it. Pooling, classifiers and outputs past the trunk are
    float32. In fp32 the outputs differ from the network's by rounding alone.
    A class of network without a form, such as one from outside, runs as it is in fp32; SpecError in another precision.
    """
    form = copy.deepcopy(network).eval().requires_grad_(False).to(device)
    dtype = DTYPES[precision]
    if isinstance(form, InceptionI3D):
        _swap(form, SamePaddedConv, lambda layer: _fuse_same_conv(layer, dtype), but=(form.logits,))
    elif isinstance(form, SlowFast | SlowOnly):
        _fuse_pytorchvideo(form, dtype)
    elif isinstance(form, BNInception):
        _swap(form, ConvNorm, lambda layer: FusedConv(layer.conv, layer.bn, has_relu=True, dtype=dtype))
    elif isinstance(form, AudioResNet):
        _fuse_timm(form.net, dtype)
    elif precision != "fp32":
        raise SpecError(f"{type(network).__name__} has no inference form in {precision}; use fp32")
    return form


def choose_precision_hint(device: torch.device) -> Precision:
    """Return the precision in which networks run fastest on a device; what is used is the specification's to say.

    bf16 on a CPU with AMX or AVX-512 BF16, fp32 on any other (bf16 was 21 times as slow there); on a GPU bf16 from
    compute capability 8.0 on, fp16 from 7.0 on.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    has_bf16_units: Any = (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
    return "bf16" if any(probe() for probe in has_bf16_units) else "fp32"


def _swap(
    root: nn.Module,
    kind: type[nn.Module],
    build: Callable[[Any], nn.Module],
    but: tuple[nn.Module, ...] = (),
) -> None:
    """Replace every module of a kind below root by what `build` makes of it."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind) and not any(child is kept for kept in but):
                setattr(module, name, build(child))


def _fuse_same_conv(layer: SamePaddedConv, dtype: torch.dtype) -> FusedConv:
    return FusedConv(layer.conv3d, layer.bn, has_relu=True, dtype=dtype, is_same=True)


def _fuse_pytorchvideo(form: EncoderNetwork, dtype: torch.dtype) -> None:
    from pytorchvideo.models.resnet import BottleneckBlock, ResBlock
    from pytorchvideo.models.slowfast import FuseFastToSlow
    from pytorchvideo.models.stem import ResNetBasicStem

    def fuse_block(block: Any) -> nn.Module:
        path = block.branch2
        if not isinstance(path, BottleneckBlock):
            raise SpecError(f"a residual block of {type(path).__name__} has no inference form")
        convs = [
            FusedConv(path.conv_a, path.norm_a, has_relu=True, dtype=dtype),
            FusedConv(path.conv_b, path.norm_b, has_relu=True, dtype=dtype),
            FusedConv(path.conv_c, path.norm_c, has_relu=True, dtype=dtype),
        ]
        shortcut = None
        if block.branch1_conv is not None:
            shortcut = FusedConv(block.branch1_conv, block.branch1_norm, has_relu=False, dtype=dtype)
        return FusedResidualBlock(convs, shortcut)

    def fuse_stem(stem: Any) -> nn.Module:
        has_relu = stem.activation is not None
        return FusedStem(FusedConv(stem.conv, stem.norm, has_relu=has_relu, dtype=dtype), stem.pool)

    def fuse_lateral(lateral: Any) -> nn.Module:
        has_relu = lateral.activation is not None
        return FusedLateral(FusedConv(lateral.conv_fast_to_slow, lateral.norm, has_relu=has_relu, dtype=dtype))

    _swap(form, ResBlock, fuse_block)
    _swap(form, ResNetBasicStem, fuse_stem)
    _swap(form, FuseFastToSlow, fuse_lateral)


def _fuse_timm(net: Any, dtype: torch.dtype) -> None:
    from timm.models.resnet import BasicBlock

    def fuse_block(block: Any) -> nn.Module:
        convs = [
            FusedConv(block.conv1, block.bn1, has_relu=True, dtype=dtype),
            FusedConv(block.conv2, block.bn2, has_relu=True, dtype=dtype),
        ]
        shortcut = None
        if block.downsample is not None:
            conv, norm = block.downsample
            shortcut = FusedConv(conv, norm, has_relu=False, dtype=dtype)
        return FusedResidualBlock(convs, shortcut)

    _swap(net, BasicBlock, fuse_block)
    if isinstance(net.conv1, nn.Sequential):  # the deep stem: convolution, norm, ReLU twice, then one convolution
        layers: Any = list(net.conv1)
        first, first_norm, _, second, second_norm, _, last = layers
        net.conv1 = nn.Sequential(
            FusedConv(first, first_norm, has_relu=True, dtype=dtype),
            FusedConv(second, second_norm, has_relu=True, dtype=dtype),
            FusedConv(last, net.bn1, has_relu=True, dtype=dtype),
        )
    else:
        net.conv1 = FusedConv(net.conv1, net.bn1, has_relu=True, dtype=dtype)
    net.bn1 = net.act1 = nn.Identity()
