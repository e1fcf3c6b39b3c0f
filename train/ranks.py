"""Joins the processes that torchrun starts: who is first, who waits, on which device each computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(hours=12)  # the others wait while the first one extracts or trains the audio classifier


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that train together; alone without torchrun."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.n_ranks > 1:
            dist.barrier()

    def average(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Average numbers over all processes, each of which gives the same names; `device` is where it computes."""
        if self.n_ranks == 1:
            return dict(values)
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return dict(zip(values, (summed / self.n_ranks).tolist(), strict=True))

    def choose_device(self, device: str) -> str:
        """Return each process its own GPU, where `auto` or `cuda` leave the choice."""
        if self.n_ranks > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return device


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, until the block ends; without torchrun this process is alone."""
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), n_ranks, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
