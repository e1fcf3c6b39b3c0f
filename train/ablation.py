"""Runs what a grid asks for and isn't done yet, here or in worker processes; a run that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.clusters import ClusterRequest, connect_cluster
from pipeline.errors import EchoshiftError
from train.grids import PlannedRun
from train.ranks import Ranks
from train.runs import RunRecord, keep_latest
from train.stage1.encoder_training import EpochWatcher
from train.stage1.run_context import Stage1Request
from train.stage1.running import run_stage1


@dataclass(frozen=True, slots=True)
class FailedRun:
    """Is a run that came to no end, and why, in a line."""

    planned: PlannedRun
    reason: str


class _Silent:
    """Says nothing of the steps inside a run."""

    def start(self, what: str, n_total: int) -> None:
        """Says nothing."""

    def advance(self, n: int = 1) -> None:
        """Says nothing."""

    def describe(self, what: str) -> None:
        """Says nothing."""


def select_missing(
    planned: Sequence[PlannedRun], records: Iterable[RunRecord], manifest_sha256: str
) -> list[PlannedRun]:
    """Gives the planned runs that have no record of this manifest, in order."""
    done = {
        (record.config_hash, record.shift, record.seed)
        for record in keep_latest(records).values()
        if record.stage == "stage1" and record.selection == "last" and record.manifest_sha256 == manifest_sha256
    }
    return [run for run in planned if (run.config_hash, run.shift, run.seed) not in done]


def run_grid(
    planned: Sequence[PlannedRun],
    make_request: Callable[[PlannedRun], Stage1Request],
    watcher: EpochWatcher,
    *,
    n_workers: int = 1,
    gpus: tuple[str, ...] = (),
) -> list[FailedRun]:
    """Runs all that is planned, each appended to the results as it ends; gives those that failed."""
    watcher.start("runs", len(planned))
    if n_workers == 1:
        return _run_here(planned, make_request, watcher)
    return _run_in_workers(planned, make_request, watcher, ClusterRequest("local", n_workers, gpus=gpus))


def _run_here(
    planned: Sequence[PlannedRun], make_request: Callable[[PlannedRun], Stage1Request], watcher: EpochWatcher
) -> list[FailedRun]:
    failed = []
    for run in planned:
        try:
            _run_one(make_request(run))
        except EchoshiftError as error:
            failed.append(FailedRun(run, str(error)))
            watcher.describe(f"{_name(run)} failed: {error}")
        watcher.advance()
    return failed


def _run_in_workers(
    planned: Sequence[PlannedRun],
    make_request: Callable[[PlannedRun], Stage1Request],
    watcher: EpochWatcher,
    cluster: ClusterRequest,
) -> list[FailedRun]:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    failed = []
    with connect_cluster(cluster) as client:
        futures = {}
        for i, run in enumerate(planned):
            request = _without_readers(make_request(run))
            futures[client.submit(_run_one, request, pure=False, priority=-i, key=f"run-{i}")] = run
        for future in as_completed(futures, loop=client.loop):
            run = futures[future]
            error = future.exception()
            if isinstance(error, EchoshiftError | KilledWorker):
                reason = str(error) if isinstance(error, EchoshiftError) else "its worker died, for want of memory?"
                failed.append(FailedRun(run, reason))
                watcher.describe(f"{_name(run)} failed: {reason}")
            elif error is not None:
                raise error
            watcher.advance()
    return failed


def _without_readers(request: Stage1Request) -> Stage1Request:
    """Has a worker, which may start no processes, decode by itself; paths hold wherever it runs."""
    config = request.config
    visual = config.visual.model_copy(update={"n_readers": 0})
    places = request.places
    where = str(places.cache_dir)
    cache = where if "://" in where else str(Path(where).absolute())
    return replace(
        request,
        config=config.model_copy(update={"visual": visual}),
        places=replace(places, cache_dir=cache, media_root=places.media_root.absolute()),
        runs_dir=request.runs_dir.absolute(),
    )


def _run_one(request: Stage1Request) -> None:
    run_stage1(request, _Silent(), ranks=Ranks())


def _name(run: PlannedRun) -> str:
    return f"{run.row}, {run.shift}, seed {run.seed}"
