"""Carries rows of a shard that stay as they are over from the store: their index, and their features by the chunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import ROW_ARRAYS, Shard


class KeptRows:
    """Knows which rows of a store's shard are done and stay so, and reads what the store holds of them.

    Nothing of their features stays in memory: a chunk that they share with rows that are computed is filled when it is
    begun, and a chunk that holds no other rows is never written.
    """

    def __init__(self, store: FeatureStore, shard: Shard, rows: Sequence[int]) -> None:
        self._store = store
        self._shard = shard
        self.is_kept = np.zeros(shard.n_rows, dtype=bool)
        self.is_kept[np.asarray(rows, np.int64) - shard.start_row] = True
        self.n_valid = np.zeros(shard.n_rows, dtype=np.int32)
        if len(rows):
            n_valid = store.read_array("n_valid", shard.start_row, shard.stop_row)
            self.n_valid[self.is_kept] = n_valid[self.is_kept]

    def fill_chunk(self, name: str, start_row: int, start_clip: int, values: np.ndarray) -> None:
        """Put the kept rows' features into a chunk of an output, [row, clip, …], that begins at a row and a clip."""
        first = start_row - self._shard.start_row
        here = self.is_kept[first : first + len(values)] & (self.n_valid[first : first + len(values)] > start_clip)
        if here.any():
            stop_row, stop_clip = start_row + values.shape[0], start_clip + values.shape[1]
            values[here] = self._store.read_outputs(name, start_row, stop_row, start_clip, stop_clip)[here]

    def fill_index(self, index: ShardIndex) -> None:
        """Put what the store says of the kept rows into the arrays of a shard's index, in place."""
        if not self.is_kept.any():
            return
        for name in ROW_ARRAYS:
            values = getattr(index, name)
            if values is not None:
                stored = self._store.read_array(name, self._shard.start_row, self._shard.stop_row)
                values[self.is_kept] = stored[self.is_kept]
        # A store whose clip axis has grown holds 0 where its older rows have no clip.
        is_absent = self.is_kept[:, None] & (np.arange(index.times.shape[1]) >= index.n_valid[:, None])
        index.times[is_absent], index.frames[is_absent] = np.nan, -1
