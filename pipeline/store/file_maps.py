"""Maps files of the local disk into memory, one alone or many side by side, and tells when a file was replaced."""

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
_FIXED = 0x10  # MAP_FIXED, on Linux and macOS; the module doesn't name it
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
_MAP_FAILED = ctypes.c_void_p(-1).value
# What a processor's larger pages hold, where memory is divided into pages of 4 KiB.
N_LARGE_PAGE_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells a file from one that has taken its place: device, inode, size, and time of the last change."""

    device: int
    inode: int
    n_bytes: int
    changed_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class FileMap:
    """A file's bytes, uint8 [n_bytes], read-only, and what the file was when it was mapped.

    As long as the map is held the system gives its inode to no other file, so that an equal FileIdentity means the
    same file. A file that a program cuts shorter while it is mapped ends the process (SIGBUS); zarr never does that,
    it replaces.
    """

    data: np.ndarray
    identity: FileIdentity


class _Mapping:
    """Owns a mapped stretch of memory; NumPy arrays made of it keep it alive."""

    __slots__ = ("address", "n_bytes")

    def __init__(self, handle: int, n_bytes: int, flags: int) -> None:
        self.address, self.n_bytes = _map(None, n_bytes, flags, handle), n_bytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.n_bytes,), "typestr": "|u1", "data": (self.address, True), "version": 3}

    def __del__(self) -> None:
        if hasattr(self, "address"):
            _LIBC.munmap(self.address, self.n_bytes)


def _map(address: int | None, n_bytes: int, flags: int, handle: int) -> int:
    place = _LIBC.mmap(address, n_bytes, mmap.PROT_READ, flags, handle, 0)
    if place == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"can't map {n_bytes} bytes: {os.strerror(number)}")
    return int(place)


class MapSpace:
    """A stretch of address space cut into equal slots, each of which shows one file, or zeros.

    Files side by side in it can be indexed as one array, which a NumPy operation does in one go.
    `slots` is uint8 [n_slots, n_slot_bytes], read-only. Address space costs no memory. Slots of large files begin
    where large pages do: the system can then show a file by them, and random rows need fewer look-ups of addresses.
    """

    def __init__(self, n_slots: int, n_file_bytes: int) -> None:
        self._n_file_bytes = n_file_bytes
        step = N_LARGE_PAGE_BYTES if n_file_bytes >= N_LARGE_PAGE_BYTES else mmap.PAGESIZE
        self._n_slot_bytes = step * -(-n_file_bytes // step)
        n_bytes = n_slots * self._n_slot_bytes
        self._mapping = _Mapping(-1, n_bytes + N_LARGE_PAGE_BYTES, _NOTHING)
        start = -self._mapping.address % N_LARGE_PAGE_BYTES
        self._address = self._mapping.address + start
        self.slots = np.asarray(self._mapping)[start : start + n_bytes].reshape(n_slots, self._n_slot_bytes)

    def show(self, slot: int, path: str) -> FileIdentity | None:
        """Show a file in a slot; shows zeros, and return None, when there is none.

        A file of another length than that of the slot is not shown; look at the identity's `n_bytes`.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.hide(slot)
            return None
        try:
            identity = _make_identity(os.fstat(handle))
            if identity.n_bytes == self._n_file_bytes:
                _map(self._find(slot), self._n_file_bytes, mmap.MAP_SHARED | _FIXED, handle)
            return identity
        finally:
            os.close(handle)

    def hide(self, slot: int) -> None:
        """Show zeros in a slot."""
        _map(self._find(slot), self._n_slot_bytes, _NOTHING | _FIXED, -1)

    def _find(self, slot: int) -> int:
        return self._address + slot * self._n_slot_bytes


def identify_file(path: str) -> FileIdentity | None:
    """Look at the file that has this name now; None when there is none."""
    try:
        return _make_identity(os.stat(path))  # noqa: PTH116  (a Path costs more than the look)
    except FileNotFoundError:
        return None


def is_still(identity: FileIdentity | None, path: str) -> bool:
    """Return whether the file of this name is still that one (None: still absent), cheaper than to identify it anew."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return identity is None
    return (
        identity is not None
        and status.st_mtime_ns == identity.changed_ns
        and status.st_ino == identity.inode
        and status.st_dev == identity.device
        and status.st_size == identity.n_bytes
    )


def map_file(path: str) -> FileMap | None:
    """Map a file; None when there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        identity = _make_identity(os.fstat(handle))
        if not identity.n_bytes:
            return FileMap(np.zeros(0, np.uint8), identity)
        return FileMap(np.asarray(_Mapping(handle, identity.n_bytes, mmap.MAP_SHARED)), identity)
    finally:
        os.close(handle)


def _make_identity(status: os.stat_result) -> FileIdentity:
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
