"""Reads a local Zarr array whose chunk files are the raw values and a crc32c: by memory maps, or whole into memory."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.file_maps import FileIdentity, FileMap, MapSpace, is_still, map_file

N_CHECKSUM_BYTES = 4
# Half of what Linux lets a process map, shared by the few stores that one process reads.
MAX_MAPS = 8192
N_READERS = 4


@dataclass(frozen=True, slots=True)
class RawArray:
    """Where an array's chunk files lie and how they are cut: along rows and clips, never along further axes."""

    folder: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_chunk_bytes(self) -> int:
        """The length of a chunk file without its checksum; chunks at the border have it too."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def n_clip_chunks(self) -> int:
        """How many chunks lie side by side along the clips; 1 where there is no clip axis."""
        return math.ceil(self.shape[1] / self.chunks[1]) if len(self.shape) > 1 else 1

    def name_chunk(self, row_chunk: int, clip_chunk: int) -> str:
        """Return a chunk's path."""
        places = [str(row_chunk), str(clip_chunk), *["0"] * (len(self.shape) - 2)][: len(self.shape)]
        return "/".join([self.folder, "c", *places])

    def view_chunk(self, data: np.ndarray) -> np.ndarray:
        """See a chunk file's bytes as its values, [row, clip, …]."""
        return data[: self.n_chunk_bytes].view(self.dtype).reshape(self.chunks)


def describe_raw_array(array: zarr.Array) -> RawArray | None:
    """Describe an array of a local folder; None elsewhere, or where its chunks are not the plain ones of FORMAT.md.

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
    """Map one chunk file; None when it is absent. Raises StoreError when its length is wrong."""
    mapped = map_file(path)
    if mapped is not None and mapped.identity.n_bytes != array.n_chunk_bytes + N_CHECKSUM_BYTES:
        raise _wrong_length(array, path, mapped.identity.n_bytes)
    return mapped


def is_whole(array: RawArray, data: np.ndarray) -> bool:
    """Compare a chunk file's checksum with its content."""
    stored = int.from_bytes(data[array.n_chunk_bytes :].tobytes(), "little")
    return bool(google_crc32c.value(data[: array.n_chunk_bytes]) == stored)


def _wrong_length(array: RawArray, path: str, n_bytes: int) -> StoreError:
    return StoreError(
        f"{path} has {n_bytes} bytes instead of {array.n_chunk_bytes + N_CHECKSUM_BYTES}; "
        f"`echoshift store verify` lists every fault"
    )


def make_checksum_error(path: str) -> StoreError:
    """Make the error for a chunk file whose checksum is wrong."""
    return StoreError(f"{path}: its crc32c is not that of its content; `echoshift store verify` lists every fault")


@dataclass(slots=True)
class _Shown:
    """Which file a chunk's slot shows (None: there is none), and at which version it was last compared."""

    identity: FileIdentity | None
    version: int


