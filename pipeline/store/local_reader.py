"""Rows of a local Zarr store through memory maps of its chunk files, never rows of a shard that is being written."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.interface import require_done

N_CHECKSUM_BYTES = 4
MAX_MAPS = 256  # each keeps a file descriptor

FileIdentity = tuple[int, int, int, int]


def identify_file(path: str) -> FileIdentity | None:
    """Return what changes when a file is replaced (device, inode, bytes, time of change); None where it is absent."""
    try:
        facts = os.stat(path)  # noqa: PTH116  (a Path is as slow as the call)
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@dataclass(frozen=True, slots=True)
class ChunkFiles:
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
        """The number of chunks side by side along the clips; 1 without an axis of clips."""
        return math.ceil(self.shape[1] / self.chunks[1]) if len(self.shape) > 1 else 1

    def name_chunk(self, row_chunk: int, clip_chunk: int) -> str:
        """Return a chunk's path."""
        places = [str(row_chunk), str(clip_chunk), *["0"] * (len(self.shape) - 2)][: len(self.shape)]
        return "/".join([self.folder, "c", *places])

    def find_fault(self, n_bytes: int, data: bytes | None = None) -> str:
        """Describe what is wrong with a chunk file of this length and, if given, content; "" where nothing is."""
        n_right = self.n_chunk_bytes + N_CHECKSUM_BYTES
        if n_bytes != n_right:
            return f"has {n_bytes} bytes instead of {n_right}"
        if data is not None:
            stored = int.from_bytes(data[self.n_chunk_bytes :], "little")
            if google_crc32c.value(data[: self.n_chunk_bytes]) != stored:
                return "has a crc32c that is not that of its content"
        return ""


def describe_chunk_files(array: zarr.Array) -> ChunkFiles | None:
    """Describe an array of a local folder; None elsewhere, or where its chunks are not the plain ones of FORMAT.md."""
    store, metadata = array.store_path.store, array.metadata
    codecs = tuple(getattr(metadata, "codecs", ()))
    plain = (
        len(codecs) == 2
        and isinstance(codecs[0], BytesCodec)
        and isinstance(codecs[1], Crc32cCodec)
        and array.dtype == array.dtype.newbyteorder("<")
        and tuple(array.chunks[2:]) == tuple(array.shape[2:])
        and getattr(getattr(metadata, "chunk_key_encoding", None), "separator", None) == "/"
    )
    if not plain or not isinstance(store, LocalStore):
        return None
    folder = Path(store.root, array.store_path.path).absolute()
    return ChunkFiles(str(folder), tuple(array.shape), tuple(array.chunks), np.dtype(array.dtype))


class LocalReader:
    """Copies rows out of chunk files that are mapped, the last MAX_MAPS of them kept.

    Whatever other processes write meanwhile, as long as they write as FORMAT.md says (state first, files replaced and
    not changed in place): the values of a row are all those of one commit, and it was the newest at some moment
    between call and return. So the `state` files are looked at before and after the copying. On a network file system
    this holds as far as its attributes are up to date. Checksums of features are not compared here.
    """

    def __init__(self, path: str, state: ChunkFiles) -> None:
        self._path, self._state = path, state
        self._states = np.zeros(state.shape[0], np.uint8)
        # The maps are kept: as long as a file is held the system gives its inode to no other.
        n_files = math.ceil(state.shape[0] / state.chunks[0])
        self._state_files: list[tuple[FileIdentity, np.ndarray] | None] = [None] * n_files
        self._maps: OrderedDict[str, tuple[FileIdentity, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[LocalReader], tuple[str, ChunkFiles]]:
        return LocalReader, (self._path, self._state)

    def read_rows(
        self, array: ChunkFiles, rows: np.ndarray, segment_ids: Sequence[str], clips: np.ndarray | None = None
    ) -> np.ndarray:
        """Copy rows of an output, [n, clip, …], or one clip of each, [n, …].

        Raises StoreError naming the first that is not done, or a chunk of a wrong length.
        """
        with self._lock:
            while True:
                self._update_states()
                require_done(self._path, segment_ids, self._states[rows])
                values, shown = self._copy_rows(array, rows, clips)
                if not self._update_states():
                    return values
                # Another shard's commit replaces the same file of states: only the rows that were copied matter.
                require_done(self._path, segment_ids, self._states[rows])
                if all(identify_file(path) == identity for path, identity in shown.items()):
                    return values

    def _update_states(self) -> bool:
        """Read the files of states that were replaced since the last look; return whether one was."""
        changed = False
        for i, held in enumerate(self._state_files):
            path = self._state.name_chunk(i, 0)
            now = identify_file(path)
            if now == (held and held[0]):
                continue
            part = self._states[i * self._state.chunks[0] :][: self._state.chunks[0]]
            if now is None:
                part[:], self._state_files[i] = 0, None
            else:
                data = np.memmap(path, np.uint8, "r") if now[2] else np.zeros(0, np.uint8)
                if fault := self._state.find_fault(len(data), data.tobytes()):
                    raise StoreError(f"{path} {fault}; `echoshift store verify` lists every fault")
                part[:], self._state_files[i] = data[: len(part)], (now, data)
            changed = True
        return changed

    def _copy_rows(
        self, array: ChunkFiles, rows: np.ndarray, clips: np.ndarray | None
    ) -> tuple[np.ndarray, dict[str, FileIdentity | None]]:
        """Copy rows, zeros where a chunk is absent; return them with the files that they come from."""
        size, width = array.chunks[:2]
        result = np.zeros((len(rows), *array.shape[1 if clips is None else 2 :]), array.dtype)
        row_chunks = rows // size
        order = np.argsort(row_chunks, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(row_chunks[order])) + 1) if len(rows) else []
        shown: dict[str, FileIdentity | None] = {}
        for group in groups:
            for side in range(array.n_clip_chunks):
                chosen = group if clips is None else group[clips[group] // width == side]
                if not len(chosen):
                    continue
                path = array.name_chunk(int(row_chunks[chosen[0]]), side)
                shown[path], values = self._map(array, path)
                if values is None:
                    continue
                places = rows[chosen] % size
                if clips is None:
                    n_clips = min(width, array.shape[1] - side * width)
                    result[chosen, side * width : side * width + n_clips] = values[places, :n_clips]
                else:
                    result[chosen] = values[places, clips[chosen] % width]
        return result, shown

    def _map(self, array: ChunkFiles, path: str) -> tuple[FileIdentity | None, np.ndarray | None]:
        """Map a chunk file, [row, clip, …], again where it was replaced."""
        # Its identity first: a file that is replaced before it is mapped differs at the second look.
        identity = identify_file(path)
        if identity is None:
            return None, None
        held = self._maps.pop(path, None)
        if held is None or held[0] != identity:
            if fault := array.find_fault(identity[2]):
                raise StoreError(f"{path} {fault}; `echoshift store verify` lists every fault")
            held = identity, np.memmap(path, array.dtype, "r", shape=array.chunks)
        self._maps[path] = held
        if len(self._maps) > MAX_MAPS:
            self._maps.popitem(last=False)
        return held
