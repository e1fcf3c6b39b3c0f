"""Runs shards on Dask workers; this process alone hands them out, commits them, and outlives whoever dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from echoshift.pipeline.errors import ClusterError
from echoshift.pipeline.execution import ShardReport, ShardTask, begin_task, commit_report
from echoshift.pipeline.store.holding import StoreHold
from echoshift.pipeline.store.interface import FeatureStore

if TYPE_CHECKING:
    from distributed import Client, Future

# One to compute and one that waits, so that a worker needn't wait for this process to commit.
N_TASKS_PER_WORKER = 2
COUNT_WORKERS_EVERY_S = 2.0

log = logging.getLogger(__name__)


class ShardJob(Protocol):
    """How a task becomes a function call on a worker, and what becomes of a task that kills its workers."""

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
    holds: Mapping[str, StoreHold] | None = None,
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


class _RowCounter:
    """Counts rows read, from events that may come twice or never, and from shards that are done."""

    def __init__(self, notify: Callable[[int], None]) -> None:
        self._notify = notify
        self._n_seen: dict[int, int] = {}
        self._finished: set[int] = set()

    def see(self, event: tuple[float, tuple[int, int]]) -> None:
        """Take an event: so many rows of a shard have been read; less than before when it was begun anew."""
        shard_index, n_rows = event[1]
        if shard_index not in self._finished:
            self._raise(shard_index, n_rows)

    def finish(self, task: ShardTask) -> None:
        """Count the rest of a shard."""
        self._raise(task.shard.index, task.shard.n_rows)
        del self._n_seen[task.shard.index]
        self._finished.add(task.shard.index)

    def _raise(self, shard_index: int, n_rows: int) -> None:
        before = self._n_seen.get(shard_index, 0)
        self._n_seen[shard_index] = max(before, n_rows)
        if n_rows > before:
            self._notify(n_rows - before)


class _DaskRun:
    """What submitting, waiting and committing share."""

    def __init__(
        self,
        client: Client,
        job: ShardJob,
        stores: Mapping[str, FeatureStore],
        notify: Callable[[int], None],
        committed: Callable[[ShardReport], None],
        holds: Mapping[str, StoreHold] | None,
    ) -> None:
        self._client = client
        self._job = job
        self._stores = stores
        self._committed = committed
        self._holds = holds
        self._rows = _RowCounter(notify)
        self._topic = f"echoshift-{uuid4().hex}"
        self._n_workers, self._counted = 0, -COUNT_WORKERS_EVERY_S
        self._n_runs = 0

    def run(self, tasks: Iterable[ShardTask], n_at_once: int | None) -> list[ShardTask]:
        """Run and commit tasks; return those whose workers died too often."""
        from distributed import as_completed

        self._n_runs += 1
        waiting = iter(tasks)
        under_way: dict[str, tuple[Future, ShardTask]] = {}
        suspects: list[ShardTask] = []
        self._client.subscribe_topic(self._topic, self._rows.see)
        finished = as_completed(loop=self._client.loop)
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
            self._client.unsubscribe_topic(self._topic)

    def commit(self, report: ShardReport) -> None:
        """Make a shard's rows count."""
        commit_report(self._stores, report, self._holds)
        self._rows.finish(report.task)
        self._committed(report)

    def _submit(self, task: ShardTask) -> Future:
        begin_task(self._stores, task, self._holds)
        function, arguments = self._job.describe_call(task, self._topic)
        key = (f"shard-{self._topic}", self._n_runs, task.shard.index)
        return self._client.submit(function, *arguments, key=key, pure=False)

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
        if time.monotonic() - self._counted >= COUNT_WORKERS_EVERY_S:
            try:
                self._n_workers = len(self._client.nthreads())
            except (OSError, TimeoutError) as error:
                raise self._explain_loss() from error
            self._counted = time.monotonic()
        return max(1, self._n_workers)
