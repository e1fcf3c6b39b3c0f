"""The interface of a feature store, and what both backends do alike when they read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import (
    DONE,
    PENDING,
    STATE_NAMES,
    Shard,
    StoreLayout,
    decode_segment_ids,
    plan_row_blocks,
)

Backend = Literal["zarr", "hdf5"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a segment has no features: the exception's name, the reason in a line, and whether a retry can help."""

    segment_id: str
    video_id: str
    exception: str
    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Everything about a shard's rows but the features, each array with one entry a row of the shard.

    Attributes:
        times: seconds each clip covers, end exclusive, float64 [n, clip, 2]; NaN where a clip doesn't exist.
        frames: first and last frame used (index in the file) or first sample and one past the last, int64
            [n, clip, 2]; -1 where a clip doesn't exist.
        n_valid: clips that exist, int32 [n].
        digest: what each row was made from, uint8 [n, 16].
        state: 1 done or 2 failed, uint8 [n].
        has_audio: 1 where audio was present, uint8 [n]; audio stores only.
        loudness_dbfs: root mean square of the samples in dB of full scale, float32 [n]; audio stores only.
        failures: one for each row whose state is 2.
    """

    times: np.ndarray
    frames: np.ndarray
    n_valid: np.ndarray
    digest: np.ndarray
    state: np.ndarray
    has_audio: np.ndarray | None = None
    loudness_dbfs: np.ndarray | None = None
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyFault:
    """One thing wrong with a store: in which array, at which segment ("" for the whole), and what."""

    array: str
    segment_id: str
    message: str


class FeatureStore(ABC):
    """Features of one FeatureSpec; rows are segments, in the order fixed when they were first planned.

    One process writes at a time (it holds `StoreLock`); any number read. A shard's data are written first, then its
    index, `state` last: whatever is killed when, a row whose state is 1 is whole.
    """

    backend: Backend

    def __init__(self, path: str, spec: FeatureSpec, layout: StoreLayout) -> None:
        self.path = path
        self.spec = spec
        self.layout = layout
        self._segment_ids: list[str] | None = None
        self._finder: RowFinder | None = None

    @property
    @abstractmethod
    def attributes(self) -> Mapping[str, Any]:
        """Attributes written when the store was created (FORMAT.md, section 2)."""

    @property
    def segment_ids(self) -> Sequence[str]:
        """The id of every row, in row order."""
        if self._segment_ids is None:
            self._segment_ids = decode_segment_ids(self.read_array("segment_id"))
        return self._segment_ids

    @abstractmethod
    def read_array(self, name: str, start_row: int = 0, stop_row: int | None = None) -> np.ndarray:
        """Read rows of any array by its name in FORMAT.md, such as `state` or `outputs/pooled`."""

    def read(self, segment_ids: Iterable[str], output: str) -> np.ndarray:
        """Read one output of the segments asked for, in their order, [n, clip, ...] in the store's dtype.

        Raises StoreError naming the first segment that is not in the store or not done.
        """
        return self._read(segment_ids, output, None)

    def read_clips(self, segment_ids: Iterable[str], output: str, clips: np.ndarray) -> np.ndarray:
        """Read one clip of each segment asked for, in their order, [n, ...]; `clips` are their numbers, int64 [n].

        Only these clips are read where the store is local. Raises as `read`, and for a clip that no row has.
        """
        outside = (clips < 0) | (clips >= self.layout.n_clips)
        if outside.any():
            raise StoreError(
                f"clip {clips[outside][0]} is asked for, {self.path} holds {self.layout.n_clips} a segment"
            )
        return self._read(segment_ids, output, clips)

    def _read(self, segment_ids: Iterable[str], output: str, clips: np.ndarray | None) -> np.ndarray:
        ids = list(segment_ids)
        if self._finder is None:
            self._finder = RowFinder(self.segment_ids)
        return self._copy_rows(output, self._finder.find(self.path, ids), ids, clips)

    @abstractmethod
    def _copy_rows(
        self, output: str, rows: np.ndarray, segment_ids: Sequence[str], clips: np.ndarray | None
    ) -> np.ndarray:
        """Copy rows of an output, or one clip of each; raises StoreError naming the first row that is not done."""

    def read_all(self, output: str) -> np.ndarray:
        """Read one output of every row, whatever its state, [row, clip, ...], every checksum of Zarr compared."""
        return self.read_array(f"outputs/{output}")

    def missing(self, digests: np.ndarray) -> np.ndarray:
        """Return whether each row is pending or stale, bool [row]; `digests` are the expected, uint8 [row, 16]."""
        stale = (self.read_array("digest") != digests).any(axis=1)
        return np.asarray((self.read_array("state") == PENDING) | stale, dtype=bool)

    @abstractmethod
    def extend(self, segment_ids: Sequence[str], n_clips: int) -> None:
        """Append rows for new segments, pending."""

    def _plan_extended(self, segment_ids: Sequence[str], n_clips: int, n_id_bytes: int) -> StoreLayout:
        if n_clips > self.layout.n_clips and self.spec.clip.sampling == "uniform":
            raise StoreError(f"{self.path} holds {self.layout.n_clips} clips a segment, not {n_clips}")
        n_rows, n_clips = len(segment_ids), max(n_clips, self.layout.n_clips)
        return replace(self.layout, n_rows=n_rows, n_clips=n_clips, n_id_bytes=n_id_bytes)

    @abstractmethod
    def get_output_chunks(self, name: str) -> tuple[int, int]:
        """Return how many rows and clips one chunk of an output holds, which a store keeps when it grows."""

    @abstractmethod
    def read_outputs(
        self, name: str, start_row: int, stop_row: int, start_clip: int = 0, stop_clip: int | None = None
    ) -> np.ndarray:
        """Read some clips of some rows of one output, whatever their state, [row, clip, ...]."""

    @abstractmethod
    def begin_shard(self, shard: Shard, kept_rows: Sequence[int] = ()) -> None:
        """Set the shard's rows to pending, so that a run killed inside it redoes them.

        `kept_rows`, numbers of done rows of the store, stay done all the while; whoever computes the shard writes their
        values again as they are. Raises StoreError where they are damaged, as far as that is seen without reading them.
        """

    @abstractmethod
    def write_outputs(self, name: str, start_row: int, values: np.ndarray, start_clip: int = 0) -> None:
        """Write whole chunks of one output, values [n, k, ...] from a row and a clip on.

        Rows and clips begin at a chunk's border and end at one, or where the array ends.
        """

    @abstractmethod
    def clear_outputs(self, name: str, start_row: int, stop_row: int, start_clip: int, stop_clip: int) -> None:
        """Make whole chunks of one output zero; where none of their clips exists they needn't be stored at all."""

    @abstractmethod
    def commit_shard(self, shard: Shard, index: ShardIndex) -> None:
        """Write the shard's index, `state` last."""

    @abstractmethod
    def find_checksum_faults(self) -> list[VerifyFault]:
        """Read every chunk of the shards that hold done rows and list those absent or with a wrong checksum."""


