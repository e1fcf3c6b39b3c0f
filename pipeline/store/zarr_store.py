"""Features in a Zarr v3 group: uncompressed chunks with a crc32c each, one file a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync

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
    plan_arrays,
)
from echoshift.pipeline.store.local_reader import ChunkFiles, LocalReader, describe_chunk_files
from echoshift.pipeline.store.location import Place, tell_store_faults


def create_zarr_store(
    path: Path, spec: FeatureSpec, layout: StoreLayout, segment_ids: Sequence[str], attributes: Mapping[str, Any]
) -> None:
    """Create an empty store at a path that must not exist; the caller renames it into place."""
    group = zarr.create_group(str(path), zarr_format=3, attributes=dict(attributes))
    for array in plan_arrays(spec, layout):
        group.create_array(
            array.name,
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            fill_value=0,
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
    _array(group, "segment_id")[:] = encode_segment_ids(segment_ids, layout.n_id_bytes)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{name} of {group.store_path} is not an array; the store is damaged, delete it and extract")
    return array


@tell_store_faults
class ZarrFeatureStore(FeatureStore):
    """A FeatureStore in a folder of Zarr v3; any zarr library reads it (FORMAT.md)."""

    backend: Backend = "zarr"

    def __init__(self, path: Place, group: zarr.Group, spec: FeatureSpec, layout: StoreLayout) -> None:
        super().__init__(str(path), spec, layout)
        self._group = group
        self._arrays: dict[str, zarr.Array] = {}
        self._files: dict[str, ChunkFiles | None] = {}
        self._reader: LocalReader | None = None

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The store's attributes as written at its creation."""
        return dict(self._group.attrs)

    def _open_array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            try:
                self._arrays[name] = _array(self._group, name).with_config({"write_empty_chunks": True})
            except KeyError as error:
                raise StoreError(f"{self.path} has no array {name!r}") from error
        return self._arrays[name]

    def read_array(self, name: str, start_row: int = 0, stop_row: int | None = None) -> np.ndarray:
        """Read rows of any array; raises StoreError if a chunk's checksum is wrong."""
        return self._read_part(name, start_row, self.layout.n_rows if stop_row is None else stop_row)

    def _read_part(self, name: str, start_row: int, stop_row: int, *clips: slice) -> np.ndarray:
        try:
            return np.asarray(self._open_array(name)[(slice(start_row, stop_row), *clips)])
        except ValueError as error:
            raise self._make_read_error(name, start_row, stop_row, error) from error

    def _make_read_error(self, name: str, start_row: int, stop_row: int, error: ValueError) -> StoreError:
        return StoreError(
            f"{self.path}: {name} rows {start_row} to {stop_row}: {error}; `echoshift store verify` lists every fault"
        )

    def _copy_rows(
        self, output: str, rows: np.ndarray, segment_ids: Sequence[str], clips: np.ndarray | None
    ) -> np.ndarray:
        """Copy rows; LocalReader says what holds while others write. On a URL whole rows are read."""
        local = self._find_local(f"outputs/{output}")
        if local is not None:
            return local[0].read_rows(local[1], rows, segment_ids, clips)
        require_done(self.path, segment_ids, self.read_array("state")[rows])
        values = np.asarray(self._open_array(f"outputs/{output}").oindex[rows])
        return values if clips is None else values[np.arange(len(rows)), clips]

    def _find_local(self, name: str) -> tuple[LocalReader, ChunkFiles] | None:
        """Find the files behind an output of a local store; None where zarr has to read it."""
        array = self._describe(name)
        if self._reader is None and (state := self._describe("state")) is not None:
            self._reader = LocalReader(self.path, state)
        return None if array is None or self._reader is None else (self._reader, array)

    def _describe(self, name: str) -> ChunkFiles | None:
        if name not in self._files:
            self._files[name] = describe_chunk_files(self._open_array(name))
        return self._files[name]

    def _write_rows(self, name: str, start_row: int, values: np.ndarray) -> None:
        """Write rows of an array of the index."""
        try:
            self._open_array(name)[start_row : start_row + len(values)] = values
        except ValueError as error:  # a chunk that keeps rows beside them is read first
            raise self._make_read_error(name, start_row, start_row + len(values), error) from error

    def extend(self, segment_ids: Sequence[str], n_clips: int) -> None:
        """Append rows; a kill in between leaves longer arrays that the next call puts right."""
        old_rows, ids = self.layout.n_rows, [*self.segment_ids, *segment_ids]
        layout = self._plan_extended(ids, n_clips, self.layout.n_id_bytes)
        longest = max(ids, key=lambda s: len(s.encode()))
        if len(longest.encode()) > layout.n_id_bytes:
            raise StoreError(
                f"segment id {longest!r} is longer than the {layout.n_id_bytes} bytes {self.path} keeps for an id; "
                f"delete the store and extract it again, or shorten the id"
            )
        for array in plan_arrays(self.spec, layout):
            self._open_array(array.name).resize(array.shape)
        self._open_array("segment_id")[old_rows:] = encode_segment_ids(segment_ids, layout.n_id_bytes)
        self._group.attrs.update({"n_rows": layout.n_rows, "n_clips": layout.n_clips})
        self.layout, self._segment_ids, self._finder, self._reader = layout, ids, None, None
        self._arrays.clear()
        self._files.clear()

    def read_outputs(
        self, name: str, start_row: int, stop_row: int, start_clip: int = 0, stop_clip: int | None = None
    ) -> np.ndarray:
        """Read some clips of some rows of one output; raises StoreError if a chunk's checksum is wrong."""
        return self._read_part(f"outputs/{name}", start_row, stop_row, slice(start_clip, stop_clip))

    def get_output_chunks(self, name: str) -> tuple[int, int]:
        """Return how many rows and clips one chunk of an output holds."""
        n_rows, n_clips = self._open_array(f"outputs/{name}").chunks[:2]
        return n_rows, n_clips

    def begin_shard(self, shard: Shard, kept_rows: Sequence[int] = ()) -> None:
        """Set the shard's rows to pending but those kept, whose values each chunk that is written has again."""
        states = self.read_array("state", shard.start_row, shard.stop_row)
        begun = plan_begun_states(shard, states, kept_rows)
        if (states != begun).any():
            self._write_rows("state", shard.start_row, begun)

    def write_outputs(self, name: str, start_row: int, values: np.ndarray, start_clip: int = 0) -> None:
        """Write whole chunks of one output."""
        array = self._open_array(f"outputs/{name}")
        stop_row, stop_clip = start_row + values.shape[0], start_clip + values.shape[1]
        assert start_row % array.chunks[0] == 0, "rows must begin at a chunk's border"
        assert stop_row % array.chunks[0] == 0 or stop_row == self.layout.n_rows, "rows must end at a chunk's border"
        assert start_clip % array.chunks[1] == 0, "clips must begin at a chunk's border"
        assert stop_clip % array.chunks[1] == 0 or stop_clip == array.shape[1], "clips must end at a chunk's border"
        array[start_row:stop_row, start_clip:stop_clip] = values

    def clear_outputs(self, name: str, start_row: int, stop_row: int, start_clip: int, stop_clip: int) -> None:
        """Remove whole chunks of one output: zarr drops a chunk that holds nothing but the fill value."""
        array = self._open_array(f"outputs/{name}").with_config({"write_empty_chunks": False})
        array[start_row:stop_row, start_clip:stop_clip] = 0

    def commit_shard(self, shard: Shard, index: ShardIndex) -> None:
        """Write the shard's index, `state` last."""
        for name in ROW_ARRAYS:
            values = getattr(index, name)
            if values is not None:
                self._write_rows(name, shard.start_row, values)

    def find_checksum_faults(self) -> list[VerifyFault]:
        """Read every chunk that holds a done row."""
        names = [array.name for array in plan_arrays(self.spec, self.layout)]
        return find_chunk_faults(self._open_array, names, self.segment_ids)


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
    raw = describe_chunk_files(array)
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


def _list_chunks(array: zarr.Array, raw: ChunkFiles | None) -> set[str]:
    """List the chunks that are there, `c/0/0`, in one go: asking for each takes a request each on a remote store."""
    if raw is not None:
        folder = Path(raw.folder)
        return {path.relative_to(folder).as_posix() for path in folder.glob("c/" + "/".join("*" * array.ndim))}
    prefix = f"{array.store_path.path}/" if array.store_path.path else ""

    async def list_keys() -> set[str]:
        return {key.removeprefix(prefix) async for key in array.store_path.store.list_prefix(f"{prefix}c/")}

    return sync(list_keys())


def _check_file(files: ChunkFiles, name: str) -> str:
    try:
        data = Path(files.folder, name).read_bytes()
    except FileNotFoundError:
        return "was removed while it was checked"
    return files.find_fault(len(data), data)


def _check_remote(array: zarr.Array, start: int, stop: int, side: int) -> str:
    clips = (slice(side * array.chunks[1], (side + 1) * array.chunks[1]),) if array.ndim > 1 else ()
    try:
        np.asarray(array[(slice(start, stop), *clips)])
    except ValueError as error:
        return f"can't be read: {error}"
    return ""
