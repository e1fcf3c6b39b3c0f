"""Puts the simulated GPU in the place of torch.cuda, for a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from simulated_tensors import CUDA, RUNNER, AnyGenerator, DeviceMode, PythonMode


class _Stream:
    """A stream: everything runs in the order in which it is written."""

    def wait_stream(self, other: Any) -> None:
        """Have nothing to wait for."""

    def synchronize(self) -> None:
        RUNNER.wait()


class _Event:
    """An event; whoever waits for it has what was copied before."""

    def record(self, stream: Any = None) -> None:
        """Mark a place, which is the end of all that was sent."""

    def synchronize(self) -> None:
        RUNNER.wait()


def _open_no_grad(mode: bool) -> AbstractContextManager[None]:
    """Stand for inference mode, in which torch can't wrap views."""
    return torch.no_grad() if mode else nullcontext()


@contextmanager
def simulate_gpu() -> Iterator[None]:
    """Have one GPU, cuda:0, until the block ends, in every thread that begins in it."""
    run_thread = threading.Thread.run

    def run_with_modes(thread: threading.Thread) -> None:
        with DeviceMode(), PythonMode():
            run_thread(thread)

    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "a simulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: RUNNER.wait(),
        "manual_seed_all": lambda seed: None,  # device numbers come from the CPU's generator
        "get_rng_state": lambda device=None: torch.zeros(0, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: nullcontext(),
        "_lazy_init": lambda: None,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", AnyGenerator))
        stack.enter_context(patch.object(torch._C, "_InferenceMode", _open_no_grad))
        stack.enter_context(patch.object(threading.Thread, "run", run_with_modes))
        stack.enter_context(DeviceMode())
        stack.enter_context(PythonMode())
        yield


__all__ = ["CUDA", "RUNNER", "simulate_gpu"]