class ChunkMaps:
    """Maps one array's chunks side by side, MAX_MAPS of them at most, and copies rows out of them.

    A map is compared with the file of its name whenever the `version` that is given differs from that of the last
    comparison, and made anew if the file was replaced.
    """

    def __init__(self, array: RawArray) -> None:
        self.array = array
        n_row_chunks = math.ceil(array.shape[0] / array.chunks[0])
        n_slots, n_file_bytes = n_row_chunks * array.n_clip_chunks, array.n_chunk_bytes + N_CHECKSUM_BYTES
        n_row_bytes = array.n_chunk_bytes // array.chunks[0]
        self._space = MapSpace(n_slots, n_file_bytes)
        chunks = self._space.slots[:, : array.n_chunk_bytes].view(array.dtype)
        # [row chunk, clip chunk, row, clip, …]; not contiguous, and a view nevertheless
        self._values = chunks.reshape(n_row_chunks, array.n_clip_chunks, *array.chunks)
        self._line = None
        if array.chunks[1:] == array.shape[1:] and n_slots:
            # One index finds a row, which NumPy does faster than with two: entry i is the row that begins i units into
            # the space, a unit the largest step of which slots and rows are multiples. Most entries are no row of ours.
            n_slot_bytes = self._space.slots.shape[1]
            n_unit_bytes = math.gcd(n_row_bytes, n_slot_bytes)
            self._n_slot_units, self._n_row_units = n_slot_bytes // n_unit_bytes, n_row_bytes // n_unit_bytes
            n_units = n_slots * self._n_slot_units - self._n_row_units + 1
            strides = (n_unit_bytes, *self._values.strides[3:])
            self._line = np.ndarray((n_units, *array.shape[1:]), array.dtype, self._space.slots.data, strides=strides)
        self._shown: dict[int, _Shown] = {}
        # The version at which all chunks of these rows were last compared: one look for all rows of a read.
        self._versions = np.full(n_row_chunks, -1, np.int64)

    def copy_rows(self, rows: np.ndarray, version: int, clips: np.ndarray | None = None) -> np.ndarray:
        """Copy rows [n, clip, …], or one clip of each, [n, …]; 0 where a chunk is absent.

        Raises StoreError for a chunk of a wrong length.
        """
        array = self.array
        row_chunks, places = np.divmod(rows, array.chunks[0])
        if not (self._versions[row_chunks] == version).all():
            slots = self._find_slots(row_chunks)
            if len(slots) > MAX_MAPS and len(rows) > 1:
                half = len(rows) // 2
                parts = [(rows[part], None if clips is None else clips[part]) for part in (np.s_[:half], np.s_[half:])]
                return np.concatenate([self.copy_rows(part, version, own) for part, own in parts])
            self._make_room(slots)
            for slot in slots:
                self._show(slot, version)
            self._versions[row_chunks] = version
        if self._line is not None:
            line_rows = row_chunks * self._n_slot_units + places * self._n_row_units
            return self._line[line_rows] if clips is None else self._line[line_rows, clips]
        if clips is not None:
            return self._values[row_chunks, clips // array.chunks[1], places, clips % array.chunks[1]]
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        for i in range(array.n_clip_chunks):
            part = result[:, i * array.chunks[1] : (i + 1) * array.chunks[1]]
            part[...] = self._values[row_chunks, i, places][:, : part.shape[1]]
        return result

    def are_current(self, rows: np.ndarray) -> bool:
        """Return whether the maps that rows were copied from are still those of the files."""
        return all(
            slot in self._shown and is_still(self._shown[slot].identity, self._name(slot))
            for slot in self._find_slots(rows // self.array.chunks[0])
        )

    def _find_slots(self, row_chunks: np.ndarray) -> list[int]:
        n = self.array.n_clip_chunks
        return [chunk * n + i for chunk in sorted(set(row_chunks.tolist())) for i in range(n)]

    def _make_room(self, slots: list[int]) -> None:
        """Hide the chunks shown first, but none that is needed now."""
        n_too_many = len(self._shown) + sum(slot not in self._shown for slot in slots) - MAX_MAPS
        if n_too_many > 0:
            needed = set(slots)
            for slot in [slot for slot in self._shown if slot not in needed][:n_too_many]:
                self._space.hide(slot)
                del self._shown[slot]
                self._versions[slot // self.array.n_clip_chunks] = -1

    def _name(self, slot: int) -> str:
        return self.array.name_chunk(*divmod(slot, self.array.n_clip_chunks))

    def _show(self, slot: int, version: int) -> None:
        shown = self._shown.get(slot)
        if shown is not None:
            if shown.version == version:
                return
            if is_still(shown.identity, self._name(slot)):
                shown.version = version
                return
        path = self._name(slot)
        identity = self._space.show(slot, path)
        if identity is not None and identity.n_bytes != self.array.n_chunk_bytes + N_CHECKSUM_BYTES:
            self._shown.pop(slot, None)
            raise _wrong_length(self.array, path, identity.n_bytes)
        self._shown[slot] = _Shown(identity, version)


def read_whole(array: RawArray, n_rows: int) -> np.ndarray:
    """Read the first rows of an array, [n_rows, …], each chunk straight into its place, checksums compared.

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
    if not read_chunk(array, path, target):
        part[...] = 0
    elif not direct:
        part[...] = array.view_chunk(target)[tuple(slice(n) for n in part.shape)]


def read_chunk(array: RawArray, path: str, target: np.ndarray) -> bool:
    """Read a chunk file's values into `target`, uint8 [n_chunk_bytes]; False, and nothing read, when it is absent.

    Raises StoreError naming the file for a wrong length or checksum.
    """
    checksum = bytearray(N_CHECKSUM_BYTES)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
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
    return True
