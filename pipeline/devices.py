"""Which device torch computes on."""

from __future__ import annotations

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
