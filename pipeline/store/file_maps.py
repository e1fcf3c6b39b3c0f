"""Maps files of the local disk into memory, and tells when a file was replaced by another."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

# Python's own mmap keeps a file descriptor for each map, so that a store of 1,000 chunks would use up the usual limit
# of 1,024; the system call itself doesn't.
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Is what tells a file from one that has taken its place: device, inode, size, and time of the last change."""

    device: int
    inode: int
    n_bytes: int
    changed_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class FileMap:
    """Is a file's bytes, uint8 [n_bytes], read-only, and what the file was when it was mapped.

    As long as the map is held the system gives its inode to no other file, so that an equal FileIdentity means the
    same file. A file that a program cuts shorter while it is mapped ends the process (SIGBUS); zarr never does that,
    it replaces.
    """

    data: np.ndarray
    identity: FileIdentity


class _Mapping:
    """Owns a mapped stretch of memory; NumPy arrays made of it keep it alive."""

    __slots__ = ("_address", "_n_bytes")

    def __init__(self, handle: int, n_bytes: int) -> None:
        self._address = _LIBC.mmap(None, n_bytes, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        if self._address == _MAP_FAILED:
            self._address = None
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._n_bytes = n_bytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._n_bytes,), "typestr": "|u1", "data": (self._address, True), "version": 3}

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            _LIBC.munmap(self._address, self._n_bytes)


def identify_file(path: str) -> FileIdentity | None:
    """Looks at the file that has this name now; None when there is none."""
    try:
        return _make_identity(os.stat(path))  # noqa: PTH116  (a Path costs more than the look)
    except FileNotFoundError:
        return None


def map_file(path: str) -> FileMap | None:
    """Maps a file; None when there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        identity = _make_identity(os.fstat(handle))
        if not identity.n_bytes:
            return FileMap(np.zeros(0, np.uint8), identity)
        return FileMap(np.asarray(_Mapping(handle, identity.n_bytes)), identity)
    finally:
        os.close(handle)


def _make_identity(status: os.stat_result) -> FileIdentity:
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
