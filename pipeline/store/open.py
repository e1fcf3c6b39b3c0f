"""Name, create, open and list the stores below a cache, a folder or a URL."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.pipeline.errors import StoreError, StoreFullError, find_nearest, suggest
from echoshift.pipeline.specs import FeatureSpec, fingerprint
from echoshift.pipeline.store.interface import Backend, FeatureStore
from echoshift.pipeline.store.layout import (
    DONE,
    FAILED,
    ArrayLayout,
    StoreLayout,
    make_attributes,
    measure_id_bytes,
    parse_attributes,
    plan_arrays,
    plan_shards,
    unpack_attributes,
)
from echoshift.pipeline.store.location import (
    STORAGE_OPTIONS,
    Location,
    Place,
    count_free_bytes,
    find_existing,
    locate,
    telling_faults,
)
from echoshift.pipeline.store.lock import hold_store

__all__ = ["create_store", "has_store", "hold_store", "list_stores", "name_store", "open_store"]

ENDINGS: dict[Backend, str] = {"zarr": ".zarr", "hdf5": ".h5"}
ROOT_METADATA = "zarr.json"


def name_store(cache: Place, dataset: str, spec: FeatureSpec, backend: Backend) -> Location:
    """Return a store's place: <cache>/<dataset>/<encoder>-<fingerprint>.zarr or .h5; .h5 on a URL is a StoreError."""
    place = locate(cache) / dataset / f"{spec.encoder}-{fingerprint(spec)}{ENDINGS[backend]}"
    _refuse_remote_hdf5(place)
    return place


def has_store(place: Place) -> bool:
    """Return whether a store is there; on an object store, once its root's metadata are, which are written last."""
    path = locate(place)
    return (path / ROOT_METADATA).exists() if path.is_remote else path.exists()


def open_store(place: Place) -> FeatureStore:
    """Open a store of either backend; raises StoreError when nothing is there, or no store of echoshift."""
    path = locate(place)
    _refuse_remote_hdf5(path)
    if path.suffix == ENDINGS["zarr"]:
        import zarr

        from echoshift.pipeline.store.zarr_store import ZarrFeatureStore

        if path.is_remote and not has_store(path):
            raise StoreError(f"no feature store at {path}; {_suggest_store(path)}")
        try:
            with telling_faults(path):
                if path.is_remote:
                    remote = zarr.storage.FsspecStore.from_url(str(path), storage_options=dict(STORAGE_OPTIONS))
                    group = zarr.open_group(remote, mode="r+", zarr_format=3)
                else:
                    group = zarr.open_group(str(path), mode="r+" if os.access(path, os.W_OK) else "r", zarr_format=3)
                attributes = dict(group.attrs)
        except (StoreError, ValueError) as error:
            if isinstance(error, ValueError) or isinstance(error.__cause__, FileNotFoundError):
                raise StoreError(f"no feature store at {path}; {_suggest_store(path)}") from error
            raise
        return ZarrFeatureStore(path, group, *parse_attributes(str(path), attributes))
    if path.suffix == ENDINGS["hdf5"]:
        import h5py

        from echoshift.pipeline.store.hdf5_store import Hdf5FeatureStore

        try:
            with h5py.File(path, "r", locking=False) as file:
                attributes = unpack_attributes(file.attrs)
        except OSError as error:
            raise StoreError(f"no feature store at {path}: {error}; {_suggest_store(path)}") from error
        return Hdf5FeatureStore(Path(path), *parse_attributes(str(path), attributes))
    raise StoreError(f"{path} ends in neither .zarr nor .h5, so it is no store; {_suggest_store(path)}")


def _suggest_store(path: Location) -> str:
    """Describe which store may have been meant: one beside the place that was named, or what lists them."""
    cache = path.parent.parent
    near = find_nearest(path.name, [] if path.is_remote else [store.name for store in list_stores(cache)])
    listed_by = f"echoshift store ls --cache {cache}"
    return suggest(path.name, near, listed_by=listed_by) if near else f"`{listed_by}` lists all"


def _refuse_remote_hdf5(path: Location) -> None:
    if path.is_remote and path.suffix == ENDINGS["hdf5"]:
        raise StoreError(f"{path}: HDF5 is local and single-writer; on a URL use Zarr (--backend zarr)")


def create_store(
    place: Place,
    dataset: str,
    spec: FeatureSpec,
    segment_ids: Sequence[str],
    *,
    n_clips: int,
    manifest_sha256: str,
    weights_source: str,
    n_rows_per_shard: int,
    encoder_source: str = "",
) -> FeatureStore:
    """Create an empty store so that a half-made one is never seen.

    `encoder_source` says which distribution an encoder from outside came from.

    On a disk it is made beside its place and renamed; on an object store the root's metadata come last, and whatever
    lies there without them is a leftover and goes first. Raises StoreError where a store exists already.
    """
    path = locate(place)
    _refuse_remote_hdf5(path)
    if has_store(path):
        raise StoreError(f"{path} exists already")
    layout = StoreLayout(len(segment_ids), n_clips, n_rows_per_shard, measure_id_bytes(segment_ids))
    attributes = make_attributes(dataset, spec, layout, manifest_sha256, weights_source, encoder_source)
    if path.is_remote:
        with tempfile.TemporaryDirectory(prefix="echoshift-") as folder:
            fresh = Path(folder) / path.name
            _create_empty(fresh, spec, layout, segment_ids, attributes)
            path.remove_tree()
            path.upload(fresh, last=ROOT_METADATA)
        return open_store(path)
    if path.suffix == ENDINGS["hdf5"]:  # which allocates everything now, and would write zeros until the disk is full
        n_bytes = sum(_count_bytes(array, layout.n_rows) for array in plan_arrays(spec, layout))
        check_space([(path, n_bytes)])
    path.make_parent()
    local = Path(path)
    with telling_faults(path):
        for leftover in local.parent.glob(f"{local.name}.creating-*"):
            _remove(leftover)
        fresh = local.with_name(f"{local.name}.creating-{os.getpid()}")
        try:
            _create_empty(fresh, spec, layout, segment_ids, attributes)
        except OSError:
            _remove(fresh)  # a full disk must not stay fuller
            raise
        fresh.rename(local)
    return open_store(path)


