"""Measures reading, opening and committing of stores against raw files on the same disk, as ratios of one run.

    python -m benchmarks.store_speed [--rows 100000] [--repeats 15] [--folder FOLDER]

The page cache is warm: everything was just written. Each repeat measures ours and the reference one after the other,
and the median over the repeats is printed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import Backend, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import Shard, plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.open import create_store, open_store

N_DIMS = 2304
N_RANDOM_ROWS = 256
TARGETS = {
    "256 random segments / np.memmap": 0.5,
    "read_all / np.fromfile": 0.8,
    "open, ids and states, s": 0.2,
    "missing, s": 1.0,
    "MB a file": 4.0,
    "overhead a shard, ms": 50.0,
}


def measure(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def make_spec(n_dims: int, dtype: str = "float32") -> FeatureSpec:
    return FeatureSpec(
        encoder="benchmark",
        weights="0" * 64,
        clip=ClipSpec(n_frames=1),
        frame=FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
        outputs=(OutputSpec(name="pooled", shape=(n_dims,)),),
        dtype="float32" if dtype == "float32" else "float16",
    )


def make_index(shard: Shard) -> ShardIndex:
    rows = np.arange(shard.start_row, shard.stop_row)
    return ShardIndex(
        times=np.stack([rows, rows + 1.0], axis=-1)[:, None],
        frames=np.zeros((shard.n_rows, 1, 2), np.int64),
        n_valid=np.ones(shard.n_rows, np.int32),
        digest=np.ones((shard.n_rows, 16), np.uint8),
        state=np.ones(shard.n_rows, np.uint8),
    )


def fill_store(path: Path, n_rows: int, raw: Path) -> list[float]:
    """Fill a store and a raw file with the same random rows; return the seconds of each shard without its features."""
    spec = make_spec(N_DIMS)
    store = create_store(
        path,
        "benchmark",
        spec,
        [f"segment-{row:07d}" for row in range(n_rows)],
        n_clips=1,
        manifest_sha256="",
        weights_source="none",
        n_rows_per_shard=plan_rows_per_shard(spec, n_rows, 1),
    )
    generator = np.random.default_rng(0)
    overheads = []
    with raw.open("wb") as file:
        for shard in plan_shards(store.layout):
            values = generator.standard_normal((shard.n_rows, 1, N_DIMS), dtype=np.float32)
            file.write(values.data)
            begun = measure(lambda shard=shard: store.begin_shard(shard))
            store.write_outputs("pooled", shard.start_row, values)
            overheads.append(begun + measure(lambda shard=shard: store.commit_shard(shard, make_index(shard))))
    return overheads


def count_files(path: Path) -> tuple[int, float]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return len(files), sum(p.stat().st_size for p in files) / 1e6


def open_and_look(path: Path) -> FeatureStore:
    store = open_store(path)
    assert len(store.segment_ids) == store.layout.n_rows
    store.read_array("state")
    return store


def compare_backend(backend: Backend, folder: Path, n_rows: int, n_repeats: int) -> dict[str, float]:
    path, raw = folder / ("store.zarr" if backend == "zarr" else "store.h5"), folder / f"{backend}.raw"
    overheads = fill_store(path, n_rows, raw)
    store = open_and_look(path)
    ids = [f"segment-{row:07d}" for row in range(n_rows)]  # as a learner has them from its manifest
    memmap = np.memmap(raw, np.float32, "r", shape=(n_rows, 1, N_DIMS))
    generator = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in ("rows", "mapped", "all", "file", "open", "missing")}
    digests = np.ones((n_rows, 16), np.uint8)
    np.testing.assert_array_equal(store.read(ids, "pooled"), memmap)  # and both are mapped and warm
    for _ in range(20 * n_repeats):
        rows = generator.integers(0, n_rows, N_RANDOM_ROWS)
        wanted = [ids[row] for row in rows.tolist()]
        times["mapped"].append(measure(lambda rows=rows: memmap[rows]))
        times["rows"].append(measure(lambda wanted=wanted: store.read(wanted, "pooled")))
    for _ in range(n_repeats):
        times["file"].append(measure(lambda: np.fromfile(raw, np.float32)))
        times["all"].append(measure(lambda: store.read_all("pooled")))
        times["open"].append(measure(lambda: open_and_look(path)))
        times["missing"].append(measure(lambda: store.missing(digests)))
    median = {name: float(np.median(values)) for name, values in times.items()}
    n_files, n_mb = count_files(path)
    print(
        f"{backend}: {n_rows} x {N_DIMS} float32 in {n_files} files; random rows/s: ours "
        f"{N_RANDOM_ROWS / median['rows']:,.0f}, np.memmap {N_RANDOM_ROWS / median['mapped']:,.0f}; whole: ours "
        f"{n_mb / median['all']:,.0f} MB/s, np.fromfile {n_mb / median['file']:,.0f} MB/s"
    )
    return {
        "256 random segments / np.memmap": median["mapped"] / median["rows"],
        "read_all / np.fromfile": median["file"] / median["all"],
        "open, ids and states, s": median["open"],
        "missing, s": median["missing"],
        "MB a file": n_mb / n_files,
        "overhead a shard, ms": 1e3 * float(np.median(overheads)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "echoshift_store_speed")
    options = parser.parse_args()
    backends: tuple[Backend, ...] = ("zarr", "hdf5")
    for backend in backends:
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)
        try:
            for name, value in compare_backend(backend, options.folder, options.rows, options.repeats).items():
                print(f"  {backend:5s} {name:34s} {value:10.3f}   target {TARGETS[name]}")
        finally:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