N_BLOCK_BYTES = 32 * 2**20


class RowFinder:
    """The rows of a store's segments."""

    def __init__(self, segment_ids: Iterable[str]) -> None:
        self._row_of = {segment_id: row for row, segment_id in enumerate(segment_ids)}

    def find(self, path: str, segment_ids: Sequence[str]) -> np.ndarray:
        """Find the rows of segments, int64 [n]; raises StoreError naming the first that is absent from `path`."""
        try:
            return np.fromiter(map(self._row_of.__getitem__, segment_ids), np.int64, len(segment_ids))
        except KeyError as error:
            message = f"segment {error.args[0]} is not in {path}; extract the manifest that holds it"
            raise StoreError(message) from error


def require_done(path: str, segment_ids: Iterable[str], states: np.ndarray) -> None:
    """Raise StoreError naming the first segment that is not done; `states` are those of its row, uint8 [n]."""
    refused = states != DONE
    if refused.any():
        first = int(np.argmax(refused))
        segment_id = next(s for i, s in enumerate(segment_ids) if i == first)
        raise StoreError(
            f"segment {segment_id} is {STATE_NAMES[int(states[first])]} in {path}; `echoshift store explain` says why"
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
    """Facts of every row, each [row]: done, number of clips that exist, audio present."""

    done: np.ndarray
    n_valid: np.ndarray
    has_sound: np.ndarray


def read_done_index(store: FeatureStore) -> DoneIndex:
    """Read states, numbers of clips and where audio was present (all True in a store of frames)."""
    done = store.read_array("state") == DONE
    has_sound = store.read_array("has_audio") == 1 if store.spec.holds_sound else np.ones(len(done), dtype=bool)
    return DoneIndex(done, store.read_array("n_valid"), has_sound)


def iterate_done_blocks(store: FeatureStore, output: str, n_block_bytes: int = N_BLOCK_BYTES) -> Iterator[DoneBlock]:
    """Read one output of every done row, in row order, about `n_block_bytes` at a time."""
    index = read_done_index(store)
    shape = next(o.shape for o in store.spec.outputs if o.name == output)
    n_row_bytes = store.layout.n_clips * math.prod(shape) * np.dtype(store.spec.dtype).itemsize
    for start, stop in plan_row_blocks(store.layout, n_row_bytes, n_block_bytes):
        chosen = index.done[start:stop]
        if chosen.any():
            values = store.read_array(f"outputs/{output}", start, stop)
            rows = start + np.flatnonzero(chosen)
            exists = np.arange(values.shape[1])[None] < index.n_valid[rows, None]
            yield DoneBlock(rows, values if chosen.all() else values[chosen], exists, index.has_sound[rows])
