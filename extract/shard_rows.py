"""Collects one store's rows of a shard as they come out of the network, and writes each chunk once it is complete."""

from __future__ import annotations

import numpy as np

from extract.shard_inputs import RowFacts
from pipeline.store.interface import Failure, FeatureStore, ShardIndex
from pipeline.store.layout import DONE, FAILED, PENDING, Shard, plan_output_array


class ShardRows:
    """Holds the unfinished chunks of a store's shard and the index of its rows."""

    def __init__(self, store: FeatureStore, shard: Shard, digests: np.ndarray) -> None:
        self._store = store
        self._shard = shard
        n, k = shard.n_rows, store.layout.n_clips
        self._times = np.full((n, k, 2), np.nan)
        self._frames = np.full((n, k, 2), -1, dtype=np.int64)
        self._n_valid = np.zeros(n, dtype=np.int32)
        self._state = np.full(n, PENDING, dtype=np.uint8)
        self._has_audio = np.zeros(n, dtype=np.uint8)
        self._loudness = np.full(n, -np.inf, dtype=np.float32)
        self._digests = digests
        self._n_received = np.zeros(n, dtype=np.int64)
        self._settled = np.zeros(n, dtype=bool)
        self._failures: dict[int, Failure] = {}
        self._chunks: dict[tuple[str, int], np.ndarray] = {}
        windows = store.spec.clip.sampling == "windows"
        self._layouts = {
            output.name: plan_output_array(output.name, output.shape, store.spec.dtype, store.layout, windows=windows)
            for output in store.spec.outputs
        }

    def start_row(self, facts: RowFacts) -> None:
        """Notes what a row covers; a row without sound is complete at once, with NaN for features."""
        i, k = facts.row - self._shard.start_row, len(facts.times)
        self._times[i, :k], self._frames[i, :k], self._n_valid[i] = facts.times, facts.frames, k
        self._has_audio[i] = facts.has_audio
        if facts.loudness_dbfs is not None:
            self._loudness[i] = facts.loudness_dbfs
        if not facts.has_audio:
            for name in self._layouts:
                self._rows_of_chunk(name, facts.row)[0][:k] = np.nan
            self._n_received[i] = k

    def put(self, row: int, clip: int, features: dict[str, np.ndarray]) -> None:
        """Takes one clip's outputs, float32; a value that the store's dtype can't hold fails the row."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        for name, values in features.items():
            place = self._rows_of_chunk(name, row)[0]
            with np.errstate(over="ignore"):
                place[clip] = values
            if not np.isfinite(place[clip]).all():
                largest = float(np.abs(values).max())
                reason = (
                    f"{name} of clip {clip} is not finite in {place.dtype} (largest magnitude {largest:.6g}); "
                    f"extract with --dtype float32, or check the weights"
                )
                self.fail(row, Failure(self._store.segment_ids[row], "", "NonFiniteFeature", reason, False))
                return
        self._n_received[i] += 1

    def fail(self, row: int, failure: Failure) -> None:
        """Makes a row failed; whatever it got before is wiped."""
        i = row - self._shard.start_row
        self._failures[i] = failure
        self._times[i], self._frames[i], self._n_valid[i] = np.nan, -1, 0
        self._has_audio[i], self._loudness[i] = 0, -np.inf
        for name in self._layouts:
            self._rows_of_chunk(name, row)[0][:] = 0

    def write_complete_chunks(self, settled_row: int) -> None:
        """Notes that a row is settled, and writes every chunk all of whose rows are."""
        self._settled[settled_row - self._shard.start_row] = True
        for name in self._layouts:
            values, first, stop = self._rows_of_chunk(name, settled_row)[1:]
            if self._settled[first - self._shard.start_row : stop - self._shard.start_row].all():
                self._store.write_outputs(name, first, values)
                del self._chunks[(name, first)]

    def is_complete(self, row: int) -> bool:
        """Says whether a row has failed or has all its clips."""
        i = row - self._shard.start_row
        return i in self._failures or (self._n_valid[i] > 0 and bool(self._n_received[i] == self._n_valid[i]))

    def finish(self) -> ShardIndex:
        """Gives the shard's index; rows without a segment stay pending."""
        for i in range(self._shard.n_rows):
            if i in self._failures:
                self._state[i] = FAILED
            elif self.is_complete(self._shard.start_row + i):
                self._state[i] = DONE
        sound = self._store.spec.audio is not None
        return ShardIndex(
            times=self._times,
            frames=self._frames,
            n_valid=self._n_valid,
            digest=np.where((self._state == PENDING)[:, None], 0, self._digests).astype(np.uint8),
            state=self._state,
            has_audio=self._has_audio if sound else None,
            loudness_dbfs=self._loudness if sound else None,
            failures=tuple(self._failures.values()),
        )

    def _rows_of_chunk(self, name: str, row: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Finds a row's place in its chunk's buffer: the row, the buffer, and its first and last-but-one row."""
        layout = self._layouts[name]
        first = row - row % layout.chunks[0]
        stop = min(first + layout.chunks[0], self._shard.stop_row)
        if (name, first) not in self._chunks:
            self._chunks[(name, first)] = np.zeros((stop - first, *layout.shape[1:]), dtype=layout.dtype)
        chunk = self._chunks[(name, first)]
        return chunk[row - first], chunk, first, stop
