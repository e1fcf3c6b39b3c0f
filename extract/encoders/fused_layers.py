"""Holds the layers of an encoder's inference form: convolutions with their norm folded in, in the fastest layout.

They compute what the trainable layers compute, up to rounding, with fewer passes over memory: the norm is part of the
weights, ReLU and the residual sum are applied while the convolution writes its result, and channels lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_N_PACKED = 2
_Conv = nn.Conv2d | nn.Conv3d
_Norm = nn.BatchNorm2d | nn.BatchNorm3d


def fold_norm(conv: _Conv, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Compute the weight and bias of the one convolution that does what `conv` and then `norm` do.

    The algebra is done in float64 and rounded once to the convolution's own type.
    """
    if not isinstance(norm, _Norm):
        return conv.weight, conv.bias
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    bias = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * scale.reshape(-1, *[1] * (conv.weight.ndim - 1))
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
        # The order in which the convolution reads its weight depends on the input's shape; putting it in order anew at
        # every call can take longer than the convolution. Two shapes: a full batch and a shard's last one.
        if shape not in self._packed:
            while len(self._packed) >= _N_PACKED:
                del self._packed[next(iter(self._packed))]
            self._packed[shape] = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, padding, list(self.stride), list(self.dilation), self.groups, list(shape)
            )
        return self._packed[shape]


class FusedStem(nn.Module):
    """A convolution and then a pooling."""

    def __init__(self, conv: FusedConv, pool: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: Tensor) -> Tensor:
        """Compute both on [B, C, T, H, W]."""
        x = self.conv(x)
        return x if self.pool is None else self.pool(x)


class FusedResidualBlock(nn.Module):
    """A residual block: convolutions one after another, the last one added to the shortcut under one ReLU."""

    def __init__(self, convs: Sequence[FusedConv], shortcut: FusedConv | None) -> None:
        super().__init__()
        self.first, self.last = nn.ModuleList(convs[:-1]), convs[-1]
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block on [B, C, (T,) H, W], which is left as it is."""
        y = x
        for conv in self.first:
            y = conv(y)
        if self.shortcut is None:
            return self.last(y, x.to(self.last.dtype))
        return self.last(y, self.shortcut(x), may_overwrite_plus=True)


class FusedLateral(nn.Module):
    """SlowFast's lateral connection: the fast path convolved in time and joined to the slow path's channels."""

    def __init__(self, conv: FusedConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, paths: Sequence[Tensor]) -> list[Tensor]:
        """Take [slow, fast] and return [slow with the lateral, fast]."""
        slow, fast = paths
        return [torch.cat([slow, self.conv(fast)], dim=1), fast]


def choose_memory_format(n_dims: int, device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Choose how activations of a network lie in memory: channels last, but for float32 on a GPU.

    On a CPU max pooling is 10 times as fast with the channels last, and no convolution has to lay out its input anew.
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
