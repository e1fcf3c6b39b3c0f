"""Reads done rows of an HDF5 store through one memory map of the file: its datasets lie in it in one piece each."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import h5py
import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.file_maps import FileMap, identify_file, map_file
from echoshift.pipeline.store.reading import require_done


class Hdf5Rows:
    """Copies rows out of a mapped HDF5 file.

    The file is changed in place, and the map shows every change at once, in the writer's order: states are looked at
    before and after the copying, so that no row comes back of a shard that is being computed then. (A shard that was
    begun, computed and committed all within the copying would pass; computing takes longer than that.) A file that was
    replaced (`extend`) is mapped anew. Checksums are not compared here: `store verify` does that.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: FileMap | None = None
        self._views: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        self.__init__(path)  # type: ignore[misc]  # a map belongs to a process and is made anew in another

    def read_rows(
        self, name: str, rows: np.ndarray, segment_ids: Sequence[str], clips: np.ndarray | None = None
    ) -> np.ndarray:
        """Copy rows of an output, [n, clip, …], or one clip of each, [n, …].

        Raises StoreError naming the first that is not done.
        """
        with self._lock:
            state, values = self._view("state"), self._view(name)
        require_done(self._path, segment_ids, state[rows])
        copied = values[rows] if clips is None else values[rows, clips]
        require_done(self._path, segment_ids, state[rows])
        return copied

    def _view(self, name: str) -> np.ndarray:
        while not self._is_current():
            self._views.clear()
            self._file = map_file(self._path)
            if self._file is None:
                raise StoreError(f"no feature store at {self._path}")
        if name not in self._views:
            assert self._file is not None, "it is current"
            with h5py.File(self._path, "r", locking=False) as file:
                if name not in file:
                    raise StoreError(f"{self._path} has no array {name!r}")
                offset, shape, dtype = file[name].id.get_offset(), file[name].shape, file[name].dtype
            if not self._is_current():
                return self._view(name)
            if offset is None:
                raise StoreError(f"{self._path}: {name} has no space of its own in the file; extract it anew")
            n_values = int(np.prod(shape, dtype=np.int64))
            self._views[name] = np.frombuffer(self._file.data, dtype, n_values, offset).reshape(shape)
        return self._views[name]

    def _is_current(self) -> bool:
        """Return whether the mapped file is still the one of that name; its time of change says nothing here."""
        now = identify_file(self._path)
        if self._file is None or now is None:
            return False
        held = self._file.identity
        return (held.device, held.inode, held.n_bytes) == (now.device, now.inode, now.n_bytes)
