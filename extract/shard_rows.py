"""Collects one store's rows of a shard as they come out of the network, and writes each chunk once it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from echoshift.extract.extraction_plan import ShardWork
from echoshift.extract.kept_rows import KeptRows
from echoshift.extract.output_writer import OutputWriter
from echoshift.pipeline.errors import MediaError
from echoshift.pipeline.store.interface import Failure, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, FAILED, PENDING


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows and entries of one chunk, within the shard and the array."""

    row: int
    stop_row: int
    clip: int
    stop_clip: int


class ShardRows:
    """The unfinished chunks of a store's shard and the index of its rows.

    A chunk is written as soon as nothing in it is awaited any more, so that a long row takes no more memory than a few
    chunks. Rows that the task keeps are carried over. Entry means a place on the second axis: a clip, or a view or crop
    of one.
    """

    def __init__(self, store: FeatureStore, work: ShardWork, writer: OutputWriter) -> None:
        shard = work.task.shard
        self._store = store
        self._video_ids = ["" if segment is None else segment.video_id for segment in work.segments]
        self._shard = shard
        self._writer = writer
        n, k = shard.n_rows, store.layout.n_clips
        self._times = np.full((n, k, 2), np.nan)
        self._frames = np.full((n, k, 2), -1, dtype=np.int64)
        self._n_valid = np.zeros(n, dtype=np.int32)
        self._state = np.full(n, PENDING, dtype=np.uint8)
        self._has_audio = np.zeros(n, dtype=np.uint8)
        self._loudness = np.full(n, -np.inf, dtype=np.float32)
        self._digests = work.digests[store.path]
        self._kept = KeptRows(store, shard, work.task.kept_rows.get(store.path, ()))
        self._n_valid[:] = self._kept.n_valid
        self._is_awaited = np.tile(~self._kept.is_kept[:, None], k)
        self._failures: dict[int, Failure] = {}
        self._chunks: dict[tuple[str, int, int], np.ndarray] = {}
        self._written: set[tuple[str, int, int]] = set()
        self._chunk_shapes = {output.name: store.get_output_chunks(output.name) for output in store.spec.outputs}
        self._clip_shapes = {output.name: output.shape for output in store.spec.outputs}

    def start_row(self, row: int, times: np.ndarray, frames: np.ndarray) -> None:
        """Note what a row's entries cover, [n, 2] each; entries beyond n don't exist and aren't awaited."""
        i, k = row - self._shard.start_row, len(times)
        self._times[i, :k], self._frames[i, :k], self._n_valid[i] = times, frames, k
        self._is_awaited[i, k:] = False
        self._write_complete(row)

    def end_sound(self, row: int, has_audio: bool, loudness_dbfs: float) -> None:
        """Note how loud a row is; one without sound is complete, with NaN for features."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        self._has_audio[i], self._loudness[i] = has_audio, loudness_dbfs
        if not has_audio:
            for name in self._chunk_shapes:
                for block in self._blocks_of(name, row):
                    n_here = max(0, min(int(self._n_valid[i]), block.stop_clip) - block.clip)
                    self._chunk(name, block)[row - block.row, :n_here] = np.nan
            self._is_awaited[i] = False
            self._write_complete(row)

    def put(self, row: int, entry: int, features: dict[str, np.ndarray]) -> None:
        """Take one entry's outputs, float32; a value that the store's dtype can't hold fails the row."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        for name, values in features.items():
            block = self._block(name, row, entry)
            place = self._chunk(name, block)[row - block.row, entry - block.clip]
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
        if i in self._failures or self._kept.is_kept[i]:
            return
        self._failures[i] = failure
        self._times[i], self._frames[i], self._n_valid[i] = np.nan, -1, 0
        self._has_audio[i], self._loudness[i] = 0, -np.inf
        self._is_awaited[i] = False
        for name in self._chunk_shapes:
            for block in self._blocks_of(name, row):
                if (name, block.row, block.clip) in self._written:
                    self._take_back(name, block)
                if (name, block.row, block.clip) in self._chunks:
                    self._chunk(name, block)[row - block.row] = 0
        self._write_complete(row)

    def fail_for(self, row: int, error: MediaError) -> None:
        """Make a row failed because of an error that came up while it was computed."""
        self._fail_own(row, type(error).__name__, str(error), retryable=error.retryable)

    def _fail_own(self, row: int, exception: str, reason: str, *, retryable: bool) -> None:
        video_id = self._video_ids[row - self._shard.start_row]
        self.fail(row, Failure(self._store.segment_ids[row], video_id, exception, reason, retryable))

    def skip(self, row: int) -> None:
        """Note that a row has no segment: it stays pending and holds zeros, unless it is kept."""
        if self._kept.is_kept[row - self._shard.start_row]:
            return
        self._is_awaited[row - self._shard.start_row] = False
        self._write_complete(row)

    def finish(self) -> ShardIndex:
        """Return the shard's index; rows without a segment stay pending. Everything is written before it returns."""
        assert not self._chunks, "a chunk is incomplete at the shard's end"
        self._writer.wait()
        for i in range(self._shard.n_rows):
            if i in self._failures:
                self._state[i] = FAILED
            elif self._n_valid[i] > 0:
                self._state[i] = DONE
        sound = self._store.spec.audio is not None
        index = ShardIndex(
            times=self._times,
            frames=self._frames,
            n_valid=self._n_valid,
            digest=np.where((self._state == PENDING)[:, None], 0, self._digests).astype(np.uint8),
            state=self._state,
            has_audio=self._has_audio if sound else None,
            loudness_dbfs=self._loudness if sound else None,
            failures=tuple(self._failures.values()),
        )
        self._kept.fill_index(index)
        return index

    def _block(self, name: str, row: int, entry: int) -> _Block:
        n_rows, n_clips = self._chunk_shapes[name]
        first_row, first_clip = row - row % n_rows, entry - entry % n_clips
        stop_row = min(first_row + n_rows, self._shard.stop_row)
        return _Block(first_row, stop_row, first_clip, min(first_clip + n_clips, self._is_awaited.shape[1]))

    def _blocks_of(self, name: str, row: int) -> Iterator[_Block]:
        for clip in range(0, self._is_awaited.shape[1], self._chunk_shapes[name][1]):
            yield self._block(name, row, clip)

    def _chunk(self, name: str, block: _Block) -> np.ndarray:
        key = (name, block.row, block.clip)
        if key not in self._chunks:
            shape = (block.stop_row - block.row, block.stop_clip - block.clip, *self._clip_shapes[name])
            self._chunks[key] = np.zeros(shape, dtype=self._store.spec.dtype)
            if self._kept.is_kept.any():
                self._writer.wait()  # HDF5 opens a file for reading only where it isn't open for writing
                self._kept.fill_chunk(name, block.row, block.clip, self._chunks[key])
        return self._chunks[key]

    def _take_back(self, name: str, block: _Block) -> None:
        """Read a chunk that was written already, since one of its rows failed later."""
        self._writer.wait()
        key = (name, block.row, block.clip)
        rows = self._store.read_outputs(name, block.row, block.stop_row, block.clip, block.stop_clip)
        self._chunks[key] = np.array(rows)
        self._written.discard(key)

    def _write_complete(self, row: int, entry: int | None = None) -> None:
        """Write the chunks of a row (those of one entry) in which nothing is awaited any more."""
        for name in self._chunk_shapes:
            blocks = self._blocks_of(name, row) if entry is None else (self._block(name, row, entry),)
            for block in blocks:
                first = self._shard.start_row
                area = (slice(block.row - first, block.stop_row - first), slice(block.clip, block.stop_clip))
                key = (name, block.row, block.clip)
                if self._is_awaited[area].any() or key in self._written:
                    continue
                if block.clip and not (self._n_valid[area[0]] > block.clip).any():
                    self._chunks.pop(key, None)
                    self._store.clear_outputs(name, block.row, block.stop_row, block.clip, block.stop_clip)
                else:
                    self._writer.write(self._store, name, block.row, block.clip, self._chunk(name, block))
                    del self._chunks[key]
                self._written.add(key)
