"""What runs on a Dask worker: checks once a run that the worker sees what the driver sees, then computes shards."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import MediaSurvey, identify_segments
from echoshift.extract.work import ExtractionPlan, ShardWork
from echoshift.pipeline.errors import ClusterError, EchoshiftError
from echoshift.pipeline.execution import ShardReport
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import compute_digests, describe_versions
from echoshift.pipeline.store.open import open_store

if TYPE_CHECKING:
    from distributed import Worker

TELL_EVERY_S = 1.0
# Of 0 to 1000; the kernel, when memory runs out, kills what has the highest first: a worker, and not the driver.
OOM_SCORE = 500

_checked: set[tuple[str, str]] = set()  # what is fit for a run, by the run's topic


def compute_shard_on_worker(topic: str, plan: ExtractionPlan, work: ShardWork) -> ShardReport:
    """Compute a shard inside a Dask worker; raises ClusterError where the worker isn't fit for the run.

    `topic` names the run; rows read are told under it.
    """
    from distributed import get_worker

    worker = get_worker()
    stores = {path: _open_store(topic, path, worker.address) for path in work.task.store_paths}
    if (topic, "") not in _checked:
        _check_process(plan, worker)
        _checked.add((topic, ""))
    for path in work.task.store_paths:
        if (topic, path) not in _checked:
            _check_files(path, plan, work, worker.address)
            _checked.add((topic, path))
    from echoshift.extract.shard import process_shard  # brings torch

    if plan.n_threads is not None:
        import torch

        torch.set_num_threads(plan.n_threads)
    n_read, told = 0, time.monotonic()

    def tell(n_rows: int) -> None:
        nonlocal n_read, told
        n_read += n_rows
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            worker.log_event(topic, (work.task.shard.index, n_read))

    return process_shard(plan, work, stores, tell)


@lru_cache(maxsize=16)
def _open_store(topic: str, path: str, address: str) -> FeatureStore:
    """Open a store once a run."""
    try:
        return open_store(path)
    except (EchoshiftError, OSError) as error:
        raise ClusterError(
            f"the worker {address} can't open the store {path}: {error}; mount the cache at the same place everywhere"
        ) from error


def _check_process(plan: ExtractionPlan, worker: Worker) -> None:
    """Check threads and package versions, and offer this process to the kernel before the driver."""
    if worker.state.nthreads != 1:
        raise ClusterError(
            f"the worker {worker.address} has {worker.state.nthreads} threads and would compute as many shards at "
            f"once; start it with --nthreads 1 (networks take their threads from OMP_NUM_THREADS)"
        )
    here = describe_versions()
    # torch's builds, such as +cpu and +cu130, differ where driver and worker have other hardware.
    differing = [
        f"{name} {here.get(name)} (driver: {wanted})"
        for name, wanted in plan.versions.items()
        if (here.get(name) or "").partition("+")[0] != wanted.partition("+")[0]
    ]
    if differing:
        raise ClusterError(
            f"the worker {worker.address} has other packages than the driver: {', '.join(differing)}; install the same"
        )
    if sys.platform == "linux":
        with suppress(OSError):  # a container may forbid it; then the kernel chooses by size
            Path(f"/proc/{os.getpid()}/oom_score_adj").write_text(str(OOM_SCORE))


def _check_files(path: str, plan: ExtractionPlan, work: ShardWork, address: str) -> None:
    """Check encoder, weights and media of a store: a missing mount must not become a ledger full of failures."""
    spec, weights = plan.targets[path].spec, plan.targets[path].weights
    first_row, kept = work.task.shard.start_row, work.task.kept_rows.get(path, ())
    row, segment = next(
        (i, segment) for i, segment in enumerate(work.segments) if segment is not None and first_row + i not in kept
    )
    try:
        revision = find_encoder(spec.encoder).revision
    except EchoshiftError as error:
        raise ClusterError(f"the worker {address}: {error}; install the same encoders there") from error
    if revision != spec.revision:
        raise ClusterError(
            f"the worker {address} has revision {revision} of {spec.encoder}, the driver {spec.revision}; install "
            f"the same echoshift"
        )
    if weights.path is not None and not weights.path.is_file():
        raise ClusterError(f"the worker {address} finds no weights at {weights.path}; put the same file there")
    if not plan.media_root.is_dir():
        raise ClusterError(f"the worker {address} finds no media folder {plan.media_root}; mount it there")
    identities = identify_segments(MediaSurvey(plan.media_root, plan.media_layout), [segment], spec)
    if (compute_digests([segment], identities)[0] != work.digests[path][row]).any():
        raise ClusterError(
            f"the worker {address} sees another {segment.video_id} below {plan.media_root} than the driver saw; "
            f"mount the same folder there, or, if the file was replaced meanwhile, give the command again"
        )
