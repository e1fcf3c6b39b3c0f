"""Holds what both backends do alike when they read: find rows, refuse those that are not done, compare digests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE, PENDING, STATE_NAMES, Shard, plan_row_blocks

N_BLOCK_BYTES = 32 * 2**20


def index_segments(store: FeatureStore) -> dict[str, int]:
    """Map a segment's id to its row."""
    return {segment_id: row for row, segment_id in enumerate(store.segment_ids)}


class RowFinder:
    """Finds the rows of many ids at once: a dict's lookups each wait for memory, NumPy's overlap.

    A table of one row for each remainder of Python's 64-bit hashes of the ids; the few ids whose place another has
    are in a dict. The hashes of a store's ids are compared when it is made (the dict holds them all should two agree);
    that an id which is not there has the hash of one that is has a chance of 1 in 10**13 in a store of a million.
    """

    def __init__(self, segment_ids: Sequence[str]) -> None:
        self._ids = segment_ids
        n = len(segment_ids)
        self._hashes = np.fromiter(map(hash, segment_ids), np.int64, n)
        n_places = 2 ** max(4 * n, 1).bit_length()
        self._mask = n_places - 1
        places = self._hashes & self._mask
        # An empty place names row 0, whose hash can't be that of an id with this place.
        self._row_at = np.zeros(n_places, np.int32)
        self._row_at[places] = np.arange(n)
        self._dict_alone = n == 0 or len(np.unique(self._hashes)) < n
        others = np.arange(n) if self._dict_alone else np.flatnonzero(self._row_at[places] != np.arange(n))
        self._row_of = {segment_ids[row]: row for row in others.tolist()}

    def __reduce__(self) -> tuple[type[RowFinder], tuple[Sequence[str]]]:
        return RowFinder, (self._ids,)  # another process hashes otherwise

    def find(self, path: str, segment_ids: Sequence[str]) -> np.ndarray:
        """Find the rows of segments, int64 [n]; raises StoreError naming the first that is absent from `path`."""
        if self._dict_alone:
            rows, others = np.zeros(len(segment_ids), np.int64), list(range(len(segment_ids)))
        else:
            hashes = np.fromiter(map(hash, segment_ids), np.int64, len(segment_ids))
            rows = self._row_at[hashes & self._mask].astype(np.int64)
            others = np.flatnonzero(self._hashes[rows] != hashes).tolist()
        for i in others:
            row = self._row_of.get(segment_ids[i])
            if row is None:
                raise StoreError(f"segment {segment_ids[i]} is not in {path}; extract the manifest that holds it")
            rows[i] = row
        return rows


def require_done(path: str, segment_ids: Iterable[str], states: np.ndarray) -> None:
    """Raise StoreError naming the first segment that is not done; `states` are those of its row, uint8 [n]."""
    refused = states != DONE
    if refused.any():
        first = int(np.argmax(refused))
        segment_id = next(s for i, s in enumerate(segment_ids) if i == first)
        raise StoreError(
            f"segment {segment_id} is {STATE_NAMES[int(states[first])]} in {path}; `echoshift store explain` says why"
        )


def require_clips(path: str, clips: np.ndarray, n_clips: int) -> None:
    """Raise StoreError unless all clips, int64 [n], are among the `n_clips` that a row has at most."""
    outside = (clips < 0) | (clips >= n_clips)
    if outside.any():
        raise StoreError(f"clip {clips[outside][0]} is asked for, {path} holds {n_clips} a segment")


def find_missing(store: FeatureStore, digests: np.ndarray) -> np.ndarray:
    """Describe for each row whether it is pending, or was made from something else than `digests` says, bool [row]."""
    return np.asarray(
        (store.read_array("state") == PENDING) | (store.read_array("digest") != digests).any(axis=1), dtype=bool
    )


def plan_begun_states(shard: Shard, states: np.ndarray, kept_rows: Sequence[int]) -> np.ndarray:
    """Return the states of a shard that is begun, uint8 [n_rows]: pending but for `kept_rows`, which stay done.

    Raises StoreError for a row that is to be kept and isn't done.
    """
    begun = np.full_like(states, PENDING)
    places = np.asarray(kept_rows, np.int64) - shard.start_row
    if (states[places] != DONE).any():
        row = int(np.asarray(kept_rows)[states[places] != DONE][0])
        raise StoreError(f"row {row} is to be kept, and isn't done; give the command again")
    begun[places] = DONE
    return begun


@dataclass(frozen=True, slots=True)
class DoneBlock:
    """A stretch of a store's done rows with the facts of the index that go with them.

    Attributes:
        rows: row numbers, int64 [n].
        values: one output, [n, clip, …], in the store's dtype.
        exists: which clips exist, bool [n, clip].
        has_sound: False where a store of sound found none, so that the values are NaN, bool [n].
    """

    rows: np.ndarray
    values: np.ndarray
    exists: np.ndarray
    has_sound: np.ndarray


@dataclass(frozen=True, slots=True)
class DoneIndex:
    """What is known of every row: done or not, clips that exist, sound or not; each [row]."""

    done: np.ndarray
    n_valid: np.ndarray
    has_sound: np.ndarray


def read_done_index(store: FeatureStore) -> DoneIndex:
    """Read a store's states, numbers of clips, and where there was sound; all True in a store of pictures."""
    done = store.read_array("state") == DONE
    has_sound = store.read_array("has_audio") == 1 if store.spec.holds_sound else np.ones(len(done), dtype=bool)
    return DoneIndex(done, store.read_array("n_valid"), has_sound)


def read_done_block(store: FeatureStore, output: str, start: int, stop: int, index: DoneIndex) -> DoneBlock:
    """Read the done rows between two rows."""
    chosen = index.done[start:stop]
    values = store.read_array(f"outputs/{output}", start, stop)
    rows = start + np.flatnonzero(chosen)
    exists = np.arange(values.shape[1])[None] < index.n_valid[rows, None]
    return DoneBlock(rows, values if chosen.all() else values[chosen], exists, index.has_sound[rows])


def iterate_done_blocks(store: FeatureStore, output: str, n_block_bytes: int = N_BLOCK_BYTES) -> Iterator[DoneBlock]:
    """Read one output of every done row, in row order, about `n_block_bytes` at a time."""
    index = read_done_index(store)
    shape = next(o.shape for o in store.spec.outputs if o.name == output)
    n_row_bytes = store.layout.n_clips * math.prod(shape) * np.dtype(store.spec.dtype).itemsize
    for start, stop in plan_row_blocks(store.layout, n_row_bytes, n_block_bytes):
        if index.done[start:stop].any():
            yield read_done_block(store, output, start, stop, index)
