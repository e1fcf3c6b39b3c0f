"""Counts the bytes that rows will take, and refuses a run for which the disk has no room before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from echoshift.pipeline.errors import StoreFullError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.faults import count_free_bytes
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import ArrayLayout, StoreLayout, plan_arrays, plan_shards
from echoshift.pipeline.store.location import Place, locate

N_CHECKSUM_BYTES = 4


def plan_store_bytes(spec: FeatureSpec, layout: StoreLayout) -> int:
    """Count the bytes of all arrays of a store, chunks whole."""
    return sum(
        _count_chunk_bytes(array) * math.ceil(layout.n_rows / array.chunks[0]) for array in plan_arrays(spec, layout)
    )


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
            n_bytes += sum(math.ceil(shard.n_rows / array.chunks[0]) for shard in new) * _count_chunk_bytes(array)
        elif not committed.any() and wanted.any():
            n_bytes += math.ceil(store.layout.n_rows / array.chunks[0]) * _count_chunk_bytes(array)
    return n_bytes


def check_space(needs: Iterable[tuple[Place, int]]) -> None:
    """Raise StoreFullError naming both numbers where stores (place, bytes to come) have no room; URLs always have."""
    by_disk: dict[int, list[tuple[str, int]]] = {}
    for place, n_bytes in needs:
        path = locate(place)
        if not path.is_remote and n_bytes:
            by_disk.setdefault(_find_disk(Path(path)), []).append((str(path), n_bytes))
    for stores in by_disk.values():
        needed, free = sum(n for _, n in stores), count_free_bytes(stores[0][0])
        if needed > free:
            names = ", ".join(name for name, _ in stores)
            raise StoreFullError(
                f"{names}: {needed:,} bytes are to be written, {free:,} are free there; free some, give another "
                f"--cache, or go on until the disk is full with --allow-full-disk"
            )


def _count_chunk_bytes(array: ArrayLayout) -> int:
    """Count one row of chunks: a chunk's rows, over all of the other axes, each chunk with its checksum."""
    n_chunks = math.prod(math.ceil(n / c) for n, c in zip(array.shape[1:], array.chunks[1:], strict=True))
    return n_chunks * (math.prod(array.chunks) * np.dtype(array.dtype).itemsize + N_CHECKSUM_BYTES)


def _find_disk(path: Path) -> int:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev
