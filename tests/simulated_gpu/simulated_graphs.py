"""Simulates CUDA graphs: capturing changes nothing, replaying runs what was captured on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from simulated_tensors import RUNNER, DeviceTensor
from torch.utils._pytree import tree_flatten

_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}
_BATCH_NORMS = {"aten::native_batch_norm", "aten::_batch_norm_with_update"}  # whose schemas don't say what they write
_RUNNING = {"running_mean", "running_var"}


class SimulatedGraph:
    """A list of operations with the memory that each reads and writes."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.n_replays = 0

    def replay(self) -> None:
        """Run the operations again."""
        self.n_replays += 1
        for func, args, kwargs, out in self._calls:
            given = {_find_memory(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
            for value, place in zip(tree_flatten(func(*args, **kwargs))[0], tree_flatten(out)[0], strict=True):
                if isinstance(place, DeviceTensor) and _find_memory(place.inner) not in given:
                    place.inner.copy_(value)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what runs inside; whatever it wrote is put back at the end, since capturing runs nothing."""
        before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: str) -> None:
            name = func._schema.name
            flat = tree_flatten((args, kwargs))[0]
            has_mask = name.startswith("aten::index") and any(
                isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_flatten(args[1:2])[0]
            )
            from_cpu = name in ("aten::copy_", "aten::_to_copy") and any(
                isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) for x in flat
            )
            if name in _WAITING or has_mask or from_cpu or target == "cpu":
                raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
            for i, argument in enumerate(func._schema.arguments):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                if writes or (name in _BATCH_NORMS and argument.name in _RUNNING):
                    for x in tree_flatten(value)[0]:
                        if isinstance(x, DeviceTensor):
                            storage = x.inner.untyped_storage()
                            if storage.data_ptr() not in before:
                                before[storage.data_ptr()] = (storage, storage.clone())

        RUNNER.before = check
        RUNNER.recorder = lambda *call: self._calls.append(call)
        try:
            yield
        finally:
            RUNNER.before = RUNNER.recorder = None
        for storage, values in before.values():
            storage.copy_(values)


def _find_memory(x: torch.Tensor) -> int:
    """Return where a tensor's memory begins; views have the same place as what they are views of."""
    return x.untyped_storage().data_ptr()
