"""Counts what a manifest holds: segments, classes, videos, and how many segments are short."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.segments import Segment

FRAME_RATE_HZ = 60
N_SPAN_FRAMES = 64


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """One row of METHODS 1's table: a domain's split with its counts."""

    domain: str
    split: str
    n_segments: int
    n_per_class: tuple[int, ...]
    n_videos: int
    n_short: int


def summarise_manifest(segments: Iterable[Segment], card: DatasetCard) -> list[SplitSummary]:
    """Count what METHODS 1's table shows, a row a split and domain, train first.

    `n_short` counts segments of fewer than 64 frames at 60 fps, frame numbers being floor(t * 60) as MM-SADA's are.
    """
    members: dict[tuple[str, str], list[Segment]] = {(d, s): [] for s in card.splits for d in card.domains}
    for segment in segments:
        members[segment.domain, segment.split].append(segment)
    return [
        SplitSummary(
            domain=domain,
            split=split,
            n_segments=len(group),
            n_per_class=_count_classes(group, card),
            n_videos=len({segment.video_id for segment in group}),
            n_short=sum(_count_frames(segment) < N_SPAN_FRAMES for segment in group),
        )
        for (domain, split), group in members.items()
    ]


def _count_classes(segments: list[Segment], card: DatasetCard) -> tuple[int, ...]:
    counts = Counter(label for segment in segments for label in segment.labels)
    return tuple(counts[name] for name in card.classes)


def _count_frames(segment: Segment) -> int:
    return math.floor(segment.stop_s * FRAME_RATE_HZ) - math.floor(segment.start_s * FRAME_RATE_HZ)
