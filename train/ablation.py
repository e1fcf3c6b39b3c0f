"""Execution of a grid's missing runs, in this process or in workers; a run that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echoshift.pipeline.dask import ClusterRequest, connect_cluster
from echoshift.pipeline.errors import EchoshiftError
from echoshift.train.grids import PlannedRun, Stage
from echoshift.train.runs import RESULTS, RunRecord, keep_latest, read_runs
from echoshift.train.splits import DataPlaces, find_shift
from echoshift.train.stage2.inputs import NeededStage1, list_needed
from echoshift.train.watching import EpochWatcher, SilentWatcher

if TYPE_CHECKING:
    from echoshift.train.settings import RunSettings

Resolve = Callable[[Stage, tuple[str, ...]], "RunSettings"]


@dataclass(frozen=True, slots=True)
class FailedRun:
    """A planned run that didn't finish, and why, in one line."""

    planned: PlannedRun
    reason: str


@dataclass(frozen=True, slots=True)
class _Task:
    """One call to make, and the planned runs that fail with it."""

    call: Callable[..., None]
    arguments: tuple[Any, ...]
    serves: tuple[PlannedRun, ...]
    counts: int


def select_missing(
    planned: Sequence[PlannedRun], records: Iterable[RunRecord], manifest_sha256: str
) -> list[PlannedRun]:
    """Return, in order, the planned runs without a record of this manifest for each of their selection rules."""
    done = {
        (record.stage, record.config_hash, record.shift, record.seed, record.selection)
        for record in keep_latest(records).values()
        if record.manifest_sha256 == manifest_sha256
    }
    return [
        run
        for run in planned
        if not all((run.stage, run.config_hash, run.shift, run.seed, rule) in done for rule in list_rules(run))
    ]


def list_rules(run: PlannedRun) -> tuple[str, ...]:
    """List the selection rules under which a planned run is scored."""
    if run.stage == "stage1":
        return ("last",)
    chosen: Mapping[str, Any] = run.config[run.stage]["selection" if run.stage == "stage2" else "scoring"]
    return tuple(chosen["rules"])


def run_grid(
    missing: Sequence[PlannedRun],
    places: DataPlaces,
    runs_dir: Path,
    resolve: Resolve,
    watcher: EpochWatcher,
    *,
    n_workers: int = 1,
    gpus: Sequence[str] = (),
) -> list[FailedRun]:
    """Run all that is missing, each appended to the results as it ends; return those that failed.

    First the runs of Stage 1, those that other rows need among them, then the runs on cached features. `resolve` makes
    the settings of a row from its stage and overrides. With several workers each run is a Dask task of a local cluster,
    one GPU a worker where `gpus` lists them.
    """
    first = _plan_stage1(missing, places, runs_dir, resolve)
    second = [run for run in missing if run.stage != "stage1"]
    watcher.start("runs", sum(task.counts for task in first) + len(second))
    failed = _run_tasks(first, watcher, n_workers, gpus)
    lost = {id(run.planned) for run in failed}
    watcher.advance(sum(id(run) in lost for run in second))
    tasks = [
        _Task(run_one, (run, places, runs_dir, resolve(run.stage, run.overrides)), (run,), 1)
        for run in second
        if id(run) not in lost
    ]
    return failed + _run_tasks(tasks, watcher, n_workers, gpus)


