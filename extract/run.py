"""Extracts the features of a manifest into stores: plans, holds the stores, runs the shards, sums up."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import (
    MediaSurvey,
    count_clips_at_most,
    find_unchecked_rows,
    identify_segments,
    require_media_of_done,
    require_some_media,
)
from echoshift.extract.weights.load import WeightsRecord
from echoshift.extract.work import ExtractionPlan, RunOptions, ShardWork, StoreTarget, compute_shard_on_worker
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.dask import (
    ClusterRequest,
    connect_cluster,
    count_threads_per_worker,
    describe_cluster,
    run_with_dask,
)
from echoshift.pipeline.errors import SpecError, StoreReadOnlyError
from echoshift.pipeline.execution import (
    ShardReport,
    ShardTask,
    commit_report,
    plan_tasks,
    run_in_process,
    select_rows,
)
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.failures import append_run, read_failures
from echoshift.pipeline.store.interface import Backend, Failure, FeatureStore
from echoshift.pipeline.store.layout import (
    DONE,
    FAILED,
    compute_digests,
    describe_versions,
    describe_writer,
    order_segments,
    plan_new_rows,
    plan_rows_per_shard,
    plan_shards,
)
from echoshift.pipeline.store.location import Location, Place, locate
from echoshift.pipeline.store.lock import StoreLock, hold_store
from echoshift.pipeline.store.open import (
    check_space,
    count_needed_bytes,
    create_store,
    has_store,
    name_store,
    open_store,
)

# A shard is the most that a kill costs, and on a CPU each of its rows takes seconds.
MAX_ROWS_PER_SHARD_ON_CPU = 64

T = TypeVar("T")


class ExtractionProgress(Protocol):
    """What is told how far a run is."""

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of work of n_total steps."""
        ...

    def advance(self, n: int = 1) -> None:
        """Count steps done."""
        ...


@dataclass(frozen=True, slots=True)
class ExtractionRequest:
    """What the user asks for: which features of which segments, from where, into what.

    `n_rows_per_shard` counts when a store is made: the most work that a kill can cost; None lets bytes decide.
    Without a `cluster` all is done in this process. `wait_s` is how long to wait for another run on a store, None not
    at all; `allow_full_disk` begins even where the disk has no room for all rows.
    """

    card: DatasetCard
    manifest: Manifest
    media_root: Path
    cache_dir: Place
    backend: Backend
    encoders: tuple[tuple[FeatureSpec, WeightsRecord], ...]
    options: RunOptions = field(default_factory=RunOptions)
    cluster: ClusterRequest | None = None
    retry_failed: bool = False
    n_rows_per_shard: int | None = None
    wait_s: float | None = None
    allow_full_disk: bool = False


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What one store holds for the manifest after a run.

    `n_computed` rows were computed by this run; the other counts are of all the manifest's rows. `n_unchecked` of those
    that are done have media that can't be read now, the first for `unchecked_reason`, and so stay as they are.
    """

    path: str
    spec: FeatureSpec
    n_done: int
    n_failed: int
    n_pending: int
    n_silent: int
    n_computed: int
    n_unchecked: int
    unchecked_reason: str
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class ExtractionSummary:
    """The outcome of a run, `duration_s` of it spent on shards."""

    stores: tuple[StoreSummary, ...]
    duration_s: float

    @property
    def n_failed(self) -> int:
        """The number of failed rows over all stores."""
        return sum(store.n_failed for store in self.stores)

    @property
    def n_unchecked(self) -> int:
        """The number of done rows, over all stores, whose media can't be read now."""
        return sum(store.n_unchecked for store in self.stores)


@dataclass(frozen=True, slots=True)
class RowChoice:
    """Which rows of a store a run computes, bool [row] each.

    Attributes:
        segments: of each row, None where the manifest no longer has it.
        digests: what each row is to be made from, uint8 [row, 16].
        wanted, kept: rows to compute, and done rows that stay as they are.
        unchecked: done rows whose media can't be read now, the first for `unchecked_reason`; they are kept.
    """

    segments: list[Segment | None]
    digests: np.ndarray
    wanted: np.ndarray
    kept: np.ndarray
    unchecked: np.ndarray
    unchecked_reason: str

    @property
    def in_manifest(self) -> np.ndarray:
        """The rows that the manifest has."""
        return np.asarray([segment is not None for segment in self.segments], dtype=bool)


@dataclass(slots=True)
class _StoreWork:
    """One store under way."""

    store: FeatureStore
    target: StoreTarget
    rows: RowChoice
    hold: StoreLock | None = None
    n_computed: int = 0


