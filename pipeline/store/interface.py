"""The one interface of a feature store and the report by which a shard's rows are committed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import Shard, StoreLayout

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
        frames: first and last picture used (index in the file) or first sample and one past the last, int64
            [n, clip, 2]; -1 where a clip doesn't exist.
        n_valid: clips that exist, int32 [n].
        digest: what each row was made from, uint8 [n, 16].
        state: 1 done or 2 failed, uint8 [n].
        has_audio: 1 where there was sound, uint8 [n]; audio stores only.
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


class FeatureStore(Protocol):
    """Keeps the features of one FeatureSpec; rows are segments, in the order fixed when they were first planned.

    One process writes at a time (it holds `StoreLock`); any number read. A shard's data are written first, then its
    index, `state` last: whatever is killed when, a row whose state is 1 is whole.
    """

    path: str
    backend: Backend
    spec: FeatureSpec
    layout: StoreLayout

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What the store said of itself at its creation (FORMAT.md, section 2)."""
        ...

    @property
    def segment_ids(self) -> Sequence[str]:
        """The id of every row, in row order."""
        ...

    def read_array(self, name: str, start_row: int = 0, stop_row: int | None = None) -> np.ndarray:
        """Read rows of any array by its name in FORMAT.md, such as `state` or `outputs/pooled`."""
        ...

    def read(self, segment_ids: Iterable[str], output: str) -> np.ndarray:
        """Read one output of the segments asked for, in their order, [n, clip, ...] in the store's dtype.

        Raises StoreError naming the first segment that is not in the store or not done.
        """
        ...

    def read_clips(self, segment_ids: Iterable[str], output: str, clips: np.ndarray) -> np.ndarray:
        """Read one clip of each segment asked for, in their order, [n, ...]; `clips` are their numbers, int64 [n].

        Only these clips are read where the store is local. Raises as `read`, and for a clip that no row has.
        """
        ...

    def read_all(self, output: str) -> np.ndarray:
        """Read one output of every row, whatever its state, [row, clip, ...]."""
        ...

    def missing(self, digests: np.ndarray) -> np.ndarray:
        """Return whether each row is pending or stale, bool [row]; `digests` are the expected, uint8 [row, 16]."""
        ...

    def extend(self, segment_ids: Sequence[str], n_clips: int) -> None:
        """Append rows for new segments, pending."""
        ...

    def get_output_chunks(self, name: str) -> tuple[int, int]:
        """Return how many rows and clips one chunk of an output holds, which a store keeps when it grows."""
        ...

    def read_outputs(
        self, name: str, start_row: int, stop_row: int, start_clip: int = 0, stop_clip: int | None = None
    ) -> np.ndarray:
        """Read some clips of some rows of one output, whatever their state, [row, clip, ...]."""
        ...

    def begin_shard(self, shard: Shard, kept_rows: Sequence[int] = ()) -> None:
        """Set the shard's rows to pending, so that a run killed inside it redoes them.

        `kept_rows`, numbers of done rows of the store, stay done all the while; whoever computes the shard writes their
        values again as they are. Raises StoreError where they are damaged, as far as that is seen without reading them.
        """
        ...

    def write_outputs(self, name: str, start_row: int, values: np.ndarray, start_clip: int = 0) -> None:
        """Write whole chunks of one output, values [n, k, ...] from a row and a clip on.

        Rows and clips begin at a chunk's border and end at one, or where the array ends.
        """
        ...

    def clear_outputs(self, name: str, start_row: int, stop_row: int, start_clip: int, stop_clip: int) -> None:
        """Make whole chunks of one output zero; where none of their clips exists they needn't be stored at all."""
        ...

    def commit_shard(self, shard: Shard, index: ShardIndex) -> None:
        """Write the shard's index, `state` last."""
        ...

    def find_checksum_faults(self) -> list[VerifyFault]:
        """Read every chunk of the shards that hold done rows and lists those absent or with a wrong checksum."""
        ...