def _plan_stage1(missing: Sequence[PlannedRun], places: DataPlaces, runs_dir: Path, resolve: Resolve) -> list[_Task]:
    """Plan each run of Stage 1 once, exporting features where a row of Stage 2 or alignment reads them."""
    from echoshift.train.stage1.steps import Stage1Request

    records = read_runs(runs_dir / RESULTS)
    needed: dict[tuple[str, str, int], NeededStage1] = {}
    rows: dict[tuple[str, str, int], list[PlannedRun]] = {}
    for run in missing:
        settings = resolve(run.stage, run.overrides)
        shift = find_shift(places.card, run.shift)
        of_run = [NeededStage1(settings.stage1, shift, run.seed)]
        if run.stage != "stage1":
            of_run = list_needed(settings, shift, run.seed, runs_dir, records)
        for stage1 in of_run:
            needed.setdefault(stage1.key, stage1)
            rows.setdefault(stage1.key, []).append(run)
    tasks = []
    for key, stage1 in needed.items():
        serves = rows[key]
        own = [run for run in serves if run.stage == "stage1"]
        request = Stage1Request(
            places,
            stage1.shift,
            stage1.seed,
            stage1.config,
            runs_dir,
            row=own[0].row if own else "",
            export=len(own) < len(serves),
        )
        tasks.append(_Task(run_one_stage1, (request,), tuple(serves), max(1, len(own))))
    return tasks


def run_one_stage1(request: Any) -> None:
    """Run Stage 1 in this process, silently."""
    from echoshift.train.ranks import Ranks
    from echoshift.train.stage1.run import run_stage1

    run_stage1(request, SilentWatcher(), ranks=Ranks())


def run_one(run: PlannedRun, places: DataPlaces, runs_dir: Path, settings: RunSettings) -> None:
    """Run Stage 2 or alignment in this process, silently."""
    from echoshift.pipeline.devices import resolve_device
    from echoshift.train.run_method import plan_network_run, run_training

    shift = find_shift(places.card, run.shift)
    planned = plan_network_run(places, settings, shift, run.seed, runs_dir, row=run.row)
    run_training(planned, SilentWatcher(), resolve_device(places.device))


def _run_tasks(tasks: Sequence[_Task], watcher: EpochWatcher, n_workers: int, gpus: Sequence[str]) -> list[FailedRun]:
    if n_workers > 1 and tasks:
        return _run_in_workers(tasks, watcher, n_workers, gpus)
    failed = []
    for task in tasks:
        try:
            task.call(*task.arguments)
        except EchoshiftError as error:
            failed += _note_failure(task, str(error), watcher)
        watcher.advance(task.counts)
    return failed


def _run_in_workers(
    tasks: Sequence[_Task], watcher: EpochWatcher, n_workers: int, gpus: Sequence[str]
) -> list[FailedRun]:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    failed = []
    with connect_cluster(ClusterRequest("local", n_workers, gpus=tuple(gpus))) as client:
        futures = {}
        for i, task in enumerate(tasks):
            arguments = tuple(_make_portable(argument) for argument in task.arguments)
            futures[client.submit(task.call, *arguments, pure=False, priority=-i, key=f"run-{i}")] = task
        for future in as_completed(futures, loop=client.loop):
            task, error = futures[future], future.exception()
            if isinstance(error, EchoshiftError | KilledWorker):
                reason = str(error) if isinstance(error, EchoshiftError) else "its worker died, for want of memory?"
                failed += _note_failure(task, reason, watcher)
            elif error is not None:
                raise error
            watcher.advance(task.counts)
    return failed


def _note_failure(task: _Task, reason: str, watcher: EpochWatcher) -> list[FailedRun]:
    run = task.serves[0]
    watcher.describe(f"{run.row}, {run.shift}, seed {run.seed} failed: {reason}")
    return [FailedRun(served, reason) for served in task.serves]


def _make_portable(argument: Any) -> Any:
    """Make paths absolute, and have a worker, which may not start processes, decode by itself."""
    from echoshift.train.stage1.steps import Stage1Request

    if isinstance(argument, DataPlaces):
        where = str(argument.cache_dir)
        cache = where if "://" in where else str(Path(where).absolute())
        return replace(argument, cache_dir=cache, media_root=argument.media_root.absolute())
    if isinstance(argument, Stage1Request):
        visual = argument.config.visual.model_copy(update={"n_readers": 0})
        return replace(
            argument,
            config=argument.config.model_copy(update={"visual": visual}),
            places=_make_portable(argument.places),
            runs_dir=argument.runs_dir.absolute(),
        )
    return argument.absolute() if isinstance(argument, Path) else argument
