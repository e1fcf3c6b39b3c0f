"""What a run computes, as plain data that travels between processes, and how a Dask worker computes its part.

A worker checks once a run that it sees what the driver sees.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import MediaSurvey, identify_segments
from echoshift.pipeline.errors import ClusterError, EchoshiftError
from echoshift.pipeline.store.layout import compute_digests, describe_versions
from echoshift.pipeline.store.open import open_store

if TYPE_CHECKING:
    from distributed import Worker

    from echoshift.extract.weights.load import WeightsRecord
    from echoshift.pipeline.cards import MediaLayout
    from echoshift.pipeline.execution import ShardReport, ShardTask
    from echoshift.pipeline.segments import Segment
    from echoshift.pipeline.specs import FeatureSpec
    from echoshift.pipeline.store.interface import FeatureStore

TELL_EVERY_S = 1.0
# Of 0 to 1000; the kernel, when memory runs out, kills what has the highest first: a worker, and not the driver.
OOM_SCORE = 500

_checked: set[tuple[str, str]] = set()  # what is fit for a run, by the run's topic


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Machine and patience of a run; nothing here changes a feature or has a part in a fingerprint.

    Attributes:
        device: auto, cpu, cuda or cuda:n.
        n_clips_per_batch: how many clips go through a network at once, None for the device's own number; a batch never
            leaves its shard.
        n_readers: threads that read media, each a segment at a time, None for the device's own number.
        segment_timeout_s: how long reading may take between two of a segment's inputs before the segment fails.
    """

    device: str = "auto"
    n_clips_per_batch: int | None = None
    n_readers: int | None = None
    segment_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class StoreTarget:
    """One store to be filled: its path, what goes in, and with which weights."""

    path: str
    spec: FeatureSpec
    weights: WeightsRecord


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    """Everything that is the same for all shards of a run.

    Attributes:
        targets: by store path.
        n_threads: of torch on a worker; None: as many as the worker was started with.
        versions: of the driver's packages, which a worker must have too; empty without workers.
    """

    media_root: Path
    media_layout: MediaLayout
    targets: Mapping[str, StoreTarget]
    options: RunOptions
    n_threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardWork:
    """One shard to be computed.

    Attributes:
        task: the shard and its stores.
        segments: an entry for each of the shard's rows, None where the manifest no longer has the row's segment.
        digests: by store path, what each row is to be made from, uint8 [n_rows, 16].
    """

    task: ShardTask
    segments: tuple[Segment | None, ...]
    digests: Mapping[str, np.ndarray]


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
