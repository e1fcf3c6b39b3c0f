"""Collects one store's rows of a shard as they come out of the network, and writes each chunk once it is complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from echoshift.extract.work import ShardWork
from echoshift.pipeline.errors import MediaError
from echoshift.pipeline.store.interface import Failure, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, FAILED, N_DIGEST_BYTES, PENDING, ROW_ARRAYS

N_CHUNKS_AHEAD = 4


class OutputWriter:
    """A thread that writes chunks in the order in which they come, so that writing overlaps computing.

    At most N_CHUNKS_AHEAD wait, then `write` does. An error of the disk is raised by one of the next calls. Use as a
    context manager.
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


def fail_shard(store: FeatureStore, work: ShardWork, reason: str) -> ShardIndex:
    """Make the index of a shard whose workers die: the rows that aren't kept have failed, and a retry may help."""
    index, is_kept = _begin_index(store, work)
    present = np.asarray([segment is not None for segment in work.segments]) & ~is_kept
    index.digest[present] = work.digests[store.path][present]
    index.state[present] = FAILED
    failures = tuple(
        Failure(segment.segment_id, segment.video_id, "WorkerDied", reason, True)
        for segment, failed in zip(work.segments, present.tolist(), strict=True)
        if segment is not None and failed
    )
    _fill_kept(store, work, is_kept, index)
    return replace(index, failures=failures)


def _begin_index(store: FeatureStore, work: ShardWork) -> tuple[ShardIndex, np.ndarray]:
    """Make an index whose rows are pending, and say which rows the store keeps, bool [n]."""
    shard, n_clips = work.task.shard, store.layout.n_clips
    n, has_audio = shard.n_rows, store.spec.audio is not None
    is_kept = np.zeros(n, dtype=bool)
    is_kept[np.asarray(work.task.kept_rows.get(store.path, ()), np.int64) - shard.start_row] = True
    index = ShardIndex(
        times=np.full((n, n_clips, 2), np.nan),
        frames=np.full((n, n_clips, 2), -1, dtype=np.int64),
        n_valid=np.zeros(n, dtype=np.int32),
        digest=np.zeros((n, N_DIGEST_BYTES), dtype=np.uint8),
        state=np.full(n, PENDING, dtype=np.uint8),
        has_audio=np.zeros(n, dtype=np.uint8) if has_audio else None,
        loudness_dbfs=np.full(n, -np.inf, dtype=np.float32) if has_audio else None,
    )
    return index, is_kept


