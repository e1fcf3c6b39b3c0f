"""Decides which arrays a store holds, with their shapes, types and chunks; nothing here touches a disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.specs import FeatureSpec

FORMAT_NAME = "echoshift-features"
FORMAT_VERSION = 1

PENDING, DONE, FAILED = 0, 1, 2
STATE_NAMES = {PENDING: "pending", DONE: "done", FAILED: "failed"}

N_DIGEST_BYTES = 16
MAX_CHUNK_BYTES = 16 * 2**20
N_WANTED_CHUNK_BYTES = 8 * 2**20
N_SHARDS_AT_LEAST = 8
MIN_ROWS_PER_SHARD, MAX_ROWS_PER_SHARD = 16, 4096
# A commit holds and rewrites one chunk of each of these arrays, so they are kept small; a store shouldn't be many files
# either. A chunk file is always of full length: the row of a long video's windows takes 16 bytes a window.
N_INDEX_CHUNK_BYTES = 2 * 2**20
MIN_ROWS_PER_INDEX_CHUNK, MAX_ROWS_PER_INDEX_CHUNK = 1024, 65536
N_WINDOWS_PER_CHUNK = 64

# Written in this order at a commit: `state` last, so that a row counts only when all of it is there.
ROW_ARRAYS = ("times", "frames", "n_valid", "has_audio", "loudness_dbfs", "digest", "state")


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """One array's name, shape, NumPy type and chunk shape; its first axis is the row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """The size of a store: rows, clips a row, rows a shard, and bytes a segment id."""

    n_rows: int
    n_clips: int
    n_rows_per_shard: int
    n_id_bytes: int

    @property
    def n_shards(self) -> int:
        """The number of shards; the last one may hold fewer rows."""
        return math.ceil(self.n_rows / self.n_rows_per_shard)


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of rows, the unit of work, of ownership and of commit."""

    index: int
    start_row: int
    stop_row: int

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return self.stop_row - self.start_row


def plan_shards(layout: StoreLayout) -> tuple[Shard, ...]:
    """List the shards in row order."""
    size = layout.n_rows_per_shard
    return tuple(Shard(i, i * size, min((i + 1) * size, layout.n_rows)) for i in range(layout.n_shards))


def plan_rows_per_shard(spec: FeatureSpec, n_rows: int, n_clips: int) -> int:
    """Choose the rows of a new store's shards: a power of two, so that a chunk of its largest output is about 8 MiB.

    Between 16 and 4,096, and few enough for a small dataset to have several shards (n_rows / 8, but 16 at least):
    workers share shards out, and a kill costs those under way. `n_clips` is the most clips that a row has. How long a
    row takes to compute is not known here: where that is long, take fewer.
    """
    n_clips_per_chunk = _count_clips_per_chunk(n_clips, windows=spec.clip.sampling == "windows")
    n_clip_bytes = max(math.prod(o.shape) for o in spec.outputs) * np.dtype(spec.dtype).itemsize
    wanted = round(math.log2(N_WANTED_CHUNK_BYTES / max(n_clips_per_chunk * n_clip_bytes, 1)))
    at_most = math.floor(math.log2(max(n_rows / N_SHARDS_AT_LEAST, 1)))
    return min(max(2 ** max(min(wanted, at_most), 0), MIN_ROWS_PER_SHARD), MAX_ROWS_PER_SHARD)


def plan_rows_per_index_chunk(n_rows: int, n_row_bytes: int) -> int:
    """Choose the rows a chunk of an array of the index: a power of two, not far beyond the rows, never above 2 MiB.

    At least 1,024 where that many fit, as stores grow; one row where a row alone is larger.
    """
    by_bytes = 2 ** math.floor(math.log2(max(N_INDEX_CHUNK_BYTES / n_row_bytes, 1)))
    by_rows = 2 ** math.ceil(math.log2(max(n_rows, 1)))
    return min(max(by_rows, MIN_ROWS_PER_INDEX_CHUNK), by_bytes, MAX_ROWS_PER_INDEX_CHUNK)


def _count_clips_per_chunk(n_clips: int, *, windows: bool) -> int:
    return min(n_clips, N_WINDOWS_PER_CHUNK) if windows else n_clips


def plan_row_blocks(layout: StoreLayout, n_row_bytes: int, n_block_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the rows into stretches to be read at a time: (start, stop), whole shards, or even parts of one."""
    n_rows = max(n_block_bytes // max(n_row_bytes, 1), 1)
    size = layout.n_rows_per_shard
    if n_rows >= size:
        n_rows -= n_rows % size
    else:
        while size % n_rows:
            n_rows -= 1
    for start in range(0, layout.n_rows, n_rows):
        yield start, min(start + n_rows, layout.n_rows)


def plan_output_array(
    name: str, clip_shape: tuple[int, ...], dtype: str, layout: StoreLayout, *, windows: bool
) -> ArrayLayout:
    """Plan one output's array [row, clip, ...]: whole rows a chunk up to 16 MiB, dividing the shard; else one clip."""
    n_clips_per_chunk = _count_clips_per_chunk(layout.n_clips, windows=windows)
    n_clip_bytes = int(np.prod(clip_shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    n_rows_per_chunk = layout.n_rows_per_shard
    while n_rows_per_chunk > 1 and (
        n_rows_per_chunk * n_clips_per_chunk * n_clip_bytes > MAX_CHUNK_BYTES
        or layout.n_rows_per_shard % n_rows_per_chunk
    ):
        n_rows_per_chunk -= 1
    if n_rows_per_chunk == 1 and n_clips_per_chunk * n_clip_bytes > MAX_CHUNK_BYTES:
        n_clips_per_chunk = 1
    return ArrayLayout(
        name=f"outputs/{name}",
        shape=(layout.n_rows, layout.n_clips, *clip_shape),
        dtype=dtype,
        chunks=(n_rows_per_chunk, n_clips_per_chunk, *clip_shape),
    )


def plan_arrays(spec: FeatureSpec, layout: StoreLayout) -> tuple[ArrayLayout, ...]:
    """List every array of a store (FORMAT.md, section 3)."""
    windows = spec.clip.sampling == "windows"
    n, k = layout.n_rows, layout.n_clips
    index = [
        ("segment_id", (layout.n_id_bytes,), "uint8"),
        ("times", (k, 2), "float64"),
        ("frames", (k, 2), "int64"),
        ("n_valid", (), "int32"),
        ("digest", (N_DIGEST_BYTES,), "uint8"),
        ("state", (), "uint8"),
    ]
    if spec.holds_sound:
        index += [("has_audio", (), "uint8"), ("loudness_dbfs", (), "float32")]
    arrays = [plan_output_array(o.name, o.shape, spec.dtype, layout, windows=windows) for o in spec.outputs]
    for name, row_shape, dtype in index:
        c = plan_rows_per_index_chunk(n, math.prod(row_shape) * np.dtype(dtype).itemsize)
        arrays.append(ArrayLayout(name, (n, *row_shape), dtype, (c, *row_shape)))
    return tuple(arrays)


def encode_segment_ids(segment_ids: Iterable[str], n_id_bytes: int) -> np.ndarray:
    """Pack ids as UTF-8 padded with zero bytes, uint8 [n, n_id_bytes]."""
    ids = [s.encode() for s in segment_ids]
    return np.array(ids, dtype=f"S{n_id_bytes}").view(np.uint8).reshape(len(ids), n_id_bytes)


def decode_segment_ids(packed: np.ndarray) -> list[str]:
    """Unpack ids written by `encode_segment_ids`."""
    if not len(packed):
        return []
    flat = np.ascontiguousarray(packed).view(f"S{packed.shape[1]}")[:, 0]
    return [s.decode() for s in flat.tolist()]


def measure_id_bytes(segment_ids: Iterable[str]) -> int:
    """Return the bytes an id takes in a new store: the longest, rounded up to a multiple of 64."""
    longest = max((len(s.encode()) for s in segment_ids), default=1)
    return 64 * math.ceil(longest / 64)
