"""Defines what a worker must know to compute a shard; plain data that travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.weights.resolve import WeightsRecord
from pipeline.cards import MediaLayout
from pipeline.segments import Segment
from pipeline.specs import FeatureSpec


@dataclass(frozen=True, slots=True)
class StoreTarget:
    """Is one store to be filled: its place, what goes in, with which weights, and each row's expected digest."""

    path: str
    spec: FeatureSpec
    weights: WeightsRecord
    digests: np.ndarray


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    """Is everything that is the same for all shards of a run.

    `segments` has an entry for every row of the stores, None where the manifest no longer has the row's segment.
    `n_clips_per_batch` is how many clips go through a network at once; a batch never leaves its shard.
    """

    segments: tuple[Segment | None, ...]
    media_root: Path
    media_layout: MediaLayout
    targets: Mapping[str, StoreTarget]
    device: str
    n_clips_per_batch: int
