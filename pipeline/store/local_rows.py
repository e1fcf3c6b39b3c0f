"""Reads done rows of a local Zarr store through memory maps, never rows of a shard that is being written."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from echoshift.pipeline.store.file_maps import FileMap, is_still
from echoshift.pipeline.store.interface import require_done
from echoshift.pipeline.store.raw_chunks import ChunkMaps, RawArray, is_whole, make_checksum_error, map_chunk


class LocalRows:
    """Copies rows out of chunk files that are mapped once and kept.

    What is guaranteed, whatever other processes write meanwhile, as long as they write as FORMAT.md says (state first,
    files replaced and not changed in place): the values of a row are all those of one commit, and it was the newest
    one at some moment between call and return. A row that was recomputed before the call comes back recomputed. So the
    store's `state` files are looked at on every call, before and after the copying; chunk files are looked at whenever
    a `state` file was replaced since. On a network file system this holds as far as its attributes are up to date.
    Checksums of features are not compared here: `read_all` and `store verify` do that.
    """

    def __init__(self, path: str, state: RawArray) -> None:
        self._path = path
        self._state = state
        self._files: list[FileMap | None] = [None] * math.ceil(state.shape[0] / state.chunks[0])
        self._names = [state.name_chunk(i, 0) for i in range(len(self._files))]
        self._states = np.zeros(state.shape[0], np.uint8)
        self._version = 0
        self._maps: dict[str, ChunkMaps] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[str, RawArray]:
        return self._path, self._state

    def __setstate__(self, given: tuple[str, RawArray]) -> None:
        self.__init__(*given)  # type: ignore[misc]  # maps belong to a process and are made anew in another

    def read_rows(
        self, array: RawArray, rows: np.ndarray, segment_ids: Sequence[str], clips: np.ndarray | None = None
    ) -> np.ndarray:
        """Copy rows of an output, [n, clip, …], or one clip of each, [n, …].

        Raises StoreError naming the first that is not done.
        """
        with self._lock:
            maps = self._maps.get(array.folder)
            if maps is None:
                maps = self._maps[array.folder] = ChunkMaps(array)
            while True:
                self._look_at_states()
                require_done(self._path, segment_ids, self._states[rows])
                version = self._version
                values = maps.copy_rows(rows, version, clips)
                self._look_at_states()
                if self._version == version:
                    return values
                # Another shard's commit replaces the same file of states: only the rows that were copied matter.
                require_done(self._path, segment_ids, self._states[rows])
                if maps.are_current(rows):
                    return values

    def _look_at_states(self) -> None:
        for i, name in enumerate(self._names):
            held = self._files[i]
            if not is_still(None if held is None else held.identity, name):
                self._reread_states(i, name)

    def _reread_states(self, i: int, name: str) -> None:
        mapped = map_chunk(self._state, name)
        if mapped is not None and not is_whole(self._state, mapped.data):
            raise make_checksum_error(name)
        start = i * self._state.chunks[0]
        rows = self._states[start : start + self._state.chunks[0]]
        rows[:] = 0 if mapped is None else mapped.data[: len(rows)]
        self._files[i] = mapped
        self._version += 1
