"""Run a shard's work on dask.distributed: a cluster's address, or SLURM."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

from echoshift.pipeline.errors import ClusterError
from echoshift.pipeline.execution import ShardReport, ShardTask, begin_task, commit_report
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.lock import StoreLock

if TYPE_CHECKING:
    from distributed import Client, Future
    from distributed.deploy.spec import SpecCluster

CONNECT_TIMEOUT_S = 10
FIRST_WORKER_TIMEOUT_S = 60
# A shard that is being computed when its worker dies goes to another; when that dies too it is set aside.
N_DEATHS_ALLOWED = 1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class ClusterRequest:
    """Who computes a run's shards.

    Attributes:
        kind: `local` processes of this machine; `scheduler`, which runs already; `slurm` jobs.
        n_workers: how many to start; none are started under `scheduler`.
        address: of the scheduler, such as tcp://host:8786, or its scheduler file.
        gpus: local workers take these in turn, each one: entries for CUDA_VISIBLE_DEVICES; empty: none is given out.
        slurm_options: for dask_jobqueue.SLURMCluster, over Dask's own configuration (`jobqueue.slurm`).
    """

    kind: Literal["local", "scheduler", "slurm"]
    n_workers: int = 1
    address: str = ""
    gpus: tuple[str, ...] = ()
    slurm_options: Mapping[str, object] = field(default_factory=dict)


@contextmanager
def connect_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Return a client with at least one worker; whatever this starts has ended when the block ends, however it ends.

    Raises ClusterError when a package is missing, or no scheduler or worker answers.
    """
    import dask

    settings: dict[str, object] = {
        "distributed.scheduler.allowed-failures": N_DEATHS_ALLOWED,
        "distributed.comm.timeouts.connect": f"{CONNECT_TIMEOUT_S}s",
        # Features go to the store and not through Dask, so spilling and pausing have nothing to gain: they would only
        # stall a worker whose networks fill its memory.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
    }
    if request.kind == "local":
        n_threads = str(count_threads_per_worker(request))
        settings |= {f"distributed.nanny.pre-spawn-environ.{name}": n_threads for name in THREAD_VARIABLES}
    with ExitStack() as held:
        held.enter_context(dask.config.set(settings))
        from distributed import Client

        held.enter_context(_quiet_logs())

        if request.kind == "scheduler":
            client = held.enter_context(_join_scheduler(request.address))
        else:
            start = _start_local if request.kind == "local" else _start_slurm
            client = held.enter_context(Client(held.enter_context(start(request)), set_as_default=False))
        timeout_s = None if request.kind == "slurm" else FIRST_WORKER_TIMEOUT_S  # a queue may take hours
        try:
            client.wait_for_workers(1, timeout=timeout_s)
        except TimeoutError as error:
            place = request.address or "of this run"
            raise ClusterError(
                f"the scheduler {place} has had no worker for {timeout_s} s; start some with "
                f"`dask worker ADDRESS --nthreads 1`"
            ) from error
        yield client