def _create_empty(
    fresh: Path, spec: FeatureSpec, layout: StoreLayout, segment_ids: Sequence[str], attributes: Mapping[str, Any]
) -> None:
    if fresh.name.partition(".creating-")[0].endswith(ENDINGS["zarr"]):
        from echoshift.pipeline.store.zarr_store import create_zarr_store

        create_zarr_store(fresh, spec, layout, segment_ids, attributes)
    else:
        from echoshift.pipeline.store.hdf5_store import create_hdf5_store

        create_hdf5_store(fresh, spec, layout, segment_ids, attributes)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_stores(cache: Place) -> list[Location]:
    """List the stores below a cache, sorted."""
    root = locate(cache)
    endings = [ENDINGS["zarr"]] if root.is_remote else list(ENDINGS.values())
    found = [path for ending in endings for path in root.list_folders_and_files(f"*/*{ending}")]
    return sorted((path for path in found if has_store(path)), key=str)


N_CHECKSUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class StoreListing:
    """One store in numbers; `outputs` are the shapes of one clip by name, `n_bytes` is what it takes on disk."""

    store: str
    dataset: str
    encoder: str
    fingerprint: str
    outputs: Mapping[str, tuple[int, ...]]
    n_clips: int
    dtype: str
    n_done: int
    n_failed: int
    n_rows: int
    n_bytes: int


def summarise_stores(cache: Place) -> list[StoreListing]:
    """Sum up every store below a cache, by path; raises StoreError naming one that can't be opened."""
    summaries = []
    for path in list_stores(cache):
        store = open_store(path)
        state = store.read_array("state")
        summaries.append(
            StoreListing(
                store=str(path),
                dataset=str(store.attributes["dataset"]),
                encoder=store.spec.encoder,
                fingerprint=fingerprint(store.spec),
                outputs={output.name: output.shape for output in store.spec.outputs},
                n_clips=store.layout.n_clips,
                dtype=store.spec.dtype,
                n_done=int((state == DONE).sum()),
                n_failed=int((state == FAILED).sum()),
                n_rows=store.layout.n_rows,
                n_bytes=path.measure_bytes(),
            )
        )
    return summaries


def count_needed_bytes(store: FeatureStore, wanted: np.ndarray) -> int:
    """Count the bytes that computing `wanted` (bool [row]) adds to a store; 0 where they are allocated already.

    Zarr writes whole chunks of whole shards; a shard that was committed before has its chunks, and only replaces them.
    """
    if store.backend == "hdf5":
        return 0
    committed = np.asarray(store.read_array("digest").any(axis=1), dtype=bool)
    n_bytes = 0
    for array in plan_arrays(store.spec, store.layout):
        if array.name.startswith("outputs/"):
            new = [
                shard
                for shard in plan_shards(store.layout)
                if wanted[shard.start_row : shard.stop_row].any()
                and not committed[shard.start_row : shard.stop_row].any()
            ]
            n_bytes += sum(_count_bytes(array, shard.n_rows) for shard in new)
        elif not committed.any() and wanted.any():
            n_bytes += _count_bytes(array, store.layout.n_rows)
    return n_bytes


def check_space(needs: Iterable[tuple[Place, int]]) -> None:
    """Raise StoreFullError naming both numbers where stores (place, bytes to come) have no room; URLs always have."""
    by_disk: dict[int, list[tuple[str, int]]] = {}
    for place, n_bytes in needs:
        path = locate(place)
        if not path.is_remote and n_bytes:
            by_disk.setdefault(find_existing(path).stat().st_dev, []).append((str(path), n_bytes))
    for stores in by_disk.values():
        needed, free = sum(n for _, n in stores), count_free_bytes(stores[0][0])
        if needed > free:
            names = ", ".join(name for name, _ in stores)
            raise StoreFullError(
                f"{names}: {needed:,} bytes are to be written, {free:,} are free there; free some, give another "
                f"--cache, or go on until the disk is full with --allow-full-disk"
            )


def _count_bytes(array: ArrayLayout, n_rows: int) -> int:
    """Count the bytes of some rows of an array: chunks whole, each with its checksum."""
    n_chunks = math.prod(math.ceil(n / c) for n, c in zip((n_rows, *array.shape[1:]), array.chunks, strict=True))
    return n_chunks * (math.prod(array.chunks) * np.dtype(array.dtype).itemsize + N_CHECKSUM_BYTES)
