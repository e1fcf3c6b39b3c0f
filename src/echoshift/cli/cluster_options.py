"""Turns the options about workers into the request for a cluster, and a SIGTERM into the end that Ctrl-C makes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from echoshift.pipeline.errors import SpecError

if TYPE_CHECKING:
    from types import FrameType

    from echoshift.pipeline.dask import ClusterRequest


def plan_cluster(
    workers: int | None, scheduler: str | None, *, slurm: bool, slurm_options: Sequence[str], device: str
) -> ClusterRequest | None:
    """Decide who computes: None for this process; raises SpecError when options contradict each other."""
    from echoshift.pipeline.dask import ClusterRequest

    if slurm_options and not slurm:
        raise SpecError("--slurm-option goes with --slurm")
    if scheduler is not None:
        if workers is not None or slurm:
            raise SpecError("--scheduler uses the workers that are there; leave out --workers and --slurm")
        return ClusterRequest("scheduler", address=scheduler)
    if slurm:
        if workers is None:
            raise SpecError("--slurm needs --workers, the number of workers to ask SLURM for")
        return ClusterRequest("slurm", workers, slurm_options=parse_slurm_options(slurm_options))
    if workers is None:
        return None
    return ClusterRequest("local", workers, gpus=list_gpus(device))


def parse_slurm_options(pairs: Sequence[str]) -> dict[str, object]:
    """Parse KEY=VALUE; values are read as Dask reads its environment: `cores=8`, `job_extra_directives=["-G1"]`."""
    from dask.config import interpret_value

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise SpecError(f"--slurm-option {pair!r} is not KEY=VALUE")
        options[key] = interpret_value(value)
    return options


def list_gpus(device: str) -> tuple[str, ...]:
    """List what workers may have in CUDA_VISIBLE_DEVICES: this process' GPUs for auto and cuda, () for any other."""
    if device not in ("auto", "cuda"):
        return ()
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    n_gpus = torch.cuda.device_count()
    return tuple(visible[:n_gpus]) if visible else tuple(map(str, range(n_gpus)))


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Make SIGTERM, which SLURM and shutdowns send, end a run like Ctrl-C: what is open is closed, exit code 130."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
