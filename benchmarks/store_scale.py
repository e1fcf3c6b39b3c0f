"""Measures that a store's work grows with its rows and no faster, with rows written by a generator, up to 1,000,000.

    python -m benchmarks.store_scale [--rows 10000 100000 1000000] [--folder FOLDER]

Every size runs in a process of its own, so that its peak resident set is its own. One clip of 256 float16 a segment.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.store_speed import count_files, make_index, make_spec
from echoshift.pipeline.execution import plan_tasks, select_rows
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.audit import audit_output
from echoshift.pipeline.store.layout import compute_digests, order_segments, plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.pipeline.store.verify import verify_store

N_DIMS = 256


def run_size(n_rows: int, folder: Path) -> dict[str, float]:
    """Go through a store's whole life; return the seconds of each step."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def note(step: str) -> None:
        nonlocal started
        seconds[step] = time.perf_counter() - started
        started = time.perf_counter()

    segments = [
        Segment(f"segment-{i:07d}", f"video-{i // 50:05d}", i % 50, i % 50 + 1, ("a",), "D1", "train")
        for i in range(n_rows)
    ]
    identities = {s.segment_id: s.video_id for s in segments}
    started = time.perf_counter()
    ids = [s.segment_id for s in order_segments(segments)]
    note("order rows")
    digests = compute_digests(segments, identities)
    note("digests")
    spec = make_spec(N_DIMS, "float16")
    path = folder / f"{n_rows}.zarr"
    n_rows_per_shard = plan_rows_per_shard(spec, n_rows, 1)
    store = create_store(
        path, "scale", spec, ids, n_clips=1, manifest_sha256="", weights_source="", n_rows_per_shard=n_rows_per_shard
    )
    note("create")
    every = np.ones(n_rows, bool)
    tasks = plan_tasks({store.path: select_rows(store, digests, every, retry_failed=False)}, store.layout)
    note("plan")
    assert len(tasks) == len(plan_shards(store.layout))
    generator = np.random.default_rng(0)
    block = generator.standard_normal((n_rows_per_shard, 1, N_DIMS)).astype(np.float16)
    started = time.perf_counter()
    for task in tasks:
        shard = task.shard
        store.begin_shard(shard)
        store.write_outputs("pooled", shard.start_row, block[: shard.n_rows])
        index = make_index(shard)
        index.digest[...] = digests[shard.start_row : shard.stop_row]
        store.commit_shard(shard, index)
    note("write and commit")
    store = open_store(path)
    assert len(store.segment_ids) == n_rows
    note("open")
    assert not store.missing(digests).any()
    note("missing")
    selected = select_rows(store, digests, every, retry_failed=False)
    assert plan_tasks({store.path: selected}, store.layout) == []
    note("plan a resumed run")
    assert verify_store(store) == []
    note("verify")
    assert audit_output(store, "pooled").n_vectors == n_rows
    note("audit")
    seconds["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds["n_files"], seconds["mb"] = count_files(path)
    seconds["n_rows_per_shard"] = n_rows_per_shard
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "echoshift_store_scale")
    parser.add_argument("--one", action="store_true", help="Run one size in this process and print JSON.")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_size(options.rows[0], options.folder)))
        return
    results = []
    for n_rows in options.rows:
        options.folder.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.store_scale", "--one", "--rows", str(n_rows)]
        command += ["--folder", str(options.folder)]
        try:
            done = subprocess.run(
                [*command, "--folder", str(options.folder)], check=True, capture_output=True, text=True
            )
            results.append(json.loads(done.stdout))
        finally:
            shutil.rmtree(options.folder)
    print("microseconds a row" + " " * 6 + "".join(f"{n:>12,d}" for n in options.rows))
    for step in results[0]:
        if step not in ("peak_gb", "n_files", "mb", "n_rows_per_shard"):
            cells = (1e6 * found[step] / n for found, n in zip(results, options.rows, strict=True))
            print(f"{step:24s}" + "".join(f"{cell:12.2f}" for cell in cells))
    for fact in ("peak_gb", "n_files", "mb", "n_rows_per_shard"):
        print(f"{fact:24s}" + "".join(f"{found[fact]:12.2f}" for found in results))


if __name__ == "__main__":
    main()
