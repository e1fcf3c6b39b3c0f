"""Extracts the features of a manifest into stores: plans, holds the stores, runs the shards, sums up."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.extraction_plan import ExtractionPlan, StoreTarget
from echoshift.extract.media_survey import MediaSurvey, count_clips_at_most, identify_segments
from echoshift.extract.missing_media import (
    UncheckedRows,
    find_unchecked_rows,
    require_media_of_done,
    require_some_media,
)
from echoshift.extract.run_options import RunOptions
from echoshift.extract.shard_jobs import ExtractionJob
from echoshift.extract.shard_sizing import choose_rows_per_shard
from echoshift.extract.weights.load import WeightsRecord
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.clusters import ClusterRequest, connect_cluster, count_threads_per_worker, describe_cluster
from echoshift.pipeline.dask_execution import run_with_dask
from echoshift.pipeline.errors import SpecError, StoreReadOnlyError
from echoshift.pipeline.execution import ShardReport, ShardTask, plan_tasks, run_in_process, select_rows
from echoshift.pipeline.rows import compute_digests, order_segments, plan_new_rows
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.attributes import describe_versions, describe_writer
from echoshift.pipeline.store.holding import StoreHold, hold_store
from echoshift.pipeline.store.interface import Backend, Failure, FeatureStore
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.pipeline.store.ledger import append_run, read_failures
from echoshift.pipeline.store.location import Location, Place, locate
from echoshift.pipeline.store.opening import create_store, has_store, name_store, open_store
from echoshift.pipeline.store.space import check_space, count_needed_bytes


class ExtractionProgress(Protocol):
    """Told how far a run is."""

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


@dataclass(slots=True)
class _Work:
    """One store under way."""

    store: FeatureStore
    spec: FeatureSpec
    weights: WeightsRecord
    rows: list[Segment | None]
    rows_sha256: bytes
    in_manifest: np.ndarray
    digests: np.ndarray
    wanted: np.ndarray
    kept: np.ndarray
    unchecked: UncheckedRows
    hold: StoreHold | None = None
    n_computed: int = 0


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
            check_space([(work.store.path, count_needed_bytes(work.store, work.wanted)) for work in works])
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
) -> _Work:
    if refusal is not None and not has_store(path):
        raise refusal
    identities = identify_segments(survey, list(segments.values()), spec, notify)
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
            n_clips=count_clips_at_most(survey, list(segments.values()), spec),
            manifest_sha256=request.manifest.sha256,
            weights_source=f"{weights.ref}: {weights.source}",
            n_rows_per_shard=choose_rows_per_shard(request, survey),
            encoder_source=find_encoder(spec.encoder).source,
        )
    rows = [segments.get(segment_id) for segment_id in store.segment_ids]
    rows_sha256 = hashlib.sha256(store.read_array("segment_id").tobytes()).digest()
    digests = compute_digests(rows, identities)
    in_manifest = np.asarray([segment is not None for segment in rows])
    selection = select_rows(store, digests, in_manifest, retry_failed=request.retry_failed)
    state = store.read_array("state")
    unchecked = find_unchecked_rows(survey, rows, spec, state == DONE)
    selection &= ~unchecked.rows
    require_media_of_done(survey, rows, spec, selection & (state == DONE), store.path)
    if refusal is not None and selection.any():
        raise refusal
    kept = (state == DONE) & ~selection
    return _Work(store, spec, weights, rows, rows_sha256, in_manifest, digests, selection, kept, unchecked)


def _plan_jobs(request: ExtractionRequest, works: Sequence[_Work]) -> list[tuple[ExtractionJob, list[ShardTask]]]:
    """Join the stores whose rows are the same, so that they share each decode."""
    alike: dict[tuple[int, bytes], list[_Work]] = {}
    for work in works:
        alike.setdefault((work.store.layout.n_rows_per_shard, work.rows_sha256), []).append(work)
    jobs = []
    for group in alike.values():
        plan = ExtractionPlan(
            media_root=request.media_root,
            media_layout=request.card.media,
            targets={w.store.path: StoreTarget(w.store.path, w.spec, w.weights) for w in group},
            options=request.options,
        )
        job = ExtractionJob(
            plan=plan,
            rows=group[0].rows,
            digests={work.store.path: work.digests for work in group},
            stores={work.store.path: work.store for work in group},
            n_threads=None if request.cluster is None else count_threads_per_worker(request.cluster),
        )
        wanted, kept = ({w.store.path: rows(w) for w in group} for rows in (attrgetter("wanted"), attrgetter("kept")))
        jobs.append((job, plan_tasks(wanted, group[0].store.layout, kept)))
    return jobs


def _run_jobs(
    request: ExtractionRequest,
    jobs: Sequence[tuple[ExtractionJob, Sequence[ShardTask]]],
    works: Sequence[_Work],
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


def _summarise(work: _Work) -> StoreSummary:
    in_manifest = work.in_manifest
    state = work.store.read_array("state")[in_manifest]
    silent = 0
    if work.spec.audio is not None:
        silent = int(((work.store.read_array("has_audio")[in_manifest] == 0) & (state == DONE)).sum())
    failures = read_failures(work.store.path)
    return StoreSummary(
        path=work.store.path,
        spec=work.spec,
        n_done=int((state == DONE).sum()),
        n_failed=int((state == FAILED).sum()),
        n_pending=int((state == 0).sum()),
        n_silent=silent,
        n_computed=work.n_computed,
        n_unchecked=work.unchecked.n_rows,
        unchecked_reason=work.unchecked.reason,
        failures=tuple(
            failures[segment.segment_id]
            for segment in compress(work.rows, work.in_manifest & (work.store.read_array("state") == FAILED))
            if segment is not None and segment.segment_id in failures
        ),
    )


def _describe_run(request: ExtractionRequest, work: _Work, duration_s: float) -> dict[str, object]:
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
