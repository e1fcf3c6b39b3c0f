"""What a run computes, as plain data that travels between processes: its options, its stores, and each shard's part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from echoshift.extract.weights.load import WeightsRecord
    from echoshift.pipeline.cards import MediaLayout
    from echoshift.pipeline.execution import ShardTask
    from echoshift.pipeline.segments import Segment
    from echoshift.pipeline.specs import FeatureSpec


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Machine and patience of a run; nothing here changes a feature or has a part in a fingerprint.

    Attributes:
        device: auto, cpu, cuda or cuda:n.
        n_clips_per_batch: how many clips go through a network at once, None for the device's own number; a batch never
            leaves its shard.
        n_readers: threads that read media, each a segment at a time, None for the device's own number.
        segment_timeout_s: how long reading may take between two of a segment's inputs before the segment fails.
    """

    device: str = "auto"
    n_clips_per_batch: int | None = None
    n_readers: int | None = None
    segment_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class StoreTarget:
    """One store to be filled: its path, what goes in, and with which weights."""

    path: str
    spec: FeatureSpec
    weights: WeightsRecord


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    """Everything that is the same for all shards of a run.

    Attributes:
        targets: by store path.
        n_threads: of torch on a worker; None: as many as the worker was started with.
        versions: of the driver's packages, which a worker must have too; empty without workers.
    """

    media_root: Path
    media_layout: MediaLayout
    targets: Mapping[str, StoreTarget]
    options: RunOptions
    n_threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardWork:
    """One shard to be computed.

    Attributes:
        task: the shard and its stores.
        segments: an entry for each of the shard's rows, None where the manifest no longer has the row's segment.
        digests: by store path, what each row is to be made from, uint8 [n_rows, 16].
    """

    task: ShardTask
    segments: tuple[Segment | None, ...]
    digests: Mapping[str, np.ndarray]
