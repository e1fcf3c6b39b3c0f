"""Features in one local HDF5 file whose space is allocated at creation, so that no kill can damage it.

Every dataset is contiguous and allocated early: writing rows changes raw data only, never the file's metadata. The file
is opened for each write and closed again, without HDF5's own lock (hold_store has one), so that reading never stops a
run. `checksums/` keeps a crc32c of each shard of each array. HDF5 is local and single-writer; for several machines use
Zarr.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import (
    Backend,
    FeatureStore,
    ShardIndex,
    VerifyFault,
    plan_begun_states,
    require_done,
)
from echoshift.pipeline.store.layout import (
    DONE,
    ROW_ARRAYS,
    Shard,
    StoreLayout,
    encode_segment_ids,
    measure_id_bytes,
    pack_attributes,
    plan_arrays,
    plan_shards,
    unpack_attributes,
)
from echoshift.pipeline.store.location import tell_store_faults

# No checksum, as in a store that is new.
UNSEALED = 0


def create_hdf5_store(
    path: Path, spec: FeatureSpec, layout: StoreLayout, segment_ids: Sequence[str], attributes: Mapping[str, Any]
) -> None:
    """Create an empty store at a path that must not exist; the caller renames it into place."""
    with h5py.File(path, "w-", libver=("earliest", "v110")) as file:
        file.attrs.update(pack_attributes(attributes))
        for array in plan_arrays(spec, layout):
            _create_dataset(file, array.name, array.shape, array.dtype)
            _create_dataset(file, f"checksums/{array.name}", (layout.n_shards,), "uint32")
        file["segment_id"][:] = encode_segment_ids(segment_ids, layout.n_id_bytes)
        for shard in plan_shards(layout):
            _write_checksum(file, "segment_id", shard)


def _create_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_ALLOC)
    parent, _, leaf = name.rpartition("/")
    group = file.require_group(parent) if parent else file
    h5py.h5d.create(
        group.id,
        leaf.encode(),
        h5py.h5t.py_create(np.dtype(dtype), logical=True),
        h5py.h5s.create_simple(shape),
        dcpl=properties,
    )


def _write_checksum(file: h5py.File, name: str, shard: Shard) -> None:
    rows = np.ascontiguousarray(file[name][shard.start_row : shard.stop_row])
    file[f"checksums/{name}"][shard.index] = google_crc32c.value(rows)


def _is_sealed_right(file: h5py.File, name: str, shard: Shard) -> bool:
    """Compare a shard of an array with its checksum; a shard that was being written when its writer died has none."""
    checksum = int(file[f"checksums/{name}"][shard.index])
    rows = np.ascontiguousarray(file[name][shard.start_row : shard.stop_row])
    return checksum == UNSEALED or bool(google_crc32c.value(rows) == checksum)


def _identify(status: os.stat_result) -> tuple[int, ...]:
    """Return what differs where a file was replaced; it is changed in place, so that its time says nothing."""
    return status.st_dev, status.st_ino, status.st_size


@tell_store_faults
class Hdf5FeatureStore(FeatureStore):
    """A FeatureStore in one HDF5 file; opened for each access, so it can be pickled and shared by processes."""

    backend: Backend = "hdf5"

    def __init__(self, path: Path, spec: FeatureSpec, layout: StoreLayout) -> None:
        super().__init__(str(path), spec, layout)
        self._maps: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a map belongs to one process

    @contextmanager
    def _open(self, mode: str = "r") -> Iterator[h5py.File]:
        try:
            file = h5py.File(self.path, mode, locking=False)
        except OSError as error:
            raise StoreError(
                f"{self.path} can't be opened: {error}; if it is damaged, delete it and extract"
            ) from error
        with file:
            yield file

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The store's attributes as written at its creation."""
        with self._open() as file:
            return unpack_attributes(file.attrs)

    def read_array(self, name: str, start_row: int = 0, stop_row: int | None = None) -> np.ndarray:
        """Read rows of any array."""
        with self._open() as file:
            if name not in file:
                raise StoreError(f"{self.path} has no array {name!r}")
            return np.asarray(file[name][start_row : self.layout.n_rows if stop_row is None else stop_row])

    def _copy_rows(
        self, output: str, rows: np.ndarray, segment_ids: Sequence[str], clips: np.ndarray | None
    ) -> np.ndarray:
        """Copy rows out of memory maps, which show every change in the writer's order.

        States are compared before and after copying, so that no row of a shard that is being computed comes back.
        Checksums are not compared here: `store verify` does that.
        """
        state, values = self._map("state"), self._map(f"outputs/{output}")
        require_done(self.path, segment_ids, state[rows])
        copied = values[rows] if clips is None else values[rows, clips]
        require_done(self.path, segment_ids, state[rows])
        return copied

    def _map(self, name: str) -> np.ndarray:
        """Map a dataset, which lies in the file in one piece, again where the file was replaced (`extend`)."""
        held = self._maps.get(name)
        if held is not None and held[0] == _identify(os.stat(self.path)):  # noqa: PTH116
            return held[1]
        with Path(self.path).open("rb") as raw:
            identity = _identify(os.fstat(raw.fileno()))
            with h5py.File(raw, "r") as file:
                if name not in file:
                    raise StoreError(f"{self.path} has no array {name!r}")
                offset, shape, dtype = file[name].id.get_offset(), file[name].shape, file[name].dtype
            if offset is None:
                raise StoreError(f"{self.path}: {name} has no space of its own in the file; extract it again")
            view = np.asarray(np.memmap(raw, dtype, "r", offset, shape))
        self._maps[name] = identity, view
        return view

    def extend(self, segment_ids: Sequence[str], n_clips: int) -> None:
        """Append rows by writing a larger file beside this one and replacing it."""
        ids = [*self.segment_ids, *segment_ids]
        layout = self._plan_extended(ids, n_clips, max(self.layout.n_id_bytes, measure_id_bytes(ids)))
        attributes = {**self.attributes, **{f: getattr(layout, f) for f in ("n_rows", "n_clips", "n_id_bytes")}}
        larger = Path(f"{self.path}.creating-{os.getpid()}")
        create_hdf5_store(larger, self.spec, layout, ids, attributes)
        with self._open() as old, h5py.File(larger, "r+") as new:
            for array in plan_arrays(self.spec, layout):
                if array.name == "segment_id":
                    continue
                for shard in plan_shards(self.layout):
                    rows = old[array.name][shard.start_row : shard.stop_row]
                    new[array.name][(slice(shard.start_row, shard.stop_row), *map(slice, rows.shape[1:]))] = rows
                # Of the new shards: the last of the old ones may have grown.
                for shard in plan_shards(layout)[: self.layout.n_shards]:
                    _write_checksum(new, array.name, shard)
        larger.replace(self.path)
        self.layout, self._segment_ids, self._finder = layout, ids, None

    def get_output_chunks(self, name: str) -> tuple[int, int]:
        """Return how many rows and clips are written at a time: HDF5's own layout is contiguous."""
        arrays = {array.name: array for array in plan_arrays(self.spec, self.layout)}
        n_rows, n_clips = arrays[f"outputs/{name}"].chunks[:2]
        return n_rows, n_clips

    def read_outputs(
        self, name: str, start_row: int, stop_row: int, start_clip: int = 0, stop_clip: int | None = None
    ) -> np.ndarray:
        """Read some clips of some rows of one output."""
        with self._open() as file:
            return np.asarray(file[f"outputs/{name}"][start_row:stop_row, start_clip:stop_clip])

    def begin_shard(self, shard: Shard, kept_rows: Sequence[int] = ()) -> None:
        """Set the shard's rows to pending but those kept, which are compared with their checksums first.

        The checksums of a shard that keeps rows are 0 until it is committed: its other rows change beside them.
        """
        states = self.read_array("state", shard.start_row, shard.stop_row)
        begun = plan_begun_states(shard, states, kept_rows)
        if len(kept_rows):
            self._unseal(shard)
        if (states != begun).any():
            with self._open("r+") as file:
                file["state"][shard.start_row : shard.stop_row] = begun

    def _unseal(self, shard: Shard) -> None:
        """Set a shard's checksums to 0; raises StoreError where one is wrong, which would be made right otherwise."""
        names = [array.name for array in plan_arrays(self.spec, self.layout) if array.name != "segment_id"]
        with self._open() as file:
            for name in names:
                if not _is_sealed_right(file, name, shard):
                    raise StoreError(
                        f"{self.path}: {name} rows {shard.start_row} to {shard.stop_row}: checksum; "
                        f"`echoshift store verify` lists every fault"
                    )
        with self._open("r+") as file:
            for name in names:
                file[f"checksums/{name}"][shard.index] = UNSEALED

    def write_outputs(self, name: str, start_row: int, values: np.ndarray, start_clip: int = 0) -> None:
        """Write clips of rows of one output."""
        rows, clips = slice(start_row, start_row + values.shape[0]), slice(start_clip, start_clip + values.shape[1])
        with self._open("r+") as file:
            file[f"outputs/{name}"][rows, clips] = values

    def clear_outputs(self, name: str, start_row: int, stop_row: int, start_clip: int, stop_clip: int) -> None:
        """Write zeros."""
        with self._open("r+") as file:
            file[f"outputs/{name}"][start_row:stop_row, start_clip:stop_clip] = 0

    def commit_shard(self, shard: Shard, index: ShardIndex) -> None:
        """Write checksums of the outputs, then the shard's index, `state` last, each step flushed before the next."""
        rows = slice(shard.start_row, shard.stop_row)
        with self._open("r+") as file:
            keeps_rows = bool((file["state"][rows] == DONE).any())
            for output in self.spec.outputs:
                _write_checksum(file, f"outputs/{output.name}", shard)
            for name in ROW_ARRAYS:
                values = getattr(index, name)
                if name != "state" and values is not None:
                    file[name][rows] = values
                    _write_checksum(file, name, shard)
            if not keeps_rows:
                file["checksums/state"][shard.index] = google_crc32c.value(np.asarray(index.state, np.uint8).tobytes())
            file.flush()
            file["state"][rows] = index.state
            if keeps_rows:  # of a shard with done rows no checksum is better than one that is wrong for a moment
                file.flush()
                _write_checksum(file, "state", shard)

    def find_checksum_faults(self) -> list[VerifyFault]:
        """Compare each shard of each array, where rows are done, with its checksum."""
        faults = []
        state = self.read_array("state")
        with self._open() as file:
            for array in plan_arrays(self.spec, self.layout):
                for shard in plan_shards(self.layout):
                    if not (state[shard.start_row : shard.stop_row] == DONE).any():
                        continue
                    if not _is_sealed_right(file, array.name, shard):
                        first_id = self.segment_ids[shard.start_row]
                        faults.append(
                            VerifyFault(array.name, first_id, f"rows {shard.start_row} to {shard.stop_row}: checksum")
                        )
        return faults
