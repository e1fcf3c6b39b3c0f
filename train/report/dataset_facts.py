"""Counts what a dataset is made of: segments, classes, durations, silence, and how labels shift between domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.manifest import summarise_manifest
from echoshift.pipeline.segments import Manifest, Segment

TRAIN = "train"


@dataclass(frozen=True, slots=True)
class PartFacts:
    """One split of one domain.

    Attributes:
        n_per_class: in the card's order; a segment of several classes counts in each.
        n_heard, n_silent: segments whose sound is known to be there, or not to be; their sum may be below
            `n_segments`, because only a store of sound knows.
        duration_s: the whole, then shortest, median and longest segment; NaN where there is no segment.
    """

    domain: str
    split: str
    n_segments: int
    n_videos: int
    n_short: int
    n_per_class: tuple[int, ...]
    n_heard: int
    n_silent: int
    total_s: float
    shortest_s: float
    median_s: float
    longest_s: float

    @property
    def silent_share(self) -> float | None:
        """The share of silent segments among those of which it is known; None where of none."""
        n_known = self.n_heard + self.n_silent
        return self.n_silent / n_known if n_known else None


@dataclass(frozen=True, slots=True)
class LabelShift:
    """How far the label distributions of two train splits lie apart, 0 (the same) to 1 (no class in common).

    `distance` is the total variation distance, half the sum over classes of |p - q|. `largest` names the class whose
    share differs most, `source_share` and `target_share` are its shares. It reads the target's labels: analysis alone.
    """

    source: str
    target: str
    distance: float
    largest: str
    source_share: float
    target_share: float


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """A dataset in numbers; `parts` without segments are left out, `duration_bins` are edges in seconds.

    `durations` counts, by domain, segments in each bin. `sound_store` names the store that knows what is silent, ""
    where none does.
    """

    classes: tuple[str, ...]
    parts: tuple[PartFacts, ...]
    shifts: tuple[LabelShift, ...]
    duration_bins: tuple[float, ...]
    durations: Mapping[str, tuple[int, ...]]
    n_segments: int
    n_videos: int
    total_s: float
    sound_store: str


N_DURATION_BINS = 24


def count_dataset(
    manifest: Manifest, card: DatasetCard, has_audio: Mapping[str, bool], sound_store: str = ""
) -> DatasetFacts:
    """Count a dataset; `has_audio` says of segments, by id, whether there is sound, as far as it is known."""
    segments = tuple(manifest)
    members: dict[tuple[str, str], list[Segment]] = {}
    for segment in segments:
        members.setdefault((segment.domain, segment.split), []).append(segment)
    parts = []
    for summary in summarise_manifest(segments, card):
        group = members.get((summary.domain, summary.split), [])
        if not group:
            continue
        durations = np.array([segment.duration_s for segment in group])
        known = [has_audio[s.segment_id] for s in group if s.segment_id in has_audio]
        parts.append(
            PartFacts(
                domain=summary.domain,
                split=summary.split,
                n_segments=summary.n_segments,
                n_videos=summary.n_videos,
                n_short=summary.n_short,
                n_per_class=summary.n_per_class,
                n_heard=sum(known),
                n_silent=len(known) - sum(known),
                total_s=float(durations.sum()),
                shortest_s=float(durations.min()),
                median_s=float(np.median(durations)),
                longest_s=float(durations.max()),
            )
        )
    bins, counts = _count_durations(segments, card.domains)
    return DatasetFacts(
        classes=card.classes,
        parts=tuple(parts),
        shifts=compare_labels(segments, card),
        duration_bins=bins,
        durations=counts,
        n_segments=len(segments),
        n_videos=len({(segment.domain, segment.video_id) for segment in segments}),
        total_s=float(sum(segment.duration_s for segment in segments)),
        sound_store=sound_store,
    )


def compare_labels(segments: Sequence[Segment], card: DatasetCard) -> tuple[LabelShift, ...]:
    """Compare the label distributions of the train splits of each pair of domains that the card names as a shift.

    Multi-label: the distribution over all labels given. A pair is left out where a side has no label.
    """
    counts: dict[str, Counter[str]] = {domain: Counter() for domain in card.domains}
    for segment in segments:
        if segment.split == TRAIN:
            counts[segment.domain].update(segment.labels)
    shifts = []
    for shift in card.shifts:
        source = _share(sum((counts[domain] for domain in shift.source), Counter()), card.classes)
        target = _share(counts[shift.target], card.classes)
        if source is None or target is None:
            continue
        gap = np.abs(source - target)
        k = int(gap.argmax())
        shifts.append(
            LabelShift(
                source="+".join(shift.source),
                target=shift.target,
                distance=float(gap.sum() / 2),
                largest=card.classes[k],
                source_share=float(source[k]),
                target_share=float(target[k]),
            )
        )
    return tuple(shifts)


def _share(counts: Counter[str], classes: Sequence[str]) -> np.ndarray | None:
    values = np.array([counts[name] for name in classes], dtype=np.float64)
    return values / values.sum() if values.sum() else None


def _count_durations(
    segments: Sequence[Segment], domains: Sequence[str]
) -> tuple[tuple[float, ...], dict[str, tuple[int, ...]]]:
    """Count durations in bins of equal ratio, because segments last from a fraction of a second to minutes."""
    durations = np.array([segment.duration_s for segment in segments])
    if not len(durations):
        return (), {}
    low, high = float(durations.min()), float(durations.max())
    edges = np.geomspace(low, high, N_DURATION_BINS + 1) if high > low else np.array([low * 0.9, low * 1.1])
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # which rounding may have moved inwards
    of = np.array([segment.domain for segment in segments])
    counts = {
        domain: tuple(np.histogram(durations[of == domain], edges)[0].tolist())
        for domain in domains
        if (of == domain).any()
    }
    return tuple(edges.tolist()), counts