@dataclass(frozen=True, slots=True)
class ExtractionJob:
    """The work of stores that have the same rows, and so share each decode."""

    plan: ExtractionPlan
    works: Sequence[_StoreWork]

    @property
    def stores(self) -> Mapping[str, FeatureStore]:
        """The stores by path."""
        return {work.store.path: work.store for work in self.works}

    def describe_work(self, task: ShardTask) -> ShardWork:
        """Cut a shard's part out of the rows."""
        of_shard = slice(task.shard.start_row, task.shard.stop_row)
        digests = {w.store.path: w.rows.digests[of_shard] for w in self.works if w.store.path in task.store_paths}
        return ShardWork(task, tuple(self.works[0].rows.segments[of_shard]), digests)

    def compute(self, task: ShardTask, notify: Callable[[int], None]) -> ShardReport:
        """Compute a shard in this process; `notify` is told of every row of the shard."""
        from echoshift.extract.shard import process_shard  # brings torch, which a run with nothing to do needn't have

        return process_shard(self.plan, self.describe_work(task), self.stores, notify)

    def describe_call(self, task: ShardTask, topic: str) -> tuple[Callable[..., ShardReport], tuple[Any, ...]]:
        """Return what a Dask worker is to call; the same versions and files are checked there."""
        return compute_shard_on_worker, (topic, self.plan, self.describe_work(task))

    def give_up(self, task: ShardTask, reason: str) -> ShardReport:
        """Make the report of a shard whose workers die: its rows have failed, and a retry may help."""
        from echoshift.extract.shard import fail_shard

        work, stores = self.describe_work(task), self.stores
        return ShardReport(task, {path: fail_shard(stores[path], work, reason) for path in task.store_paths})


def extract_features(
    request: ExtractionRequest,
    progress: ExtractionProgress,
    notify_waiting: Callable[[str], None] = lambda message: None,
) -> ExtractionSummary:
    """Fill the stores of a request; resumes what is there, records failures and goes on.

    Raises StoreBusyError when another run writes one of the stores, StoreReadOnlyError and StoreFullError when there is
    work to do and no right or no room to write it, SpecError when nothing is asked for or the cluster can't have it,
    MediaNotFoundError when no segment has media, or done rows would be lost because theirs are gone,
    ClusterError when workers can't be had or the scheduler goes.
    """
    if not request.encoders or not len(request.manifest):
        raise SpecError("nothing to extract: no encoder, or a manifest without segments")
    if request.cluster is not None:
        request = _share_request(request)
    segments = {segment.segment_id: segment for segment in request.manifest}
    survey = MediaSurvey(request.media_root, request.card.media)
    with ExitStack() as held:
        works = []
        progress.start("looking at media", len(segments) * len(request.encoders))
        for spec, weights in request.encoders:
            path = name_store(request.cache_dir, request.card.name, spec, request.backend)
            hold, refusal = None, None
            try:
                hold = held.enter_context(hold_store(path, wait_s=request.wait_s, notify=notify_waiting))
            except StoreReadOnlyError as error:
                refusal = error  # which only matters if there is something to write
            work = _open_work(request, survey, path, spec, weights, segments, progress.advance, refusal)
            work.hold = hold
            works.append(work)
            made_by, source = work.store.attributes.get("encoder_source", ""), find_encoder(spec.encoder).source
            if made_by != source:  # the fingerprint knows an encoder's revision, not its code
                notify_waiting(f"{path} was begun with {made_by or 'echoshift itself'}, and goes on with {source}")
        if not request.allow_full_disk:
            check_space([(work.store.path, count_needed_bytes(work.store, work.rows.wanted)) for work in works])
        jobs = _plan_jobs(request, works)
        duration_s = 0.0
        if any(tasks for _, tasks in jobs):
            duration_s = _run_jobs(request, jobs, works, progress)
        summaries = tuple(_summarise(work) for work in works)
        for work in works:
            if work.n_computed:
                append_run(work.store.path, _describe_run(request, work, duration_s))
    return ExtractionSummary(summaries, duration_s)


def _share_request(request: ExtractionRequest) -> ExtractionRequest:
    """Make a request that means the same to a worker with another working directory."""
    if request.backend == "hdf5":
        raise SpecError("HDF5 is local and has a single writer; extract with --backend zarr, or without workers")
    encoders = tuple(
        (spec, record if record.path is None else replace(record, path=record.path.absolute()))
        for spec, record in request.encoders
    )
    return replace(
        request,
        media_root=request.media_root.absolute(),
        cache_dir=locate(request.cache_dir).absolute(),
        encoders=encoders,
    )


