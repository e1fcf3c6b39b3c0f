"""Decides which arrays a store holds, with their shapes, types and chunks; nothing here touches a disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.specs import FeatureSpec

FORMAT_NAME = "echoshift-features"
FORMAT_VERSION = 1

PENDING, DONE, FAILED = 0, 1, 2
STATE_NAMES = {PENDING: "pending", DONE: "done", FAILED: "failed"}

N_DIGEST_BYTES = 16
N_ROWS_PER_SHARD = 64
N_ROWS_PER_INDEX_CHUNK = 4096
MAX_CHUNK_BYTES = 16 * 2**20
N_WINDOWS_PER_CHUNK = 64

# Written in this order at a commit: `state` last, so that a row counts only when all of it is there.
ROW_ARRAYS = ("times", "frames", "n_valid", "has_audio", "loudness_dbfs", "digest", "state")


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Is one array's name, shape, NumPy type and chunk shape; its first axis is the row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """Is the size of a store: rows, clips a row, rows a shard, and bytes a segment id."""

    n_rows: int
    n_clips: int
    n_rows_per_shard: int
    n_id_bytes: int

    @property
    def n_shards(self) -> int:
        """Gives the number of shards; the last one may hold fewer rows."""
        return math.ceil(self.n_rows / self.n_rows_per_shard)


@dataclass(frozen=True, slots=True)
class Shard:
    """Is a run of rows, the unit of work, of ownership and of commit."""

    index: int
    start_row: int
    stop_row: int

    @property
    def n_rows(self) -> int:
        """Gives the number of rows."""
        return self.stop_row - self.start_row


def plan_shards(layout: StoreLayout) -> tuple[Shard, ...]:
    """Lists the shards in row order."""
    size = layout.n_rows_per_shard
    return tuple(Shard(i, i * size, min((i + 1) * size, layout.n_rows)) for i in range(layout.n_shards))


def plan_output_array(
    name: str, clip_shape: tuple[int, ...], dtype: str, layout: StoreLayout, *, windows: bool
) -> ArrayLayout:
    """Plans one output's array [row, clip, ...]: whole rows a chunk up to 16 MiB, dividing the shard; else one clip."""
    n_clips_per_chunk = min(layout.n_clips, N_WINDOWS_PER_CHUNK) if windows else layout.n_clips
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
    """Lists every array of a store (FORMAT.md, section 3)."""
    windows = spec.clip.sampling == "windows"
    n, k, c = layout.n_rows, layout.n_clips, N_ROWS_PER_INDEX_CHUNK
    arrays = [plan_output_array(o.name, o.shape, spec.dtype, layout, windows=windows) for o in spec.outputs]
    arrays += [
        ArrayLayout("segment_id", (n, layout.n_id_bytes), "uint8", (c, layout.n_id_bytes)),
        ArrayLayout("times", (n, k, 2), "float64", (c, k, 2)),
        ArrayLayout("frames", (n, k, 2), "int64", (c, k, 2)),
        ArrayLayout("n_valid", (n,), "int32", (c,)),
        ArrayLayout("digest", (n, N_DIGEST_BYTES), "uint8", (c, N_DIGEST_BYTES)),
        ArrayLayout("state", (n,), "uint8", (c,)),
    ]
    if spec.audio is not None:
        arrays.append(ArrayLayout("has_audio", (n,), "uint8", (c,)))
        arrays.append(ArrayLayout("loudness_dbfs", (n,), "float32", (c,)))
    return tuple(arrays)


def encode_segment_ids(segment_ids: Iterable[str], n_id_bytes: int) -> np.ndarray:
    """Packs ids as UTF-8 padded with zero bytes, uint8 [n, n_id_bytes]."""
    ids = [s.encode() for s in segment_ids]
    return np.array(ids, dtype=f"S{n_id_bytes}").view(np.uint8).reshape(len(ids), n_id_bytes)


def decode_segment_ids(packed: np.ndarray) -> list[str]:
    """Unpacks ids written by `encode_segment_ids`."""
    if not len(packed):
        return []
    flat = np.ascontiguousarray(packed).view(f"S{packed.shape[1]}")[:, 0]
    return [s.decode() for s in flat.tolist()]


def measure_id_bytes(segment_ids: Iterable[str]) -> int:
    """Gives the bytes an id takes in a new store: the longest, rounded up to a multiple of 64."""
    longest = max((len(s.encode()) for s in segment_ids), default=1)
    return 64 * math.ceil(longest / 64)
