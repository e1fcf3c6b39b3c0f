"""Reads rows in threads of their own, ahead of the networks, and hands their inputs on in the order of the rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from queue import Empty, Full, Queue

import numpy as np

from echoshift.extract.extraction_plan import ExtractionPlan, ShardWork
from echoshift.extract.open_media import OpenMedia
from echoshift.extract.row_reading import read_row
from echoshift.extract.shard_inputs import RowEnd, RowFailure, ShardInput, describe_failure
from echoshift.pipeline.errors import MediaTimeoutError
from echoshift.pipeline.segments import Segment

N_INPUTS_AHEAD = 2
_POLL_S = 0.2


class RowReaders:
    """Reads the rows of a shard with some threads; each reads one row at a time and waits when it is far ahead.

    A row whose next input takes longer than the time limit fails, and its thread, which can't be stopped from outside,
    is left behind and replaced. Rows that every store keeps aren't read. Use as a context manager, so that threads end
    when the shard does.
    """

    def __init__(self, plan: ExtractionPlan, work: ShardWork, n_readers: int) -> None:
        self._plan = plan
        self._work = work
        self._kept = {path: frozenset(rows) for path, rows in work.task.kept_rows.items()}
        self._timeout_s = plan.options.segment_timeout_s
        self._rows: list[tuple[int, Segment]] = [
            (row, segment)
            for row, segment in enumerate(work.segments, start=work.task.shard.start_row)
            if segment is not None and self._list_paths(row)
        ]
        self._queues = {row: Queue[ShardInput | BaseException](N_INPUTS_AHEAD) for row, _ in self._rows}
        self._next = iter(self._rows)
        self._lock = threading.Lock()
        self._given_up: set[int] = set()
        self._is_closed = threading.Event()
        self._n_readers = max(1, min(n_readers, len(self._rows)))

    def __enter__(self) -> RowReaders:
        for _ in range(self._n_readers):
            self._start_thread()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_closed.set()

    def __iter__(self) -> Iterator[ShardInput]:
        for row, segment in self._rows:
            queue = self._queues[row]
            while True:
                try:
                    item = queue.get(timeout=self._timeout_s)
                except Empty:
                    yield from self._give_up(row, segment)
                    break
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, RowEnd):
                    break
            del self._queues[row]

    def _give_up(self, row: int, segment: Segment) -> Iterator[ShardInput]:
        self._given_up.add(row)
        self._start_thread()
        error = MediaTimeoutError(
            f"reading video {segment.video_id} gave nothing for {self._timeout_s:g} s; the decoder hangs on it, or the "
            f"disk is slow: raise --segment-timeout, or fetch the video again"
        )
        yield RowFailure(self._list_paths(row), row, describe_failure(segment, error))
        yield RowEnd(row)

    def _start_thread(self) -> None:
        # A daemon: a decoder that hangs for ever must not keep the process from ending.
        threading.Thread(target=self._read_rows, name="row-reader", daemon=True).start()

    def _read_rows(self) -> None:
        with OpenMedia(self._plan.media_root, self._plan.media_layout) as media:
            while not self._is_closed.is_set():
                with self._lock:
                    row, segment = next(self._next, (-1, None))
                if segment is None:
                    return
                queue = self._queues[row]
                try:
                    targets = [self._plan.targets[path] for path in self._list_paths(row)]
                    for item in read_row(media, row, segment, targets, self._digests_of(row)):
                        if not self._put(queue, row, item):
                            return
                except BaseException as error:  # noqa: BLE001  raised again in the thread that waits for the row
                    self._put(queue, row, error)
                    return

    def _list_paths(self, row: int) -> tuple[str, ...]:
        """List the stores that need a row: those that don't keep it."""
        return tuple(path for path in self._work.task.store_paths if row not in self._kept.get(path, ()))

    def _digests_of(self, row: int) -> Mapping[str, np.ndarray]:
        i = row - self._work.task.shard.start_row
        return {path: digests[i] for path, digests in self._work.digests.items()}

    def _put(self, queue: Queue[ShardInput | BaseException], row: int, item: ShardInput | BaseException) -> bool:
        """Hand an input on once there is room; False when nobody waits for it any more."""
        while not self._is_closed.is_set() and row not in self._given_up:
            try:
                queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False


def choose_n_readers(device_type: str, n_cores: int) -> int:
    """Return 1 reader on a CPU, whose cores the networks need, and up to 8 where a GPU waits for pictures."""
    return max(1, min(8, n_cores // 2)) if device_type == "cuda" else 1
