"""Reads a local Zarr array whose chunk files are the raw values and a crc32c: by memory maps, or whole into memory."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from pipeline.errors import StoreError
from pipeline.store.file_maps import FileMap, identify_file, map_file

N_CHECKSUM_BYTES = 4
# Half of what Linux lets a process map, shared by the few stores that one process reads.
MAX_MAPS = 8192
N_READERS = 4
# Where more rows than this come from each chunk, NumPy's indexing of a chunk beats a loop over rows.
N_ROWS_WORTH_INDEXING = 8


@dataclass(frozen=True, slots=True)
class RawArray:
    """Is where an array's chunk files lie and how they are cut: along rows and clips, never along further axes."""

    folder: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_chunk_bytes(self) -> int:
        """Gives the length of a chunk file without its checksum; chunks at the border have it too."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def n_clip_chunks(self) -> int:
        """Gives how many chunks lie side by side along the clips; 1 where there is no clip axis."""
        return math.ceil(self.shape[1] / self.chunks[1]) if len(self.shape) > 1 else 1

    def name_chunk(self, row_chunk: int, clip_chunk: int) -> str:
        """Gives a chunk's path."""
        places = [str(row_chunk), str(clip_chunk), *["0"] * (len(self.shape) - 2)][: len(self.shape)]
        return "/".join([self.folder, "c", *places])

    def view_chunk(self, data: np.ndarray) -> np.ndarray:
        """Sees a chunk file's bytes as its values, [row, clip, …]."""
        return data[: self.n_chunk_bytes].view(self.dtype).reshape(self.chunks)


def describe_raw_array(array: zarr.Array) -> RawArray | None:
    """Describes an array of a local folder; None elsewhere, or where its chunks are not the plain ones of FORMAT.md.

    This is the one question on which everything depends that is done with files instead of by zarr.
    """
    store, metadata = array.store_path.store, array.metadata
    codecs = tuple(getattr(metadata, "codecs", ()))
    plain = (
        isinstance(store, LocalStore)
        and len(codecs) == 2
        and isinstance(codecs[0], BytesCodec)
        and isinstance(codecs[1], Crc32cCodec)
        and array.dtype == array.dtype.newbyteorder("<")
        and tuple(array.chunks[2:]) == tuple(array.shape[2:])
        and getattr(getattr(metadata, "chunk_key_encoding", None), "separator", None) == "/"
    )
    if not plain or not isinstance(store, LocalStore):
        return None
    folder = Path(store.root, array.store_path.path).absolute()
    return RawArray(str(folder), tuple(array.shape), tuple(array.chunks), np.dtype(array.dtype))


def map_chunk(array: RawArray, path: str) -> FileMap | None:
    """Maps one chunk file; None when it is absent. Raises StoreError when its length is wrong."""
    mapped = map_file(path)
    if mapped is not None and mapped.identity.n_bytes != array.n_chunk_bytes + N_CHECKSUM_BYTES:
        raise _wrong_length(array, path, mapped.identity.n_bytes)
    return mapped


def is_whole(array: RawArray, data: np.ndarray) -> bool:
    """Compares a chunk file's checksum with its content."""
    stored = int.from_bytes(data[array.n_chunk_bytes :].tobytes(), "little")
    return bool(google_crc32c.value(data[: array.n_chunk_bytes]) == stored)


def _wrong_length(array: RawArray, path: str, n_bytes: int) -> StoreError:
    return StoreError(
        f"{path} has {n_bytes} bytes instead of {array.n_chunk_bytes + N_CHECKSUM_BYTES}; "
        f"`echoshift store verify` lists every fault"
    )


def make_checksum_error(path: str) -> StoreError:
    """Makes the error for a chunk file whose checksum is wrong."""
    return StoreError(f"{path}: its crc32c is not that of its content; `echoshift store verify` lists every fault")


@dataclass(slots=True)
class _HeldMap:
    """Is a chunk's map, its values (None: the file is absent), and the version at which it was last compared."""

    mapped: FileMap | None
    values: np.ndarray | None
    version: int


