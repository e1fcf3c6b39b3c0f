"""What a worker must know to compute a shard; plain data that travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echoshift.extract.run_options import RunOptions
from echoshift.extract.weights.load import WeightsRecord
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.execution import ShardTask
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec


@dataclass(frozen=True, slots=True)
class StoreTarget:
    """One store to be filled: its place, what goes in, and with which weights."""

    path: str
    spec: FeatureSpec
    weights: WeightsRecord


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    """Everything that is the same for all shards of a run; `targets` are by the store's path."""

    media_root: Path
    media_layout: MediaLayout
    targets: Mapping[str, StoreTarget]
    options: RunOptions


@dataclass(frozen=True, slots=True)
class ShardWork:
    """One shard to be computed, with what is its own.

    Attributes:
        task: the shard and its stores.
        segments: an entry for each of the shard's rows, None where the manifest no longer has the row's segment.
        digests: by store path, what each row is to be made from, uint8 [n_rows, 16].
    """

    task: ShardTask
    segments: tuple[Segment | None, ...]
    digests: Mapping[str, np.ndarray]
