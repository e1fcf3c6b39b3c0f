"""Writes finished chunks in a thread of its own, so that writing overlaps computing."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from echoshift.pipeline.store.interface import FeatureStore

N_CHUNKS_AHEAD = 4


class OutputWriter:
    """Writes chunks in the order in which they come; at most N_CHUNKS_AHEAD wait, then `write` does.

    An error of the disk is raised by one of the next calls. Use as a context manager.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="output-writer")
        self._under_way: deque[Future[None]] = deque()

    def write(self, store: FeatureStore, name: str, row: int, clip: int, values: np.ndarray) -> None:
        """Hand a chunk over, which the caller no longer changes."""
        while len(self._under_way) >= N_CHUNKS_AHEAD:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(store.write_outputs, name, row, values, clip))

    def wait(self) -> None:
        """Wait until everything handed over is written."""
        while self._under_way:
            self._under_way.popleft().result()

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
