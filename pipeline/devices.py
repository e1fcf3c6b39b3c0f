"""Devices: choosing one, and giving freed memory back."""

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING

from echoshift.pipeline.errors import SpecError

if TYPE_CHECKING:
    import torch


def resolve_device(device: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:n into a device; raises SpecError when there is no such GPU."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:n") from error
    if chosen.type not in ("cpu", "cuda"):
        raise SpecError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:n")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"{device} asked for, but torch finds {torch.cuda.device_count()} GPUs; use --device cpu")
    return chosen


def describe_device(device: torch.device) -> str:
    """Name a device in words: `cpu`, or the GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# mallopt's parameters (malloc.h), and what glibc arrives at by itself in a process that frees large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DYNAMIC_MMAP_THRESHOLD, _DYNAMIC_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 32 << 20, 64 << 20, 65536
_NEVER_TRIM = -1


def keep_freed_memory(is_kept: bool = True) -> bool:
    """Tell glibc to keep freed memory, or to go back to its habits; say whether it does (no glibc: False).

    By itself glibc maps every block above 32 MB again and unmaps it when it is freed, so that each activation's pages
    are faulted in and zeroed again: up to two thirds of the time of a convolution whose output is large. The process
    then keeps its peak and doesn't grow beyond it. A process that runs networks on the CPU calls it once, at its start.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (
        ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM))
        if is_kept
        else (
            (_M_MMAP_MAX, _DEFAULT_MMAP_MAX),
            (_M_MMAP_THRESHOLD, _DYNAMIC_MMAP_THRESHOLD),
            (_M_TRIM_THRESHOLD, _DYNAMIC_TRIM_THRESHOLD),
        )
    )
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)