def _open_work(
    request: ExtractionRequest,
    survey: MediaSurvey,
    path: Location,
    spec: FeatureSpec,
    weights: WeightsRecord,
    segments: dict[str, Segment],
    notify: Callable[[], None],
    refusal: StoreReadOnlyError | None,
) -> _StoreWork:
    """Open a store with a row for every segment, or make it, and choose its rows to compute."""
    if refusal is not None and not has_store(path):
        raise refusal
    identities = identify_segments(survey, segments.values(), spec, notify)
    require_some_media(survey, segments.values(), spec)
    if has_store(path):
        store = open_store(path)
        new_ids = plan_new_rows(store.segment_ids, segments.values())
        if new_ids and refusal is not None:
            raise refusal
        if new_ids:
            store.extend(new_ids, count_clips_at_most(survey, [segments[i] for i in new_ids], spec))
    else:
        store = create_store(
            path,
            request.card.name,
            spec,
            [segment.segment_id for segment in order_segments(segments.values())],
            n_clips=count_clips_at_most(survey, segments.values(), spec),
            manifest_sha256=request.manifest.sha256,
            weights_source=f"{weights.ref}: {weights.source}",
            n_rows_per_shard=choose_rows_per_shard(request, survey),
            encoder_source=find_encoder(spec.encoder).source,
        )
    rows = choose_rows(store, segments, identities, survey, retry_failed=request.retry_failed)
    require_media_of_done(survey, rows.segments, spec, rows.wanted & (store.read_array("state") == DONE), store.path)
    if refusal is not None and rows.wanted.any():
        raise refusal
    return _StoreWork(store, StoreTarget(store.path, spec, weights), rows)


def choose_rows(
    store: FeatureStore,
    segments: Mapping[str, Segment],
    identities: Mapping[str, str],
    survey: MediaSurvey,
    *,
    retry_failed: bool,
) -> RowChoice:
    """Choose the rows of a store to compute; done rows whose media can't be read now stay as they are."""
    known = [segments.get(segment_id) for segment_id in store.segment_ids]
    digests = compute_digests(known, identities)
    is_done = store.read_array("state") == DONE
    unchecked, reason = find_unchecked_rows(survey, known, store.spec, is_done)
    in_manifest = np.asarray([segment is not None for segment in known], dtype=bool)
    wanted = select_rows(store, digests, in_manifest, retry_failed=retry_failed) & ~unchecked
    return RowChoice(known, digests, wanted, is_done & ~wanted, unchecked, reason)


def choose_rows_per_shard(request: ExtractionRequest, survey: MediaSurvey) -> int:
    """Choose the rows a shard: what the request says, else those of its stores that are there already.

    Stores of one run share each decode only where their shards are the same. Where there is no store yet, it is what
    the one with the smallest rows wants; on a CPU at most MAX_ROWS_PER_SHARD_ON_CPU.
    """
    from echoshift.pipeline.devices import resolve_device

    if request.n_rows_per_shard is not None:
        return request.n_rows_per_shard
    wanted = 1
    segments = request.manifest.segments
    for spec, _ in request.encoders:
        path = name_store(request.cache_dir, request.card.name, spec, request.backend)
        if has_store(path):
            return open_store(path).layout.n_rows_per_shard
        wanted = max(wanted, plan_rows_per_shard(spec, len(segments), count_clips_at_most(survey, segments, spec)))
    on_cpu = resolve_device(request.options.device).type == "cpu"
    return min(wanted, MAX_ROWS_PER_SHARD_ON_CPU) if on_cpu else wanted


def _plan_jobs(request: ExtractionRequest, works: Sequence[_StoreWork]) -> list[tuple[ExtractionJob, list[ShardTask]]]:
    """Join the stores whose rows are the same, so that they share each decode."""
    alike: dict[tuple[int, bytes], list[_StoreWork]] = {}
    for work in works:
        rows_sha256 = hashlib.sha256(work.store.read_array("segment_id").tobytes()).digest()
        alike.setdefault((work.store.layout.n_rows_per_shard, rows_sha256), []).append(work)
    jobs = []
    for group in alike.values():
        plan = ExtractionPlan(
            media_root=request.media_root,
            media_layout=request.card.media,
            targets={work.store.path: work.target for work in group},
            options=request.options,
            n_threads=None if request.cluster is None else count_threads_per_worker(request.cluster),
            versions={} if request.cluster is None else describe_versions(),
        )
        wanted = {work.store.path: work.rows.wanted for work in group}
        kept = {work.store.path: work.rows.kept for work in group}
        jobs.append((ExtractionJob(plan, group), plan_tasks(wanted, group[0].store.layout, kept)))
    return jobs


