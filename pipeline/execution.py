"""Runs shards: which are to be done, by whom, and in which order their results become part of the stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from echoshift.pipeline.store.failures import FailureLedger
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import FAILED, Shard, StoreLayout, plan_shards
from echoshift.pipeline.store.lock import StoreLock


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard together with the stores (by path) whose rows in it are to be computed.

    Attributes:
        kept_rows: by store path, the rows of the shard that are done and stay as they are; none where it has no entry.
    """

    shard: Shard
    store_paths: tuple[str, ...]
    kept_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A worker's result for a task: the index of each store's shard. The features are in the stores already."""

    task: ShardTask
    indices: Mapping[str, ShardIndex]


def select_rows(store: FeatureStore, digests: np.ndarray, in_manifest: np.ndarray, *, retry_failed: bool) -> np.ndarray:
    """Select the rows to compute, bool [row]: in the manifest, and pending or stale, or failed where asked for."""
    wanted = store.missing(digests)
    if retry_failed:
        wanted = wanted | (store.read_array("state") == FAILED)
    return wanted & in_manifest


def plan_tasks(
    wanted: Mapping[str, np.ndarray], layout: StoreLayout, kept: Mapping[str, np.ndarray] | None = None
) -> list[ShardTask]:
    """List the shards with work to do, in row order.

    `wanted` maps a store's path to its rows to compute, bool [row], and `kept` to those that stay as they are (none
    where it isn't given); the stores have the same rows and shards.
    """
    kept = kept or {}
    tasks = []
    for shard in plan_shards(layout):
        rows = slice(shard.start_row, shard.stop_row)
        paths = tuple(path for path, selected in wanted.items() if selected[rows].any())
        if paths:
            of_paths = {path: shard.start_row + np.flatnonzero(kept[path][rows]) for path in paths if path in kept}
            tasks.append(ShardTask(shard, paths, {path: tuple(found.tolist()) for path, found in of_paths.items()}))
    return tasks


def commit_report(
    stores: Mapping[str, FeatureStore], report: ShardReport, holds: Mapping[str, StoreLock] | None = None
) -> None:
    """Commit a shard in every store it was computed for: the ledger first, then the index with `state` last.

    `holds` are the rights to write the stores, by path; each keeps its store's ledger in memory. Raises StoreError
    before anything is written when a store's lock was removed meanwhile.
    """
    shard = report.task.shard
    for path, index in report.indices.items():
        store = stores[path]
        if holds is None:
            ledger = FailureLedger(path)
        else:
            holds[path].check()
            ledger = holds[path].ledger
        ledger.settle(store.segment_ids[shard.start_row : shard.stop_row], index.failures)
        store.commit_shard(shard, index)


def begin_task(
    stores: Mapping[str, FeatureStore], task: ShardTask, holds: Mapping[str, StoreLock] | None = None
) -> None:
    """Set the rows of a task that aren't kept to pending, so that a run killed inside it redoes them all."""
    for path in task.store_paths:
        if holds is not None:
            holds[path].check()
        stores[path].begin_shard(task.shard, task.kept_rows.get(path, ()))


def run_in_process(
    process: Callable[[ShardTask], ShardReport],
    tasks: Iterable[ShardTask],
    stores: Mapping[str, FeatureStore],
    committed: Callable[[ShardReport], None] = lambda report: None,
    holds: Mapping[str, StoreLock] | None = None,
) -> None:
    """Run tasks one after the other in this process, each committed before the next begins."""
    for task in tasks:
        begin_task(stores, task, holds)
        report = process(task)
        commit_report(stores, report, holds)
        committed(report)
