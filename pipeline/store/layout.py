"""Arrays, shards, rows and attributes of a store; nothing here touches a disk."""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import ValidationError

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.plugins import describe_plugin_versions
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, fingerprint

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


RECORDED_PACKAGES = (
    "echoshift", "torch", "torchaudio", "timm", "pytorchvideo", "av", "decord", "numpy", "zarr", "h5py",
)  # fmt: skip


def describe_versions() -> dict[str, str]:
    """List the versions of Python and of the packages that have a part in a feature's value, outside encoders' too."""
    packages = {name: version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version(), **packages, **describe_plugin_versions()}


def describe_writer() -> dict[str, str]:
    """Describe who writes, where and when (UTC)."""
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def make_attributes(
    dataset: str,
    spec: FeatureSpec,
    layout: StoreLayout,
    manifest_sha256: str,
    weights_source: str,
    encoder_source: str = "",
) -> dict[str, Any]:
    """Make the attributes of a new store (FORMAT.md, section 2); `encoder_source` only where there is one."""
    return {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "fingerprint": fingerprint(spec),
        "spec": spec.model_dump(mode="json"),
        "weights_source": weights_source,
        **({"encoder_source": encoder_source} if encoder_source else {}),
        "manifest_sha256": manifest_sha256,
        **asdict(layout),
        "created": describe_writer(),
        "versions": describe_versions(),
    }


def parse_attributes(path: str, attributes: Mapping[str, Any]) -> tuple[FeatureSpec, StoreLayout]:
    """Read specification and size from a store's attributes; raises StoreError when it is not one of ours."""
    if attributes.get("format") != FORMAT_NAME:
        raise StoreError(f"{path} is not an echoshift feature store")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {attributes.get('format_version')}, this echoshift reads {FORMAT_VERSION}; "
            f"extract it again, or use the echoshift that wrote it"
        )
    try:
        spec = FeatureSpec.model_validate(attributes["spec"])
        layout = StoreLayout(**{one.name: int(attributes[one.name]) for one in fields(StoreLayout)})
    except (KeyError, ValidationError) as error:
        raise StoreError(f"{path}: the store's attributes are damaged: {error}") from error
    if attributes.get("fingerprint") != fingerprint(spec):
        raise StoreError(f"{path}: the fingerprint is not that of the specification; the attributes were changed")
    return spec, layout


def pack_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Make attributes that HDF5 can hold: text and whole numbers stay, everything else becomes JSON."""
    return {k: v if isinstance(v, str | int) else "json:" + json.dumps(v) for k, v in attributes.items()}


def unpack_attributes(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `pack_attributes`."""
    attributes: dict[str, Any] = {}
    for key, value in packed.items():
        if isinstance(value, str):
            attributes[key] = json.loads(value[5:]) if value.startswith("json:") else value
        else:
            attributes[key] = int(value)
    return attributes


NO_MEDIA = "no media"


def order_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Order segments by video and time, so that a shard reads stretches of video front to back."""
    return sorted(segments, key=lambda s: (s.video_id, s.start_s, s.stop_s, s.segment_id))


def plan_new_rows(known_ids: Sequence[str], segments: Iterable[Segment]) -> list[str]:
    """List, in row order, the ids of segments that a store with `known_ids` doesn't have yet."""
    known = set(known_ids)
    return [s.segment_id for s in order_segments(segments) if s.segment_id not in known]


def compute_digest(media_identity: str, start_s: float, stop_s: float) -> bytes:
    """Hash the identity of a video's content and a segment's times to 16 bytes (blake2b)."""
    text = f"{media_identity}\n{start_s!r}\n{stop_s!r}"
    return hashlib.blake2b(text.encode(), digest_size=N_DIGEST_BYTES).digest()


def compute_digests(segments: Sequence[Segment | None], identities: Mapping[str, str]) -> np.ndarray:
    """Compute the expected digests of rows, uint8 [row, 16]; zeros where a row has no segment in the manifest.

    `identities` maps a segment's id to its media's identity; NO_MEDIA stands for media that aren't there, so that a row
    turns stale when they appear.
    """
    nothing = bytes(N_DIGEST_BYTES)
    packed = b"".join(
        nothing if s is None else compute_digest(identities[s.segment_id], s.start_s, s.stop_s) for s in segments
    )
    return np.frombuffer(packed, dtype=np.uint8).reshape(len(segments), N_DIGEST_BYTES).copy()