def _run_jobs(
    request: ExtractionRequest,
    jobs: Sequence[tuple[ExtractionJob, Sequence[ShardTask]]],
    works: Sequence[_StoreWork],
    progress: ExtractionProgress,
) -> float:
    """Run all shards, here or on the request's cluster, and return the seconds it took, without the cluster's start."""
    by_path = {work.store.path: work for work in works}

    def count(report: ShardReport) -> None:
        for path in report.indices:
            by_path[path].n_computed += report.task.shard.n_rows - len(report.task.kept_rows.get(path, ()))

    with ExitStack() as held:
        client = None
        if request.cluster is not None:
            progress.start("starting workers", request.cluster.n_workers)
            client = held.enter_context(connect_cluster(request.cluster))
        progress.start("extracting", sum(task.shard.n_rows for _, tasks in jobs for task in tasks))
        started = time.perf_counter()
        holds = {work.store.path: work.hold for work in works if work.hold is not None}
        for job, tasks in jobs:
            if client is None:
                run_in_process(partial(job.compute, notify=progress.advance), tasks, job.stores, count, holds)
            else:
                run_with_dask(client, job, tasks, job.stores, progress.advance, count, holds)
        return time.perf_counter() - started


def _summarise(work: _StoreWork) -> StoreSummary:
    store, spec, in_manifest = work.store, work.target.spec, work.rows.in_manifest
    state = np.where(in_manifest, store.read_array("state"), 255)
    n_silent = 0
    if spec.audio is not None:
        n_silent = int(((store.read_array("has_audio") == 0) & (state == DONE)).sum())
    failures = read_failures(store.path)
    failed_ids = [store.segment_ids[row] for row in np.flatnonzero(state == FAILED).tolist()]
    return StoreSummary(
        path=store.path,
        spec=spec,
        n_done=int((state == DONE).sum()),
        n_failed=len(failed_ids),
        n_pending=int((state == 0).sum()),
        n_silent=n_silent,
        n_computed=work.n_computed,
        n_unchecked=int(work.rows.unchecked.sum()),
        unchecked_reason=work.rows.unchecked_reason,
        failures=tuple(failures[segment_id] for segment_id in failed_ids if segment_id in failures),
    )


def _describe_run(request: ExtractionRequest, work: _StoreWork, duration_s: float) -> dict[str, object]:
    return {
        **describe_writer(),
        "manifest_sha256": request.manifest.sha256,
        "media_root": str(request.media_root),
        "device": request.options.device,
        "workers": describe_cluster(request.cluster),
        "n_rows": work.n_computed,
        "duration_s": round(duration_s, 3),
        "versions": describe_versions(),
    }


def choose_spread(items: Sequence[T], n: int, seed: int) -> list[T]:
    """Choose n items, one at random from each of n equal stretches of the sequence, in its order; all if there are n.

    The same seed chooses the same.
    """
    if n >= len(items):
        return list(items)
    draw = random.Random(seed)
    borders = [i * len(items) // n for i in range(n + 1)]
    return [items[draw.randrange(first, stop)] for first, stop in pairwise(borders)]


def extract_on_trial(
    folder: Path,
    encoders: Iterable[tuple[FeatureSpec, WeightsRecord]],
    segments: Sequence[Segment],
    survey: MediaSurvey,
    options: RunOptions,
    *,
    backend: Backend = "zarr",
    n_rows_per_shard: int | None = None,
    n_clips: int | None = None,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> list[FeatureStore]:
    """Extract segments, one row each in the order given, into new stores below `folder`, one an encoder.

    `n_rows_per_shard` None means one shard for all; `n_clips` None, as many as the segments need. `notify` is called
    with the number of rows read since the last call. Failures go into the trial stores' ledgers.
    """
    from echoshift.extract.shard import process_shard  # brings torch

    stores: dict[str, FeatureStore] = {}
    targets: dict[str, StoreTarget] = {}
    digests = {}
    for spec, weights in encoders:
        store = create_store(
            name_store(folder, "trial", spec, backend),
            "trial",
            spec,
            [segment.segment_id for segment in segments],
            n_clips=n_clips or count_clips_at_most(survey, segments, spec),
            manifest_sha256="",
            weights_source=f"{weights.ref}: {weights.source}",
            n_rows_per_shard=n_rows_per_shard or len(segments),
        )
        stores[store.path] = store
        targets[store.path] = StoreTarget(store.path, spec, weights)
        digests[store.path] = compute_digests(segments, identify_segments(survey, segments, spec))
    plan = ExtractionPlan(survey.root, survey.layout, targets, options)
    for shard in plan_shards(next(iter(stores.values())).layout):
        rows = slice(shard.start_row, shard.stop_row)
        of_shard = {path: digest[rows] for path, digest in digests.items()}
        work = ShardWork(ShardTask(shard, tuple(stores)), tuple(segments[rows]), of_shard)
        commit_report(stores, process_shard(plan, work, stores, notify))
    return list(stores.values())