def _fill_kept(store: FeatureStore, work: ShardWork, is_kept: np.ndarray, index: ShardIndex) -> None:
    """Put what the store says of the kept rows into a shard's index, in place."""
    if not is_kept.any():
        return
    for name in ROW_ARRAYS:
        values = getattr(index, name)
        if values is not None:
            values[is_kept] = store.read_array(name, work.task.shard.start_row, work.task.shard.stop_row)[is_kept]
    # A store whose clip axis has grown holds 0 where its older rows have no clip.
    is_absent = is_kept[:, None] & (np.arange(index.times.shape[1]) >= index.n_valid[:, None])
    index.times[is_absent], index.frames[is_absent] = np.nan, -1


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows and entries of one chunk of one output, within the shard and the array."""

    name: str
    row: int
    stop_row: int
    clip: int
    stop_clip: int


class ShardRows:
    """The unfinished chunks of a store's shard and the index of its rows.

    A chunk is written as soon as nothing in it is awaited any more, so that a long row takes no more memory than a few
    chunks. Rows that the task keeps are carried over by the chunk: one that they share with rows that are computed is
    filled when it is begun, and one that holds no other rows is never written. Entry means a place on the second axis:
    a clip, or a view or crop of one.
    """

    def __init__(self, store: FeatureStore, work: ShardWork, writer: OutputWriter) -> None:
        self._store = store
        self._work = work
        self._shard = work.task.shard
        self._writer = writer
        self._index, self._is_kept = _begin_index(store, work)
        if self._is_kept.any():
            n_valid = store.read_array("n_valid", self._shard.start_row, self._shard.stop_row)
            self._index.n_valid[self._is_kept] = n_valid[self._is_kept]
        self._is_awaited = np.tile(~self._is_kept[:, None], store.layout.n_clips)
        self._failures: dict[int, Failure] = {}
        self._chunks: dict[_Block, np.ndarray] = {}
        self._written: set[_Block] = set()
        self._chunk_shapes = {output.name: store.get_output_chunks(output.name) for output in store.spec.outputs}
        self._clip_shapes = {output.name: output.shape for output in store.spec.outputs}

    def start_row(self, row: int, times: np.ndarray, frames: np.ndarray) -> None:
        """Note what a row's entries cover, [n, 2] each; entries beyond n don't exist and aren't awaited."""
        i, k = row - self._shard.start_row, len(times)
        self._index.times[i, :k], self._index.frames[i, :k], self._index.n_valid[i] = times, frames, k
        self._is_awaited[i, k:] = False
        self._write_complete(row)

    def end_audio(self, row: int, has_audio: bool, loudness_dbfs: float) -> None:
        """Note how loud a row is; one without audio is complete, with NaN for features."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        assert self._index.has_audio is not None and self._index.loudness_dbfs is not None, "a store of audio"
        self._index.has_audio[i], self._index.loudness_dbfs[i] = has_audio, loudness_dbfs
        if not has_audio:
            for block in self._blocks_of(row):
                n_here = max(0, min(int(self._index.n_valid[i]), block.stop_clip) - block.clip)
                self._chunk(block)[row - block.row, :n_here] = np.nan
            self._is_awaited[i] = False
            self._write_complete(row)

    def put(self, row: int, entry: int, features: dict[str, np.ndarray]) -> None:
        """Take one entry's outputs, float32; a value that the store's dtype can't hold fails the row."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        for name, values in features.items():
            block = self._block(name, row, entry)
            place = self._chunk(block)[row - block.row, entry - block.clip]
            with np.errstate(over="ignore"):
                place[...] = values
            if not np.isfinite(place).all():
                largest = float(np.abs(values).max())
                reason = (
                    f"{name} of clip {entry} is not finite in {place.dtype} (largest magnitude {largest:.6g}); "
                    f"extract with --dtype float32, or check the weights"
                )
                self._fail_own(row, "NonFiniteFeature", reason, retryable=False)
                return
        self._is_awaited[i, entry] = False
        self._write_complete(row, entry)

    def fail(self, row: int, failure: Failure) -> None:
        """Make a row failed; whatever it got before is wiped. A row that is kept was read for other stores' sake."""
        i = row - self._shard.start_row
        if i in self._failures or self._is_kept[i]:
            return
        self._failures[i] = failure
        self._index.times[i], self._index.frames[i], self._index.n_valid[i] = np.nan, -1, 0
        if self._index.has_audio is not None and self._index.loudness_dbfs is not None:
            self._index.has_audio[i], self._index.loudness_dbfs[i] = 0, -np.inf
        self._is_awaited[i] = False
        for block in self._blocks_of(row):
            if block in self._written:  # a chunk that was complete before the row failed
                self._writer.wait()
                rows = self._store.read_outputs(block.name, block.row, block.stop_row, block.clip, block.stop_clip)
                self._chunks[block] = np.array(rows)
                self._written.discard(block)
            if block in self._chunks:
                self._chunks[block][row - block.row] = 0
        self._write_complete(row)

    def fail_for(self, row: int, error: MediaError) -> None:
        """Make a row failed because of an error that came up while it was computed."""
        self._fail_own(row, type(error).__name__, str(error), retryable=error.retryable)

    def _fail_own(self, row: int, exception: str, reason: str, *, retryable: bool) -> None:
        segment = self._work.segments[row - self._shard.start_row]
        video_id = "" if segment is None else segment.video_id
        self.fail(row, Failure(self._store.segment_ids[row], video_id, exception, reason, retryable))

    def skip(self, row: int) -> None:
        """Note that a row has no segment: it stays pending and holds zeros, unless it is kept."""
        if not self._is_kept[row - self._shard.start_row]:
            self._is_awaited[row - self._shard.start_row] = False
            self._write_complete(row)

    def finish(self) -> ShardIndex:
        """Return the shard's index; rows without a segment stay pending. Everything is written before it returns."""
        assert not self._chunks, "a chunk is incomplete at the shard's end"
        self._writer.wait()
        state, digests = self._index.state, self._work.digests[self._store.path]
        state[self._index.n_valid > 0] = DONE
        state[sorted(self._failures)] = FAILED
        self._index.digest[state != PENDING] = digests[state != PENDING]
        _fill_kept(self._store, self._work, self._is_kept, self._index)
        return replace(self._index, failures=tuple(self._failures.values()))

    def _block(self, name: str, row: int, entry: int) -> _Block:
        n_rows, n_clips = self._chunk_shapes[name]
        first_row, first_clip = row - row % n_rows, entry - entry % n_clips
        stop_row = min(first_row + n_rows, self._shard.stop_row)
        return _Block(name, first_row, stop_row, first_clip, min(first_clip + n_clips, self._is_awaited.shape[1]))

    def _blocks_of(self, row: int) -> Iterator[_Block]:
        for name, (_, n_clips) in self._chunk_shapes.items():
            for clip in range(0, self._is_awaited.shape[1], n_clips):
                yield self._block(name, row, clip)

    def _chunk(self, block: _Block) -> np.ndarray:
        """Return a chunk's values [row, clip, ...], begun with zeros and the features of rows that are kept."""
        if block not in self._chunks:
            shape = (block.stop_row - block.row, block.stop_clip - block.clip, *self._clip_shapes[block.name])
            values = self._chunks[block] = np.zeros(shape, dtype=self._store.spec.dtype)
            rows = slice(block.row - self._shard.start_row, block.stop_row - self._shard.start_row)
            here = self._is_kept[rows] & (self._index.n_valid[rows] > block.clip)
            if self._is_kept.any():
                self._writer.wait()  # HDF5 opens a file for reading only where it isn't open for writing
            if here.any():
                stored = self._store.read_outputs(block.name, block.row, block.stop_row, block.clip, block.stop_clip)
                values[here] = stored[here]
        return self._chunks[block]

    def _write_complete(self, row: int, entry: int | None = None) -> None:
        """Write the chunks of a row (those of one entry) in which nothing is awaited any more."""
        names = self._chunk_shapes
        for block in self._blocks_of(row) if entry is None else [self._block(name, row, entry) for name in names]:
            rows = slice(block.row - self._shard.start_row, block.stop_row - self._shard.start_row)
            if self._is_awaited[rows, block.clip : block.stop_clip].any() or block in self._written:
                continue
            if block.clip and not (self._index.n_valid[rows] > block.clip).any():
                self._chunks.pop(block, None)
                self._store.clear_outputs(block.name, block.row, block.stop_row, block.clip, block.stop_clip)
            else:
                self._writer.write(self._store, block.name, block.row, block.clip, self._chunk(block))
                del self._chunks[block]
            self._written.add(block)
