"""The form of a network that extraction runs: same outputs, fewer passes over memory.

Norms are part of the convolutions' weights, ReLU and the residual sum are applied while a convolution writes its
result, and channels lie together. The trainable network stays as it is, its names are the checkpoints' names; the form
has no state dict of use to anyone. Each network says in its `fuse` which of its layers become which of these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.pipeline.errors import SpecError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_N_PACKED = 2
_Conv = nn.Conv2d | nn.Conv3d
_Norm = nn.BatchNorm2d | nn.BatchNorm3d
_Network = TypeVar("_Network", bound=nn.Module)


def prepare_for_inference(network: _Network, device: torch.device, precision: Precision = "fp32") -> _Network:
    """Build the inference form of a network on a device; the network given is left as it is.

    The form has the same `trunk`, `head` and `forward`. Norms are folded into the convolutions, which run in
    `precision` by themselves: no autocast is needed around it. Pooling, classifiers and outputs past the trunk are
    float32. In fp32 the outputs differ from the network's by rounding alone.
    A network without a `fuse` of its own runs as it is in fp32; SpecError in another precision.
    """
    form = copy.deepcopy(network).eval().requires_grad_(False).to(device)
    has_form = isinstance(form, EncoderNetwork) and form.fuse(DTYPES[precision])
    if not has_form and precision != "fp32":
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


def replace_modules(root: nn.Module, kind: type[nn.Module], build: Callable[[Any], nn.Module]) -> None:
    """Replace every module of a kind below root by what `build` makes of it, which may be the module itself."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, build(child))


def fuse_pytorchvideo(network: nn.Module, dtype: torch.dtype) -> None:
    """Fuse the layers of PyTorchVideo's ResNets and SlowFasts in place."""
    from pytorchvideo.models.resnet import BottleneckBlock, ResBlock
    from pytorchvideo.models.slowfast import FuseFastToSlow
    from pytorchvideo.models.stem import ResNetBasicStem

    def fuse_block(block: Any) -> nn.Module:
        path = block.branch2
        if not isinstance(path, BottleneckBlock):
            raise SpecError(f"a residual block of {type(path).__name__} has no inference form")
        pairs = ((path.conv_a, path.norm_a), (path.conv_b, path.norm_b), (path.conv_c, path.norm_c))
        shortcut = None if block.branch1_conv is None else (block.branch1_conv, block.branch1_norm)
        return FusedResidualBlock(pairs, shortcut, dtype)

    def fuse_in_place(module: Any, conv: str) -> nn.Module:
        has_relu = module.activation is not None
        setattr(module, conv, FusedConv(getattr(module, conv), module.norm, has_relu=has_relu, dtype=dtype))
        module.norm = module.activation = None
        return module

    replace_modules(network, ResBlock, fuse_block)
    replace_modules(network, ResNetBasicStem, lambda stem: fuse_in_place(stem, "conv"))
    replace_modules(network, FuseFastToSlow, lambda lateral: fuse_in_place(lateral, "conv_fast_to_slow"))