class ChunkMaps:
    """Holds the maps of one array's chunks, MAX_MAPS at most, and copies rows out of them.

    A map is compared with the file of its name whenever the `version` that is given differs from that of the last
    comparison, and made anew if the file was replaced.
    """

    def __init__(self, array: RawArray) -> None:
        self.array = array
        self._held: OrderedDict[tuple[int, int], _HeldMap] = OrderedDict()

    def copy_rows(self, rows: np.ndarray, version: int) -> np.ndarray:
        """Copies rows [n, clip, …], 0 where a chunk is absent; raises StoreError for a chunk of a wrong length."""
        array = self.array
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        row_chunks, places = np.divmod(rows, array.chunks[0])
        if array.n_clip_chunks == 1:
            self._copy_part(result, row_chunks, places, 0, version)
            return result
        for clip_chunk in range(array.n_clip_chunks):
            start = clip_chunk * array.chunks[1]
            part = result[:, start : start + array.chunks[1]]
            self._copy_part(part, row_chunks, places, clip_chunk, version)
        return result

    def _copy_part(
        self, part: np.ndarray, row_chunks: np.ndarray, places: np.ndarray, clip_chunk: int, version: int
    ) -> None:
        needed = sorted(set(row_chunks.tolist()))
        if len(part) > N_ROWS_WORTH_INDEXING * len(needed):
            order = np.argsort(row_chunks, kind="stable")
            borders = np.searchsorted(row_chunks[order], needed, side="right")
            for row_chunk, taken in zip(needed, np.split(order, borders[:-1]), strict=True):
                values = self._find(row_chunk, clip_chunk, version)
                part[taken] = 0 if values is None else self._cut(values, part)[places[taken]]
            return
        found = {c: self._find(c, clip_chunk, version) for c in needed}
        whole = part.ndim == 1 or part.shape[1] == self.array.chunks[1]
        for i, (row_chunk, place) in enumerate(zip(row_chunks.tolist(), places.tolist(), strict=True)):
            values = found[row_chunk]
            if values is None:
                part[i] = 0
            else:
                part[i] = values[place] if whole else values[place, : part.shape[1]]

    @staticmethod
    def _cut(values: np.ndarray, part: np.ndarray) -> np.ndarray:
        return values if part.ndim == 1 else values[:, : part.shape[1]]

    def _find(self, row_chunk: int, clip_chunk: int, version: int) -> np.ndarray | None:
        key = (row_chunk, clip_chunk)
        held = self._held.get(key)
        if held is not None and held.version == version:
            return held.values
        path = self.array.name_chunk(row_chunk, clip_chunk)
        if held is None or not _is_current(held, path):
            mapped = map_chunk(self.array, path)
            held = _HeldMap(mapped, None if mapped is None else self.array.view_chunk(mapped.data), version)
            self._held[key] = held
            if len(self._held) > MAX_MAPS:
                self._held.popitem(last=False)
        held.version = version
        return held.values

    def are_current(self, rows: np.ndarray) -> bool:
        """Says whether the maps that rows were copied from are still those of the files."""
        for row_chunk in np.unique(rows // self.array.chunks[0]).tolist():
            for clip_chunk in range(self.array.n_clip_chunks):
                held = self._held.get((row_chunk, clip_chunk))
                if held is None or not _is_current(held, self.array.name_chunk(row_chunk, clip_chunk)):
                    return False
        return True


def _is_current(held: _HeldMap, path: str) -> bool:
    return identify_file(path) == (None if held.mapped is None else held.mapped.identity)


def read_whole(array: RawArray, n_rows: int) -> np.ndarray:
    """Reads the first rows of an array, [n_rows, …], each chunk straight into its place, checksums compared.

    Absent chunks are 0. Raises StoreError naming the file for a wrong length or checksum.
    """
    result = np.empty((n_rows, *array.shape[1:]), array.dtype)
    chunks = [(r, c) for r in range(math.ceil(n_rows / array.chunks[0])) for c in range(array.n_clip_chunks)]
    with ThreadPoolExecutor(min(N_READERS, os.cpu_count() or 1), thread_name_prefix="read-chunk") as pool:
        for _ in pool.map(lambda chunk: _read_into(result, array, *chunk), chunks):
            pass
    return result


def _read_into(result: np.ndarray, array: RawArray, row_chunk: int, clip_chunk: int) -> None:
    path = array.name_chunk(row_chunk, clip_chunk)
    start = row_chunk * array.chunks[0]
    part = result[start : start + array.chunks[0]]
    if result.ndim > 1:
        part = part[:, clip_chunk * array.chunks[1] : (clip_chunk + 1) * array.chunks[1]]
    # Whole rows are read in place; a chunk of some clips, or one that reaches beyond the rows, by way of a buffer.
    direct = part.shape == array.chunks and part.flags.c_contiguous
    target = part.reshape(-1).view(np.uint8) if direct else np.empty(array.n_chunk_bytes, np.uint8)
    checksum = bytearray(N_CHECKSUM_BYTES)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        part[...] = 0
        return
    try:
        n_bytes = os.fstat(handle).st_size
        if n_bytes != array.n_chunk_bytes + N_CHECKSUM_BYTES:
            raise _wrong_length(array, path, n_bytes)
        n_read = 0
        while n_read < array.n_chunk_bytes:
            n_read += os.preadv(handle, [target[n_read:].data], n_read)
        os.preadv(handle, [checksum], n_read)
    finally:
        os.close(handle)
    if google_crc32c.value(target) != int.from_bytes(checksum, "little"):
        raise make_checksum_error(path)
    if not direct:
        part[...] = array.view_chunk(target)[tuple(slice(n) for n in part.shape)]
