"""Simulates the tensors of a GPU: another device to torch and to the code, the CPU's numbers underneath.

What a CUDA device refuses is refused: operands on two devices, NumPy's view of device memory, a CPU generator for
numbers there. Copies that don't block arrive when an event, or anything that waits for the device, says so; until then
their target holds NaN. What isn't simulated: a GPU's own kernels (numbers are a CPU's), autocast, memory, timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_ACROSS_DEVICES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}  # indices may lie on the CPU
_NO_CPU_SCALARS = ("aten::cat", "aten::stack", "aten::_fused_", "aten::native_", "aten::index_select", "aten::gather")


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated GPU; `inner` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        """Wrap the numbers; to torch's own code the tensor is on `meta`, which computes nothing by itself."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="meta",
        )
        tensor.inner = inner
        return tensor

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return RUNNER.run(func, args, kwargs or {})


class AnyGenerator(torch._C.Generator):
    """A generator of the CPU or of the simulated GPU, as torch.Generator(device) makes one."""

    def __new__(cls, device: Any = "cpu") -> AnyGenerator:
        """Make it; a CPU draws the numbers of both."""
        generator = super().__new__(cls)
        generator._place = _name_index(torch.device(device))
        return generator

    @property
    def device(self) -> torch.device:
        return self._place


class Runner:
    """Computes operations on the CPU, refuses what a GPU refuses, and shows each to whoever records."""

    def __init__(self) -> None:
        self.n_run = 0
        self.wants_meta = False
        self.recorder: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None
        self.before: Callable[[Any, tuple[Any, ...], dict[str, Any], str], None] | None = None
        self._under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        is_on_gpu = any(isinstance(x, DeviceTensor) for x in flat)
        wanted = kwargs.get("device")
        target = torch.device(wanted).type if wanted is not None else "cuda" if is_on_gpu else "cpu"
        if target == "meta" and not self.wants_meta:  # from torch's own code, to which a DeviceTensor is on `meta`
            target = "cuda"
        if not is_on_gpu and target != "cuda":
            return func(*args, **kwargs)
        self.n_run += 1
        if is_on_gpu:
            _check_devices(func, args, flat)
        if self.before is not None:
            self.before(func, args, kwargs, target)
        if target == "cuda" and wanted is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.pop("pin_memory", False) and target == "cuda":
            raise RuntimeError("only dense CPU tensors can be pinned")
        inner_args, inner_kwargs = tree_map(_unwrap, args), tree_map(_unwrap, kwargs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense" or (target == "cpu" and not kwargs.get("non_blocking")):
            self.wait()
        if name == "aten::copy_" and not isinstance(args[0], DeviceTensor) and is_on_gpu:
            return self._copy_back(args[0], inner_args[1], bool((args[2:] or [kwargs.get("non_blocking")])[0]))
        if name == "aten::_to_copy" and target == "cpu":
            inner_kwargs.pop("non_blocking", None)
            return (
                inner_args[0].clone()
                if _is_plain_copy(inner_args[0], inner_kwargs)
                else func(*inner_args, **inner_kwargs)
            )
        out = func(*inner_args, **inner_kwargs)
        if torch.Tag.inplace_view in func.tags:  # the tensor's own shape changes, too
            with no_dispatch():
                func(*args, **kwargs)
        if target == "cuda":
            out = _wrap_outputs((args, kwargs), out)
        if self.recorder is not None:
            self.recorder(func, inner_args, inner_kwargs, out)
        return out

    def wait(self) -> None:
        """Let what was copied without blocking arrive."""
        under_way, self._under_way = self._under_way, []
        for target, numbers in under_way:
            target.copy_(numbers)

    def _copy_back(self, target: torch.Tensor, numbers: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        if not non_blocking:
            return target.copy_(numbers)
        self._under_way.append((target, numbers.clone()))
        return target.fill_(float("nan")) if target.is_floating_point() else target


RUNNER = Runner()


class DeviceMode(TorchDispatchMode):
    """Makes tensors of the simulated GPU, and sends tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return RUNNER.run(func, args, kwargs or {})


class PythonMode(TorchFunctionMode):
    """Does what torch does before it comes to operations: indices of devices, pinned memory, NumPy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_name_index, args)), {k: _name_index(v) for k, v in (kwargs or {}).items()}
        _check_generator(args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _FROM_MEMORY and args and isinstance(args[0], DeviceTensor):
            if name == "tolist":
                RUNNER.wait()
                return args[0].inner.tolist()
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if name in ("__getitem__", "__setitem__") and isinstance(
            args[0], DeviceTensor
        ):  # lists would go past the modes
            args = (args[0], tree_map(_index_by_tensor, args[1], is_leaf=lambda x: isinstance(x, list)), *args[2:])
        if name == "cuda":
            return args[0].to(CUDA)
        if name == "pin_memory":
            if isinstance(args[0], DeviceTensor):
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            return args[0].clone()
        if name in ("tensor", "as_tensor") and _is_cuda(kwargs.get("device")):  # which go past the modes
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(CUDA)
        if kwargs.get("pin_memory") and not _is_cuda(kwargs.get("device")):
            kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        before, RUNNER.wants_meta = RUNNER.wants_meta, any(_is_on("meta", x) for x in [*args, *kwargs.values()])
        try:
            return func(*args, **kwargs)
        finally:
            RUNNER.wants_meta = before


_FROM_MEMORY = ("tolist", "numpy", "__array__")


def _unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_on(kind: str, x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == kind) or (isinstance(x, str) and x == kind)


def _name_index(x: Any) -> Any:
    is_bare = (isinstance(x, torch.device) and x.type == "cuda" and x.index is None) or (
        isinstance(x, str) and x == "cuda"
    )
    return CUDA if is_bare else x


def _index_by_tensor(x: Any) -> Any:
    return torch.tensor(x) if isinstance(x, list) else x


def _is_plain_copy(x: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("dtype") in (None, x.dtype) and kwargs.get("memory_format") in (None, torch.preserve_format)


def _wrap_outputs(given: Any, out: Any) -> Any:
    """Wrap results; what an operation changed in place and return back stays the tensor that it was given."""
    known = {id(x.inner): x for x in tree_flatten(given)[0] if isinstance(x, DeviceTensor)}

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        found = known.get(id(x))
        return DeviceTensor(x) if found is None else found

    return tree_map(wrap, out)


def _check_devices(func: Any, args: tuple[Any, ...], flat: Sequence[Any]) -> None:
    name = func._schema.name
    if name in _ACROSS_DEVICES:
        return
    if name in _INDEXING and isinstance(args[0], DeviceTensor):
        flat = [args[0], *tree_flatten(args[2:])[0]]
    for x in flat:
        if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor):
            if x.device.type == "meta":
                raise RuntimeError(f"the simulation lost the numbers of an operand of {name}")
            if x.device.type == "cpu" and (x.ndim > 0 or name.startswith(_NO_CPU_SCALARS)):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"cuda:0 and cpu! ({name})"
                )


def _check_generator(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse numbers of one device from another's generator; operations know generators by their memory alone."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    is_there = any(isinstance(x, DeviceTensor) for x in [*args[:1], kwargs.get("out")])
    wanted = "cuda" if is_there or _is_cuda(kwargs.get("device")) else "cpu"
    if generator.device.type != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")