def fold_norm(conv: _Conv, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Compute the weight and bias of the one convolution that does what `conv` and then `norm` do.

    The algebra is done in float64 and rounded once to the convolution's own type.
    """
    if not isinstance(norm, _Norm):
        return conv.weight, conv.bias
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, var, scale, shift = (None if tensor is None else tensor.double() for tensor in tensors)
    assert weight is not None and mean is not None and var is not None
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def same_padding(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Compute TensorFlow's `SAME` padding in the order that torch.nn.functional.pad takes (last axis first).

    The output has ceil(n / stride) positions; of an odd amount the larger half goes to the end.
    """
    padding: list[int] = []
    for n, k, s in zip(reversed(shape), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding += [total // 2, total - total // 2]
    return padding


class FusedConv(nn.Module):
    """A convolution with its norm folded in, then the sum with `plus` if there is one, then ReLU if `has_relu`.

    Takes and gives [B, C, (T,) H, W] in `dtype`; the input is cast and laid out as needed. With `is_same` the padding
    is TensorFlow's, otherwise the convolution's own.
    """

    def __init__(
        self,
        conv: _Conv,
        norm: nn.Module | None,
        *,
        has_relu: bool,
        dtype: torch.dtype = torch.float32,
        is_same: bool = False,
    ) -> None:
        super().__init__()
        assert isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"
        weight, bias = fold_norm(conv, norm)
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups, self.has_relu, self.is_same = conv.dilation, conv.groups, has_relu, is_same
        self.dtype = dtype
        self.memory_format = choose_memory_format(weight.ndim, weight.device, dtype)
        weight = weight.detach().to(dtype).contiguous(memory_format=self.memory_format)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.has_onednn = has_onednn(weight.device, dtype)
        self.weight = weight
        self._packed: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor, plus: Tensor | None = None, *, may_overwrite_plus: bool = False) -> Tensor:
        """Convolve x; `plus` has the result's shape, and holds the result if it may be overwritten."""
        x = x.to(self.dtype)
        padding = list(self.padding)
        if self.is_same:
            around = same_padding(x.shape[2:], self.kernel_size, self.stride)
            if around[::2] == around[1::2]:
                padding = around[-2::-2]
            else:
                x = F.pad(x, around)
        x = x.contiguous(memory_format=self.memory_format)
        return (
            self._convolve_onednn(x, plus, padding, may_overwrite_plus)
            if self.has_onednn
            else self._convolve(x, plus, padding)
        )

    def _convolve(self, x: Tensor, plus: Tensor | None, padding: list[int]) -> Tensor:
        convolve: Any = F.conv3d if x.ndim == 5 else F.conv2d
        result: Tensor = convolve(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        if plus is not None:
            result = result.add_(plus)
        return result.relu_() if self.has_relu else result

    def _convolve_onednn(self, x: Tensor, plus: Tensor | None, padding: list[int], may_overwrite_plus: bool) -> Tensor:
        operators = torch.ops.mkldnn
        how = (padding, list(self.stride), list(self.dilation), self.groups)
        weight = self._pack(tuple(x.shape), padding)
        result: Tensor
        if plus is None:
            relu = "relu" if self.has_relu else "none"
            result = operators._convolution_pointwise(x, weight, self.bias, *how, relu, [], "")
            return result
        plus = plus.contiguous(memory_format=self.memory_format)
        relu_after = "relu" if self.has_relu else None
        if may_overwrite_plus:
            result = operators._convolution_pointwise_.binary(
                plus, x, weight, self.bias, *how, "add", 1.0, relu_after, [], ""
            )
        else:
            result = operators._convolution_pointwise.binary(
                x, plus, weight, self.bias, *how, "add", 1.0, relu_after, [], ""
            )
        return result

    def _pack(self, shape: tuple[int, ...], padding: list[int]) -> Tensor:
        # The order in which the convolution reads its weight depends on the input's shape; putting it in order again at
        # every call can take longer than the convolution. Two shapes: a full batch and a shard's last one.
        if shape not in self._packed:
            while len(self._packed) >= _N_PACKED:
                del self._packed[next(iter(self._packed))]
            self._packed[shape] = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, padding, list(self.stride), list(self.dilation), self.groups, list(shape)
            )
        return self._packed[shape]


class FusedResidualBlock(nn.Module):
    """A residual block: convolutions one after another, the last one added to the shortcut under one ReLU."""

    def __init__(
        self,
        pairs: Sequence[tuple[_Conv, nn.Module]],
        shortcut: tuple[_Conv, nn.Module | None] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        convs = [FusedConv(conv, norm, has_relu=True, dtype=dtype) for conv, norm in pairs]
        self.first, self.last = nn.ModuleList(convs[:-1]), convs[-1]
        self.shortcut = None if shortcut is None else FusedConv(*shortcut, has_relu=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block on [B, C, (T,) H, W], which is left as it is."""
        y = x
        for conv in self.first:
            y = conv(y)
        if self.shortcut is None:
            return self.last(y, x.to(self.last.dtype))
        return self.last(y, self.shortcut(x), may_overwrite_plus=True)


def choose_memory_format(n_dims: int, device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Choose how activations of a network lie in memory: channels last, but for float32 on a GPU.

    On a CPU max pooling is 10 times as fast with the channels last, and no convolution has to lay out its input again.
    A GPU's half-precision units read channels last.
    """
    if device.type == "cuda" and dtype == torch.float32:
        return torch.contiguous_format
    return _CHANNELS_LAST[n_dims]


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN's fused convolutions can be used; without them the same layers run on torch's own."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
