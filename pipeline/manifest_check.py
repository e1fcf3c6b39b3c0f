"""Checks segments against their dataset card and their media, and finds every fault, not only the first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError, MediaError, MediaNotFoundError
from echoshift.pipeline.segments import END_TOLERANCE_S, Segment
from echoshift.pipeline.suggestions import suggest


class MediaProbe(Protocol):
    """Tells facts of media; extract implements it, because pipeline opens no video."""

    def probe_duration_s(self, segment: Segment) -> float:
        """Return the length in seconds of the segment's video; raises MediaNotFoundError, or another MediaError."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a manifest; `line` 0 stands for the file as a whole.

    A `warning` doesn't make the manifest unusable: counts that differ from the card (people use subsets), or the same
    span of a video in two splits. `media` says that the segment's whole video is at fault: every segment of it has the
    same message then.
    """

    path: str
    line: int
    segment_id: str
    message: str
    remedy: str
    level: Literal["error", "warning"] = "error"
    media: Literal["", "missing", "unreadable"] = ""

    def __str__(self) -> str:
        """Print as `file:line: segment X: message; remedy`."""
        place = f"{self.path}:{self.line}" if self.line else self.path
        segment = f"segment {self.segment_id}: " if self.segment_id else ""
        return f"{place}: {segment}{self.message}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """A segment with the line it was read from; `times_known` is False where they couldn't be read as numbers."""

    line: int
    segment: Segment
    times_known: bool = True


def number_rows(segments: Iterable[Segment]) -> list[ManifestRow]:
    """Return each segment the line that it has in a manifest CSV: the header is line 1."""
    return [ManifestRow(line, segment) for line, segment in enumerate(segments, start=2)]


def find_segment_faults(rows: Sequence[ManifestRow], card: DatasetCard, path: Path) -> list[Fault]:
    """Find what is wrong with segments in themselves and against the card, in the order of the rows.

    Duplicate ids (naming both lines), impossible times, names that the card doesn't have, labels that don't suit the
    task, timed labels outside their segment.
    """
    faults: list[Fault] = []
    first_lines: dict[str, int] = {}
    for row in rows:
        segment = row.segment
        found = list(_find_name_faults(segment, card))
        first_line = first_lines.setdefault(segment.segment_id, row.line)
        if first_line != row.line:
            found.append((f"its segment_id is that of line {first_line} too", "give each segment its own"))
        if row.times_known:
            found += _find_time_faults(segment)
        found += _find_timed_label_faults(segment, card, row.times_known)
        faults += [Fault(str(path), row.line, segment.segment_id, message, remedy) for message, remedy in found]
    return faults


def _find_name_faults(segment: Segment, card: DatasetCard) -> Iterator[tuple[str, str]]:
    if not segment.segment_id:
        yield "it has no segment_id", "give it one"
    parts = PurePosixPath(segment.video_id).parts
    if not parts:
        yield "it has no video_id", "name its video below the media root"
    elif parts[0] == "/" or ".." in parts:
        yield f"video_id {segment.video_id!r} leads out of the media root", "name the video below the media root"
    yield from _find_unknown("domain", [segment.domain], card.domains)
    yield from _find_unknown("split", [segment.split], card.splits)
    yield from _find_unknown("class", segment.labels, card.classes)
    if card.task == "single-label" and len(segment.labels) != 1:
        n_labels = f"{len(segment.labels)} labels" if segment.labels else "no label"
        yield f"it has {n_labels}", f"{card.name} is single-label: give exactly one"
    twice = [label for label, n in Counter(segment.labels).items() if n > 1]
    if twice and card.task == "multi-label":
        yield f"label {twice[0]!r} is given twice", "give it once"


