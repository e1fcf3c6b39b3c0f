"""Measures what Dask costs: 2 workers against 1 process on the same shards, and the time that a shard of no work takes.

Run: python -m benchmarks.dask_overhead [--rounds 5] [--segments 18] [--encoders resnet_demo]. One process has two torch
threads, two workers have one each. The cluster's start and each one's first round (imports, networks) aren't timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echoshift.extract.demo.generating import generate_demo
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaSurvey
from echoshift.extract.run import ExtractionJob, ExtractionRequest, _open_work, _plan_jobs
from echoshift.extract.weights.load import resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.dask import ClusterRequest, connect_cluster, run_with_dask
from echoshift.pipeline.execution import ShardReport, ShardTask, run_in_process
from echoshift.pipeline.segments import Manifest
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import name_store

CLUSTER = ClusterRequest("local", n_workers=2)


def hand_back(work: object, report: ShardReport) -> ShardReport:
    return report


class IdleJob:
    """A job whose shards take no time, but travel and are committed like any other."""

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job

    def compute(self, task: ShardTask) -> ShardReport:
        """Compute nothing, and say that every row is done."""
        report = self._job.give_up(task, "no work")
        indices = {
            path: replace(
                index,
                times=np.zeros_like(index.times),
                frames=np.zeros_like(index.frames),
                n_valid=np.full_like(index.n_valid, index.times.shape[1]),
                state=np.full_like(index.state, DONE),
                failures=(),
            )
            for path, index in report.indices.items()
        }
        return replace(report, indices=indices)

    def describe_call(self, task: ShardTask, topic: str) -> tuple[Callable[..., ShardReport], tuple[Any, ...]]:
        """Send the real work there, and a report back."""
        return hand_back, (self._job.describe_work(task), self.compute(task))

    def give_up(self, task: ShardTask, reason: str) -> ShardReport:
        """Return up like the job does."""
        return self._job.give_up(task, reason)


def measure_s(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--segments", type=int, default=18, help="a domain, of which there are three")
    parser.add_argument("--encoders", default="slowfast_demo resnet_demo")
    parser.add_argument("--rows-per-shard", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        n_test = arguments.segments // 3
        segments_made = generate_demo(root / "demo", n_train=arguments.segments - n_test, n_test=n_test)
        card = read_dataset_card("demo")
        encoders = []
        for name in arguments.encoders.split():
            record = resolve_weights("random:0", name)
            encoders.append((make_feature_spec(name, record, StoreOptions(), outputs=["pooled"]), record))
        request = ExtractionRequest(
            card=card,
            manifest=Manifest("demo", tuple(segments_made), "generated"),
            media_root=root / "demo",
            cache_dir=root / "cache",
            backend="zarr",
            encoders=tuple(encoders),
            options=RunOptions(device="cpu"),
            cluster=CLUSTER,
            n_rows_per_shard=arguments.rows_per_shard,
        )
        segments = {segment.segment_id: segment for segment in request.manifest}
        survey = MediaSurvey(request.media_root, card.media)
        works = []
        for spec, weights in request.encoders:
            path = name_store(request.cache_dir, card.name, spec, "zarr")
            works.append(_open_work(request, survey, path, spec, weights, segments, lambda: None, None))
        ((job, tasks),) = _plan_jobs(request, works)
        idle = IdleJob(job)
        with connect_cluster(CLUSTER) as client:
            runs = {
                "1 process": partial(run_in_process, partial(job.compute, notify=lambda n: None), tasks, job.stores),
                "2 workers": partial(run_with_dask, client, job, tasks, job.stores),
                "1 process, no work": partial(run_in_process, idle.compute, tasks, job.stores),
                "2 workers, no work": partial(run_with_dask, client, idle, tasks, job.stores),
            }
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(arguments.rounds + 1):
                for name, run in runs.items():
                    seconds[name].append(measure_s(run))
    n_rows = len(segments)
    print(f"{n_rows} segments, {len(tasks)} shards, {arguments.encoders}; medians of {arguments.rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values[1:])
        print(f"{name:20} {n_rows / median:8.1f} segments/s  {1000 * median / len(tasks):8.1f} ms a shard")
    ratios = [a / b for a, b in zip(seconds["1 process"][1:], seconds["2 workers"][1:], strict=True)]
    print(f"2 workers / 1 process: {statistics.median(ratios):.3f} x (rounds: {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
