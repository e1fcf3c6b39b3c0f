"""Runs shards: which are to be done, by whom, and in which order their results become part of the stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.store.interface import FeatureStore, ShardIndex
from pipeline.store.layout import FAILED, Shard, StoreLayout, plan_shards
from pipeline.store.ledger import read_failures, write_failures


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Is one shard together with the stores (by path) whose rows in it are to be computed."""

    shard: Shard
    store_paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Is what a worker returns for a task: the index of each store's shard; the features are in the stores already."""

    task: ShardTask
    indices: Mapping[str, ShardIndex]


def select_rows(store: FeatureStore, digests: np.ndarray, in_manifest: np.ndarray, *, retry_failed: bool) -> np.ndarray:
    """Selects the rows to compute, bool [row]: in the manifest, and pending or stale, or failed where asked for."""
    wanted = store.missing(digests)
    if retry_failed:
        wanted = wanted | (store.read_array("state") == FAILED)
    return wanted & in_manifest


def plan_tasks(wanted: Mapping[str, np.ndarray], layout: StoreLayout) -> list[ShardTask]:
    """Lists the shards with work to do, in row order.

    `wanted` maps a store's path to its rows to compute, bool [row]; the stores have the same rows and shards.
    """
    tasks = []
    for shard in plan_shards(layout):
        rows = slice(shard.start_row, shard.stop_row)
        paths = tuple(path for path, selected in wanted.items() if selected[rows].any())
        if paths:
            tasks.append(ShardTask(shard, paths))
    return tasks


def commit_report(stores: Mapping[str, FeatureStore], report: ShardReport) -> None:
    """Commits a shard in every store it was computed for: the ledger first, then the index with `state` last."""
    shard = report.task.shard
    for path, index in report.indices.items():
        store = stores[path]
        failures = read_failures(Path(path))
        before = dict(failures)
        for segment_id in store.segment_ids[shard.start_row : shard.stop_row]:
            failures.pop(segment_id, None)
        failures.update({f.segment_id: f for f in index.failures})
        if failures != before:
            write_failures(Path(path), failures.values())
        store.commit_shard(shard, index)


def begin_task(stores: Mapping[str, FeatureStore], task: ShardTask) -> None:
    """Sets the rows of a task to pending in every store it is for, so that a run killed inside it redoes them all."""
    for path in task.store_paths:
        stores[path].begin_shard(task.shard)


def run_in_process(
    process: Callable[[ShardTask], ShardReport],
    tasks: Iterable[ShardTask],
    stores: Mapping[str, FeatureStore],
    committed: Callable[[ShardReport], None] = lambda report: None,
) -> None:
    """Runs tasks one after the other in this process, each committed before the next begins."""
    for task in tasks:
        begin_task(stores, task)
        report = process(task)
        commit_report(stores, report)
        committed(report)