def count_threads_per_worker(request: ClusterRequest) -> int | None:
    """Return how many threads a worker's networks may use; None: what the worker was started with."""
    from dask.system import CPU_COUNT

    return max(1, CPU_COUNT // request.n_workers) if request.kind == "local" else None


def describe_cluster(request: ClusterRequest | None) -> str:
    """Describe in a few words who computes, for a store's history."""
    if request is None:
        return "in process"
    return f"scheduler {request.address}" if request.kind == "scheduler" else f"{request.n_workers} {request.kind}"


def read_scheduler_address(address: str) -> dict[str, str]:
    """Turn what --scheduler says into the client's argument: an address, or the path of a scheduler file."""
    if Path(address).is_file():
        return {"scheduler_file": address}
    if address.endswith(".json"):
        raise ClusterError(f"no scheduler file {address}; `dask scheduler --scheduler-file {address}` writes it")
    return {"address": address}


@contextmanager
def _join_scheduler(address: str) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(**read_scheduler_address(address), timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address}: {error}; is `dask scheduler` running?") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that needn't be the same
            client.get_versions(check=True)
    except ValueError as error:
        client.close(timeout=2)
        lines = " ".join(str(error).split())
        raise ClusterError(f"the scheduler {address} and its workers have other packages than here: {lines}") from error
    try:
        yield client
    finally:
        client.close(timeout=2)


@contextmanager
def _start_local(request: ClusterRequest) -> Iterator[SpecCluster]:
    """Start worker processes, each with a nanny in this process that starts it again when it dies.

    A worker ends by itself when this process does, whichever way: it watches a pipe that we hold.
    """
    from distributed import Nanny, Scheduler
    from distributed.deploy.spec import SpecCluster
    from distributed.system import MEMORY_LIMIT

    def describe_worker(i: int) -> dict[str, object]:
        options: dict[str, object] = {
            "nthreads": 1,
            "host": "127.0.0.1",
            # Not a share: the most that a shard needs is known to nobody, and one alone may have all there is.
            "memory_limit": MEMORY_LIMIT,
            "dashboard": False,
            "silence_logs": logging.CRITICAL,
        }
        if request.gpus:
            options["env"] = {"CUDA_VISIBLE_DEVICES": request.gpus[i % len(request.gpus)]}
        return {"cls": Nanny, "options": options}

    # A terminal's Ctrl-C reaches every process; ending the workers is this process' business alone. Dask's threads, and
    # the processes that they start, now and later, inherit that SIGINT is blocked; this thread takes it again.
    resource_tracker.ensure_running()  # multiprocessing unblocks SIGINT where it starts this one, so not there
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        cluster = SpecCluster(
            workers={i: describe_worker(i) for i in range(request.n_workers)},
            scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": ":0"}},
            silence_logs=logging.CRITICAL,
            name="echoshift",
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with cluster:
        yield cluster


@contextmanager
def _start_slurm(request: ClusterRequest) -> Iterator[SpecCluster]:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ClusterError("--slurm needs dask-jobqueue; install it: pip install 'echoshift[slurm]'") from error
    options: dict[str, Any] = dict(request.slurm_options)
    given = options.pop("worker_extra_args", [])
    # One shard at a time a worker: it uses a job's cores by itself. The last of two --nthreads counts.
    extra = [*(given if isinstance(given, Sequence) and not isinstance(given, str) else [given]), "--nthreads", "1"]
    try:
        cluster = SLURMCluster(worker_extra_args=extra, **options)
    except (ValueError, TypeError) as error:
        raise ClusterError(
            f"SLURM: {' '.join(str(error).split())}; set jobqueue.slurm in ~/.config/dask/jobqueue.yaml, or give "
            f"--slurm-option cores=8 --slurm-option memory=32GB and the like"
        ) from error
    with cluster:
        cluster.scale(n=request.n_workers)
        yield cluster


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep what distributed and tornado log off the terminal: what matters reaches the user as a line of ours."""
    roots = ("distributed", "tornado", "asyncio")
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(roots)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# One to compute and one that waits, so that a worker needn't wait for this process to commit.
N_TASKS_PER_WORKER = 2
COUNT_WORKERS_EVERY_S = 2.0

log = logging.getLogger(__name__)


class ShardJob(Protocol):
    """Turns a task into a function call on a worker, and into a failed report where it kills its workers."""

    def describe_call(self, task: ShardTask, topic: str) -> tuple[Callable[..., ShardReport], tuple[Any, ...]]:
        """Return a function and its arguments, all of which can be pickled; it may be called again at any time.

        The call may log events (shard index, rows read so far) under the topic.
        """
        ...

    def give_up(self, task: ShardTask, reason: str) -> ShardReport:
        """Make the report of a shard that can't be computed: its rows have failed."""
        ...


def run_with_dask(
    client: Client,
    job: ShardJob,
    tasks: Iterable[ShardTask],
    stores: Mapping[str, FeatureStore],
    notify: Callable[[int], None] = lambda n_rows: None,
    committed: Callable[[ShardReport], None] = lambda report: None,
    holds: Mapping[str, StoreLock] | None = None,
) -> None:
    """Run tasks on a client's workers, each committed here as it arrives; raises ClusterError if the scheduler goes.

    At most N_TASKS_PER_WORKER shards a worker are under way, so that a run's size is nowhere in memory. A worker that
    dies loses its shards to others. A worker that is only thought dead may go on and write the same shard as its
    successor: both write the same bytes, each chunk replaced whole, and neither commits, so nobody can tell.

    A shard whose workers die repeatedly is set aside, with any that merely waited beside it, and tried again at the
    end, alone, when it has the machine's memory for itself. If that kills its workers too, the job gives it up.
    """
    run = _DaskRun(client, job, stores, notify, committed, holds)
    suspects = run.run(tasks, n_at_once=None)
    if suspects:
        log.warning("%d shards whose workers died are tried again, one at a time", len(suspects))
    for task in run.run(suspects, n_at_once=1):
        reason = (
            f"rows {task.shard.start_row} to {task.shard.stop_row} killed every worker that computed them, alone too, "
            f"most likely for want of memory; try --retry-failed with --batch 1, on a machine with more memory, or in "
            f"a new store with smaller --rows-per-shard"
        )
        run.commit(job.give_up(task, reason))


@dataclass(slots=True)
class _DaskRun:
    """State shared by submitting, waiting and committing."""

    client: Client
    job: ShardJob
    stores: Mapping[str, FeatureStore]
    notify: Callable[[int], None]
    committed: Callable[[ShardReport], None]
    holds: Mapping[str, StoreLock] | None
    topic: str = field(default_factory=lambda: f"echoshift-{uuid4().hex}")
    n_seen: dict[int, int] = field(default_factory=dict)  # rows read of each shard
    n_workers: int = 0
    counted: float = -COUNT_WORKERS_EVERY_S
    n_runs: int = 0

    def _see(self, event: tuple[float, tuple[int, int]]) -> None:
        """Count rows read of a shard; events may come twice or never, and begin at 0 where a shard starts again."""
        shard_index, n_rows = event[1]
        before = self.n_seen.get(shard_index, 0)
        if n_rows > before:
            self.n_seen[shard_index] = n_rows
            self.notify(n_rows - before)

    def run(self, tasks: Iterable[ShardTask], n_at_once: int | None) -> list[ShardTask]:
        """Run and commit tasks; return those whose workers died too often."""
        from distributed import as_completed

        self.n_runs += 1
        waiting = iter(tasks)
        under_way: dict[str, tuple[Future, ShardTask]] = {}
        suspects: list[ShardTask] = []
        self.client.subscribe_topic(self.topic, self._see)
        finished = as_completed(loop=self.client.loop)
        try:
            while True:
                n_free = (n_at_once or N_TASKS_PER_WORKER * self._count_workers()) - len(under_way)
                for task in islice(waiting, max(0, n_free)):
                    future = self._submit(task)
                    under_way[str(future.key)] = future, task
                    finished.add(future)
                if not under_way:
                    return suspects
                future = next(finished)
                if future.status in ("pending", "lost"):
                    # It was finished, and the worker that held the result died before we had it: it runs again.
                    finished.add(future)
                    continue
                _, task = under_way.pop(str(future.key))
                report = self._receive(future)
                if report is None:
                    suspects.append(task)
                else:
                    self.commit(report)
        finally:
            for future, _ in under_way.values():
                future.release()  # which cancels it; nothing is waited for, the scheduler may be gone
            self.client.unsubscribe_topic(self.topic)

    def commit(self, report: ShardReport) -> None:
        """Make a shard's rows count."""
        commit_report(self.stores, report, self.holds)
        shard = report.task.shard
        self._see((0.0, (shard.index, shard.n_rows)))
        self.committed(report)

    def _submit(self, task: ShardTask) -> Future:
        begin_task(self.stores, task, self.holds)
        function, arguments = self.job.describe_call(task, self.topic)
        key = (f"shard-{self.topic}", self.n_runs, task.shard.index)
        return self.client.submit(function, *arguments, key=key, pure=False)

    def _receive(self, future: Future) -> ShardReport | None:
        """Return a finished call's report, None when its workers died; raises whatever the call raised."""
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker

        if future.status == "cancelled":
            raise self._explain_loss()
        error = future.exception() if future.status == "error" else None
        if error is None:
            try:
                report: ShardReport = future.result()
                return report
            except FutureCancelledError as lost:
                raise self._explain_loss() from lost
        if isinstance(error, KilledWorker):
            return None
        raise error

    def _explain_loss(self) -> ClusterError:
        return ClusterError(
            "the Dask scheduler is gone, or has dropped the run; what is committed is kept, the same command goes on "
            "from there"
        )

    def _count_workers(self) -> int:
        """Count workers now and then: they may come and go, and asking takes a message there and back."""
        if time.monotonic() - self.counted >= COUNT_WORKERS_EVERY_S:
            try:
                self.n_workers = len(self.client.nthreads())
            except (OSError, TimeoutError) as error:
                raise self._explain_loss() from error
            self.counted = time.monotonic()
        return max(1, self.n_workers)
