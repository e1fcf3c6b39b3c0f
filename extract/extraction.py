"""Extracts the features of a manifest into stores: plans, holds the stores, runs the shards, sums up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from extract.extraction_plan import ExtractionPlan, ShardWork, StoreTarget
from extract.media_survey import MediaSurvey, count_clips_at_most, identify_segments
from extract.run_options import RunOptions
from extract.weights.resolve import WeightsRecord
from pipeline.cards import DatasetCard
from pipeline.errors import SpecError, StoreReadOnlyError
from pipeline.execution import ShardReport, ShardTask, plan_tasks, run_in_process, select_rows
from pipeline.rows import compute_digests, order_segments, plan_new_rows
from pipeline.segments import Manifest, Segment
from pipeline.specs import FeatureSpec
from pipeline.store.attributes import describe_versions, describe_writer
from pipeline.store.holding import StoreHold, hold_store
from pipeline.store.interface import Backend, Failure, FeatureStore
from pipeline.store.layout import DONE, FAILED, N_ROWS_PER_SHARD
from pipeline.store.ledger import append_run, read_failures
from pipeline.store.location import Location, Place
from pipeline.store.opening import create_store, has_store, name_store, open_store
from pipeline.store.space import check_space, count_needed_bytes


class ExtractionProgress(Protocol):
    """Is told how far a run is."""

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of work of n_total steps."""
        ...

    def advance(self, n: int = 1) -> None:
        """Counts steps done."""
        ...


@dataclass(frozen=True, slots=True)
class ExtractionRequest:
    """Is what the user asks for: which features of which segments, from where, into what.

    `n_rows_per_shard` counts when a store is made: the most work that a kill can cost. `wait_s` is how long to wait for
    another run on a store, None not at all; `allow_full_disk` begins even where the disk has no room for all rows.
    """

    card: DatasetCard
    manifest: Manifest
    media_root: Path
    cache_dir: Place
    backend: Backend
    encoders: tuple[tuple[FeatureSpec, WeightsRecord], ...]
    options: RunOptions = field(default_factory=RunOptions)
    retry_failed: bool = False
    n_rows_per_shard: int = N_ROWS_PER_SHARD
    wait_s: float | None = None
    allow_full_disk: bool = False


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """Is what one store holds for the manifest after a run.

    `n_computed` rows were computed by this run; the other counts are of all the manifest's rows.
    """

    path: str
    spec: FeatureSpec
    n_done: int
    n_failed: int
    n_pending: int
    n_silent: int
    n_computed: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class ExtractionSummary:
    """Is the outcome of a run, `duration_s` of it spent on shards."""

    stores: tuple[StoreSummary, ...]
    duration_s: float

    @property
    def n_failed(self) -> int:
        """Gives the number of failed rows over all stores."""
        return sum(store.n_failed for store in self.stores)


@dataclass(slots=True)
class _Work:
    """Is one store under way."""

    store: FeatureStore
    spec: FeatureSpec
    weights: WeightsRecord
    digests: np.ndarray
    wanted: np.ndarray
    hold: StoreHold | None = None
    n_computed: int = 0


def extract_features(
    request: ExtractionRequest,
    progress: ExtractionProgress,
    notify_waiting: Callable[[str], None] = lambda message: None,
) -> ExtractionSummary:
    """Fills the stores of a request; resumes what is there, records failures and goes on.

    Raises StoreBusyError when another run writes one of the stores, StoreReadOnlyError and StoreFullError when there is
    work to do and no right or no room to write it, SpecError when nothing is asked for.
    """
    if not request.encoders or not len(request.manifest):
        raise SpecError("nothing to extract: no encoder, or a manifest without segments")
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
        if not request.allow_full_disk:
            check_space([(work.store.path, count_needed_bytes(work.store, work.wanted)) for work in works])
        n_rows = max(int(work.wanted.sum()) for work in works)
        progress.start("extracting", n_rows)
        started = time.perf_counter()
        if n_rows:
            _run_works(request, works, segments, progress.advance)
        duration_s = time.perf_counter() - started
        summaries = tuple(_summarise(work, segments) for work in works)
        for work in works:
            if work.n_computed:
                append_run(work.store.path, _describe_run(request, work, duration_s))
    return ExtractionSummary(summaries, duration_s)


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
            n_rows_per_shard=request.n_rows_per_shard,
        )
    rows = [segments.get(segment_id) for segment_id in store.segment_ids]
    digests = compute_digests(rows, identities)
    in_manifest = np.asarray([segment is not None for segment in rows])
    selection = select_rows(store, digests, in_manifest, retry_failed=request.retry_failed)
    if refusal is not None and selection.any():
        raise refusal
    return _Work(store, spec, weights, digests, selection)


def _run_works(
    request: ExtractionRequest, works: Sequence[_Work], segments: dict[str, Segment], notify: Callable[[int], None]
) -> None:
    """Runs the stores together whose rows are the same, so that they share each decode."""
    alike: dict[tuple[object, ...], list[_Work]] = {}
    for work in works:
        alike.setdefault((work.store.layout.n_rows_per_shard, *work.store.segment_ids), []).append(work)
    for group in alike.values():
        tasks = plan_tasks({work.store.path: work.wanted for work in group}, group[0].store.layout)
        by_path = {work.store.path: work for work in group}
        plan = ExtractionPlan(
            media_root=request.media_root,
            media_layout=request.card.media,
            targets={w.store.path: StoreTarget(w.store.path, w.spec, w.weights) for w in group},
            options=request.options,
        )
        stores = {work.store.path: work.store for work in group}
        rows = [segments.get(segment_id) for segment_id in group[0].store.segment_ids]
        process = partial(_process_and_count, plan, rows, stores, by_path, notify)
        holds = {work.store.path: work.hold for work in group if work.hold is not None}
        run_in_process(process, tasks, stores, holds)


def _process_and_count(
    plan: ExtractionPlan,
    rows: Sequence[Segment | None],
    stores: Mapping[str, FeatureStore],
    works: Mapping[str, _Work],
    notify: Callable[[int], None],
    task: ShardTask,
) -> ShardReport:
    from extract.shard import process_shard  # brings torch, which a run with nothing to do needn't wait for

    of_shard = slice(task.shard.start_row, task.shard.stop_row)
    work = ShardWork(task, tuple(rows[of_shard]), {path: works[path].digests[of_shard] for path in task.store_paths})
    report = process_shard(plan, work, stores, notify)
    for path in task.store_paths:
        works[path].n_computed += task.shard.n_rows
    return report


def _summarise(work: _Work, segments: dict[str, Segment]) -> StoreSummary:
    in_manifest = np.asarray([segment_id in segments for segment_id in work.store.segment_ids])
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
        failures=tuple(failures[s] for s in work.store.segment_ids if s in failures and s in segments),
    )


def _describe_run(request: ExtractionRequest, work: _Work, duration_s: float) -> dict[str, object]:
    return {
        **describe_writer(),
        "manifest_sha256": request.manifest.sha256,
        "media_root": str(request.media_root),
        "device": request.options.device,
        "n_rows": work.n_computed,
        "duration_s": round(duration_s, 3),
        "versions": describe_versions(),
    }
