"""Checks the chunks of a Zarr store, one after the other: absent, of a wrong length, or with a wrong checksum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import zarr
from zarr.core.sync import sync

from echoshift.pipeline.store.file_maps import map_file
from echoshift.pipeline.store.interface import VerifyFault
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.raw_chunks import N_CHECKSUM_BYTES, RawArray, describe_raw_array, is_whole

_INDEX_OF_CLIPS = ("times", "frames")


def find_chunk_faults(
    open_array: Callable[[str], zarr.Array], names: Sequence[str], segment_ids: Sequence[str]
) -> list[VerifyFault]:
    """List the faults of every chunk that holds a done row, each chunk read once, each fault at its first done row.

    A chunk may be absent where no done row has a valid clip in it. A fault of `state` ends the check: nothing else can
    be judged without it. Where `n_valid` has a fault, every row is taken to have one clip.
    """
    n_rows = len(segment_ids)
    every, none, one = np.ones(n_rows, bool), np.zeros(n_rows, np.int32), np.ones(n_rows, np.int32)
    state, n_valid = open_array("state"), open_array("n_valid")
    faults = list(_check_array("state", state, every, none, segment_ids))
    if faults:
        return faults
    done = np.asarray(state[:n_rows]) == DONE
    faults = list(_check_array("n_valid", n_valid, done, one, segment_ids))
    counts = one if faults else np.asarray(n_valid[:n_rows])
    for name in names:
        if name not in ("state", "n_valid"):
            faults += _check_array(name, open_array(name), done, counts, segment_ids)
    return faults


def _check_array(
    name: str, array: zarr.Array, done: np.ndarray, n_valid: np.ndarray, segment_ids: Sequence[str]
) -> Iterator[VerifyFault]:
    raw = describe_raw_array(array)
    present = _list_chunks(array, raw)
    n_chunk_rows = array.chunks[0]
    has_clips = name.startswith("outputs/") or name in _INDEX_OF_CLIPS
    n_side = math.ceil(array.shape[1] / array.chunks[1]) if array.ndim > 1 else 1
    for row_chunk in range(math.ceil(len(done) / n_chunk_rows)):
        start, stop = row_chunk * n_chunk_rows, min((row_chunk + 1) * n_chunk_rows, len(done))
        done_rows = done[start:stop]
        if not done_rows.any():
            continue
        for side in range(n_side):
            chunk = "/".join(["c", *[str(row_chunk), str(side), *["0"] * (array.ndim - 2)][: array.ndim]])
            needed = done_rows & (n_valid[start:stop] > (side * array.chunks[1] if has_clips else 0))
            if chunk not in present:
                message = "is absent" if needed.any() else ""
            elif raw is not None:
                message = _check_file(raw, chunk)
            else:
                message = _check_remote(array, start, stop, side)
            if message:
                first = start + int(np.argmax(needed if needed.any() else done_rows))
                yield VerifyFault(name, segment_ids[first], f"chunk {chunk} {message}")


def _list_chunks(array: zarr.Array, raw: RawArray | None) -> set[str]:
    """List the chunks that are there, `c/0/0`, in one go: asking for each takes a request each on a remote store."""
    if raw is not None:
        folder = Path(raw.folder)
        return {path.relative_to(folder).as_posix() for path in folder.glob("c/" + "/".join("*" * array.ndim))}
    prefix = f"{array.store_path.path}/" if array.store_path.path else ""

    async def list_keys() -> set[str]:
        return {key.removeprefix(prefix) async for key in array.store_path.store.list_prefix(f"{prefix}c/")}

    return sync(list_keys())


def _check_file(raw: RawArray, name: str) -> str:
    mapped = map_file(f"{raw.folder}/{name}")
    if mapped is None:
        return "was removed while it was checked"
    if mapped.identity.n_bytes != raw.n_chunk_bytes + N_CHECKSUM_BYTES:
        return f"has {mapped.identity.n_bytes} bytes instead of {raw.n_chunk_bytes + N_CHECKSUM_BYTES}"
    return "" if is_whole(raw, mapped.data) else "has a crc32c that is not that of its content"


def _check_remote(array: zarr.Array, start: int, stop: int, side: int) -> str:
    clips = (slice(side * array.chunks[1], (side + 1) * array.chunks[1]),) if array.ndim > 1 else ()
    try:
        np.asarray(array[(slice(start, stop), *clips)])
    except ValueError as error:
        return f"can't be read: {error}"
    return ""
