"""Extracts chosen segments into throw-away stores, with the code and the settings of a real run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from echoshift.extract.extraction_plan import ExtractionPlan, ShardWork, StoreTarget
from echoshift.extract.media_survey import MediaSurvey, count_clips_at_most, identify_segments
from echoshift.extract.run_options import RunOptions
from echoshift.extract.weights.load import WeightsRecord
from echoshift.pipeline.execution import ShardTask, commit_report
from echoshift.pipeline.rows import compute_digests
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import Backend, FeatureStore
from echoshift.pipeline.store.layout import plan_shards
from echoshift.pipeline.store.opening import create_store, name_store

T = TypeVar("T")


def choose_spread(items: Sequence[T], n: int, seed: int) -> list[T]:
    """Choose n items, one at random from each of n equal stretches of the sequence, in its order; all if there are n.

    The same seed chooses the same.
    """
    if n >= len(items):
        return list(items)
    draw = random.Random(seed)
    borders = [i * len(items) // n for i in range(n + 1)]
    return [items[draw.randrange(first, stop)] for first, stop in pairwise(borders)]


def extract_on_trial(
    folder: Path,
    encoders: Sequence[tuple[FeatureSpec, WeightsRecord]],
    segments: Sequence[Segment],
    survey: MediaSurvey,
    options: RunOptions,
    *,
    backend: Backend = "zarr",
    n_rows_per_shard: int | None = None,
    n_clips: int | None = None,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> list[FeatureStore]:
    """Extract segments, one row each in the order given, into new stores below `folder`, one an encoder.

    `n_rows_per_shard` None means one shard for all; `n_clips` None, as many as the segments need. `notify` is called
    with the number of rows read since the last call. Failures go into the trial stores' ledgers.
    """
    from echoshift.extract.shard import process_shard  # brings torch

    stores: dict[str, FeatureStore] = {}
    targets: dict[str, StoreTarget] = {}
    digests = {}
    for spec, weights in encoders:
        store = create_store(
            name_store(folder, "trial", spec, backend),
            "trial",
            spec,
            [segment.segment_id for segment in segments],
            n_clips=n_clips or count_clips_at_most(survey, segments, spec),
            manifest_sha256="",
            weights_source=f"{weights.ref}: {weights.source}",
            n_rows_per_shard=n_rows_per_shard or len(segments),
        )
        stores[store.path] = store
        targets[store.path] = StoreTarget(store.path, spec, weights)
        digests[store.path] = compute_digests(segments, identify_segments(survey, segments, spec))
    plan = ExtractionPlan(survey.root, survey.layout, targets, options)
    for shard in plan_shards(next(iter(stores.values())).layout):
        rows = slice(shard.start_row, shard.stop_row)
        of_shard = {path: digest[rows] for path, digest in digests.items()}
        work = ShardWork(ShardTask(shard, tuple(stores)), tuple(segments[rows]), of_shard)
        commit_report(stores, process_shard(plan, work, stores, notify))
    return list(stores.values())
