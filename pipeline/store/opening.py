"""Names, creates, opens and lists stores below a cache folder, and guards the one writer a store has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import StoreBusyError, StoreError
from pipeline.specs import FeatureSpec, fingerprint
from pipeline.store.attributes import describe_writer, make_attributes, parse_attributes, unpack_attributes
from pipeline.store.interface import Backend, FeatureStore
from pipeline.store.layout import N_ROWS_PER_SHARD, StoreLayout, measure_id_bytes

ENDINGS: dict[Backend, str] = {"zarr": ".zarr", "hdf5": ".h5"}


def name_store(cache_dir: Path, dataset: str, spec: FeatureSpec, backend: Backend) -> Path:
    """Gives a store's path: <cache>/<dataset>/<encoder>-<fingerprint>.zarr or .h5."""
    return cache_dir / dataset / f"{spec.encoder}-{fingerprint(spec)}{ENDINGS[backend]}"


def open_store(path: Path) -> FeatureStore:
    """Opens a store of either backend; raises StoreError when there is none or it is not one of ours."""
    if path.suffix == ENDINGS["zarr"]:
        import zarr

        from pipeline.store.zarr_store import ZarrFeatureStore

        try:
            group = zarr.open_group(str(path), mode="r+" if os.access(path, os.W_OK) else "r", zarr_format=3)
        except (FileNotFoundError, ValueError) as error:
            raise StoreError(f"no feature store at {path}") from error
        return ZarrFeatureStore(path, group, *parse_attributes(str(path), dict(group.attrs)))
    if path.suffix == ENDINGS["hdf5"]:
        import h5py

        from pipeline.store.hdf5_store import Hdf5FeatureStore

        try:
            with h5py.File(path, "r", locking=False) as file:
                attributes = unpack_attributes(file.attrs)
        except OSError as error:
            raise StoreError(f"no feature store at {path}: {error}") from error
        return Hdf5FeatureStore(path, *parse_attributes(str(path), attributes))
    raise StoreError(f"{path} ends in neither .zarr nor .h5")


def create_store(
    path: Path,
    dataset: str,
    spec: FeatureSpec,
    segment_ids: Sequence[str],
    *,
    n_clips: int,
    manifest_sha256: str,
    weights_source: str,
    n_rows_per_shard: int = N_ROWS_PER_SHARD,
) -> FeatureStore:
    """Creates an empty store beside its place and renames it there, so that a half-made one is never seen."""
    layout = StoreLayout(
        n_rows=len(segment_ids),
        n_clips=n_clips,
        n_rows_per_shard=n_rows_per_shard,
        n_id_bytes=measure_id_bytes(segment_ids),
    )
    attributes = make_attributes(dataset, spec, layout, manifest_sha256, weights_source)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{path.name}.creating-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    fresh = path.with_name(f"{path.name}.creating-{os.getpid()}")
    if path.suffix == ENDINGS["zarr"]:
        from pipeline.store.zarr_store import create_zarr_store

        create_zarr_store(fresh, spec, layout, segment_ids, attributes)
    else:
        from pipeline.store.hdf5_store import create_hdf5_store

        create_hdf5_store(fresh, spec, layout, segment_ids, attributes)
    fresh.rename(path)
    return open_store(path)


def list_stores(cache_dir: Path) -> list[Path]:
    """Lists the stores below a cache folder, sorted."""
    return sorted(p for ending in ENDINGS.values() for p in cache_dir.glob(f"*/*{ending}"))


@contextmanager
def hold_store(path: Path) -> Iterator[None]:
    """Holds the right to write a store; the system frees it when the process dies, however it dies.

    Raises StoreBusyError naming the holder when another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder_file = Path(f"{path}.holder.json")
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = holder_file.read_text() if holder_file.exists() else "an unknown process"
        raise StoreBusyError(f"{path} is being written by {holder.strip()}; wait for it to end, or stop it") from error
    try:
        holder_file.write_text(json.dumps({"pid": os.getpid(), **describe_writer()}) + "\n")
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()
