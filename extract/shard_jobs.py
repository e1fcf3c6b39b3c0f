"""Joins a run's plan with its rows: what each shard is to be computed from, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echoshift.extract.extraction_plan import ExtractionPlan, ShardWork
from echoshift.extract.kept_rows import KeptRows
from echoshift.extract.workers import compute_shard_on_worker, make_ticket
from echoshift.pipeline.execution import ShardReport, ShardTask
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.interface import Failure, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import FAILED, N_DIGEST_BYTES, PENDING


@dataclass(frozen=True, slots=True)
class ExtractionJob:
    """The work of stores that have the same rows.

    Attributes:
        rows: a segment for each row, None where the manifest no longer has it.
        digests: by store path, what each row is to be made from, uint8 [row, 16].
        n_threads: of torch on a worker; None: as many as the worker was started with.
    """

    plan: ExtractionPlan
    rows: Sequence[Segment | None]
    digests: Mapping[str, np.ndarray]
    stores: Mapping[str, FeatureStore]
    n_threads: int | None = None

    def describe_work(self, task: ShardTask) -> ShardWork:
        """Cut a shard's part out of the rows."""
        of_shard = slice(task.shard.start_row, task.shard.stop_row)
        return ShardWork(
            task, tuple(self.rows[of_shard]), {path: self.digests[path][of_shard] for path in task.store_paths}
        )

    def compute(self, task: ShardTask, notify: Callable[[int], None]) -> ShardReport:
        """Compute a shard in this process; `notify` is told of every row of the shard."""
        from echoshift.extract.shard import (
            process_shard,  # brings torch, which a run with nothing to do needn't wait for
        )

        n_told = 0

        def tell(n_rows: int) -> None:
            nonlocal n_told
            n_told += n_rows
            notify(n_rows)

        report = process_shard(self.plan, self.describe_work(task), self.stores, tell)
        if n_told < task.shard.n_rows:  # rows that are kept, or have left the manifest
            notify(task.shard.n_rows - n_told)
        return report

    def describe_call(self, task: ShardTask, topic: str) -> tuple[Callable[..., ShardReport], tuple[Any, ...]]:
        """Return what a Dask worker is to call; the same plan, versions and files are checked there."""
        return compute_shard_on_worker, (make_ticket(topic, self.n_threads), self.plan, self.describe_work(task))

    def give_up(self, task: ShardTask, reason: str) -> ShardReport:
        """Make the report of a shard whose workers die: its rows have failed, and a retry may help."""
        return ShardReport(task, {path: self._fail_rows(task, path, reason) for path in task.store_paths})

    def _fail_rows(self, task: ShardTask, path: str, reason: str) -> ShardIndex:
        work = self.describe_work(task)
        n, k = task.shard.n_rows, self.stores[path].layout.n_clips
        kept = KeptRows(self.stores[path], task.shard, task.kept_rows.get(path, ()))
        present = np.asarray([segment is not None for segment in work.segments]) & ~kept.is_kept
        sound = self.stores[path].spec.audio is not None
        index = ShardIndex(
            times=np.full((n, k, 2), np.nan),
            frames=np.full((n, k, 2), -1, dtype=np.int64),
            n_valid=np.zeros(n, dtype=np.int32),
            digest=np.where(present[:, None], work.digests[path], np.zeros(N_DIGEST_BYTES, dtype=np.uint8)),
            state=np.where(present, FAILED, PENDING).astype(np.uint8),
            has_audio=np.zeros(n, dtype=np.uint8) if sound else None,
            loudness_dbfs=np.full(n, -np.inf, dtype=np.float32) if sound else None,
            failures=tuple(
                Failure(segment.segment_id, segment.video_id, "WorkerDied", reason, True)
                for segment, failed in zip(work.segments, present.tolist(), strict=True)
                if segment is not None and failed
            ),
        )
        kept.fill_index(index)
        return index