def _find_unknown(what: str, names: Iterable[str], known: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if name not in known:
            yield f"unknown {what} {name!r}", suggest(name, known, there="the card has")


def _find_time_faults(segment: Segment) -> Iterator[tuple[str, str]]:
    for name, time_s in (("start_s", segment.start_s), ("stop_s", segment.stop_s)):
        if not math.isfinite(time_s):
            yield f"{name} is {time_s}", "give it in seconds from the start of the video"
        elif time_s < 0:
            yield f"{name} {time_s} is negative", "give it in seconds from the start of the video"
    if segment.stop_s <= segment.start_s:
        yield f"stop_s {segment.stop_s} is not after start_s {segment.start_s}", "correct the times"


def _find_timed_label_faults(segment: Segment, card: DatasetCard, times_known: bool) -> Iterator[tuple[str, str]]:
    yield from _find_unknown("class of a timed label", [timed.label for timed in segment.timed_labels], card.classes)
    for timed in segment.timed_labels:
        span = f"timed label {timed.label!r} {timed.start_s} to {timed.stop_s} s"
        if timed.label not in segment.labels:
            yield f"{span} is not among its labels", "add it to the labels"
        if not (math.isfinite(timed.start_s) and math.isfinite(timed.stop_s) and timed.start_s < timed.stop_s):
            yield f"{span} is no span", "correct its times"
        elif times_known and (timed.start_s < segment.start_s or timed.stop_s > segment.stop_s):
            yield f"{span} is outside the segment, {segment.start_s} to {segment.stop_s} s", "correct either"


def find_media_faults(rows: Sequence[ManifestRow], probe: MediaProbe, path: Path) -> list[Fault]:
    """Find missing and unreadable media, and segments that end more than END_TOLERANCE_S after their video.

    Asks once a video (video_id, domain and split together: a media layout may use all three).
    """
    faults: list[Fault] = []
    durations: dict[tuple[str, str, str], float | MediaError] = {}
    for row in rows:
        segment = row.segment
        key = (segment.video_id, segment.domain, segment.split)
        if key not in durations:
            try:
                durations[key] = probe.probe_duration_s(segment)
            except MediaError as error:
                durations[key] = error
        duration_s = durations[key]
        media: Literal["", "missing", "unreadable"] = ""
        if isinstance(duration_s, MediaNotFoundError):
            media = "missing"
            found = (f"no media: {duration_s}", "put the file there, or give another media root")
        elif isinstance(duration_s, MediaError):
            media = "unreadable"
            found = (f"unreadable media: {duration_s}", "replace the file")
        elif row.times_known and segment.stop_s > duration_s + END_TOLERANCE_S:
            found = (
                f"it ends at {segment.stop_s} s, its video {segment.video_id} at {duration_s:.3f} s",
                "correct the time, or the video is another version or incomplete",
            )
        else:
            continue
        faults.append(Fault(str(path), row.line, segment.segment_id, *found, media=media))
    return faults


def find_count_warnings(segments: Iterable[Segment], card: DatasetCard, path: Path) -> list[Fault]:
    """Find where the numbers of segments, of each class and of videos differ from those that the card expects."""
    segments = list(segments)
    warnings: list[Fault] = []
    remedy = "all right for a subset, else get the official files again"
    for expected in card.counts:
        members = [s for s in segments if (s.domain, s.split) == (expected.domain, expected.split)]
        place = f"{expected.domain} {expected.split}"
        found: list[str] = []
        if len(members) != expected.n_segments:
            found.append(f"{place} has {len(members)} segments, the card expects {expected.n_segments}")
        if expected.n_per_class:
            n_per_class = Counter(label for s in members for label in s.labels)
            for name, n_expected in zip(card.classes, expected.n_per_class, strict=True):
                if n_per_class[name] != n_expected:
                    found.append(f"{place} has {n_per_class[name]} of class {name}, the card expects {n_expected}")
        n_videos = len({s.video_id for s in members})
        if expected.n_videos is not None and n_videos != expected.n_videos:
            found.append(f"{place} has {n_videos} videos, the card expects {expected.n_videos}")
        warnings += [Fault(str(path), 0, "", message, remedy, "warning") for message in found]
    return warnings


def find_leak_warnings(rows: Sequence[ManifestRow], path: Path) -> list[Fault]:
    """Find segments whose very span of the same video another split holds too (HAC's human lists have 24)."""
    seen: dict[tuple[str, float, float], ManifestRow] = {}
    warnings: list[Fault] = []
    for row in rows:
        segment = row.segment
        other = seen.setdefault((segment.video_id, segment.start_s, segment.stop_s), row)
        if other.segment.split != segment.split:
            message = f"line {other.line} has the same span of {segment.video_id} in split {other.segment.split}"
            remedy = "take it out of one of them, or know that scores are a little flattered"
            warnings.append(Fault(str(path), row.line, segment.segment_id, message, remedy, "warning"))
    return warnings


def require_counts(segments: Iterable[Segment], card: DatasetCard, place: Path, allow_counts: bool) -> None:
    """Raise ManifestError naming domain, split, found and expected where counts differ from the card's.

    Importers call it, because official files are complete; `allow_counts` lets a deliberate subset pass.
    """
    warnings = [] if allow_counts else find_count_warnings(segments, card, place)
    if warnings:
        listed = "; ".join(warning.message for warning in warnings)
        raise ManifestError(f"{place}: {listed}; get the official files again, or allow other counts for a subset")
