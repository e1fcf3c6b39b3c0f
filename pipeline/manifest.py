"""Read, write, check and summarise manifests: the segments of a dataset as CSV or Parquet."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError, MediaError, MediaNotFoundError, suggest
from echoshift.pipeline.places import MANIFESTS_DIR
from echoshift.pipeline.segments import END_TOLERANCE_S, Manifest, Segment, TimedLabel

REQUIRED_COLUMNS = ("segment_id", "video_id", "start_s", "stop_s", "labels", "domain", "split")
OPTIONAL_COLUMNS = ("noun", "pair_id", "tags", "timed_labels")
COLUMNS = REQUIRED_COLUMNS + OPTIONAL_COLUMNS
_JOINED = ("label", "tag", "timed label")
_N_LISTED = 50

ProbeDuration = Callable[[Segment], float]
"""Length in seconds of a segment's video; raises MediaError. From extract, because pipeline opens no video."""


def locate_manifest(dataset: str, manifests_dir: Path = MANIFESTS_DIR) -> Path:
    """Return where a dataset's manifest lies unless told otherwise: data/manifests/<dataset>.csv."""
    return manifests_dir / f"{dataset}.csv"


def write_manifest(path: Path, segments: Iterable[Segment]) -> str:
    """Write a manifest as CSV in one step (temporary file, then replaced) and return the sha256 of its bytes.

    Raises ManifestError naming the segment for what could not be read back as it is: a `;` or a line break in a name,
    an empty label or tag, tags that are not sorted, a time that is no finite number.
    """
    if path.suffix != ".csv":
        raise ManifestError(f"{path}: manifests are written as .csv; choose such a name")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for segment in segments:
        writer.writerow(_format_segment(segment))
    content = text.getvalue().encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return hashlib.sha256(content).hexdigest()


def _format_segment(segment: Segment) -> list[str]:
    def refuse(what: str) -> ManifestError:
        return ManifestError(f"segment {segment.segment_id!r} can't be written: {what}")

    names = {
        "segment_id": [segment.segment_id], "video_id": [segment.video_id], "label": list(segment.labels),
        "domain": [segment.domain], "split": [segment.split], "noun": [segment.noun], "pair_id": [segment.pair_id],
        "tag": list(segment.tags), "timed label": [timed.label for timed in segment.timed_labels],
    }  # fmt: skip
    for what, values in names.items():
        for value in values:
            bad = next((c for c in value if c in "\r\n\0" or (c == ";" and what in _JOINED)), None)
            if bad is not None:
                raise refuse(f"{what} {value!r} holds {bad!r}; rename it")
            if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
                raise refuse(f"{what} {value!r} is not valid text; rename it")
            if not value and what in _JOINED:
                raise refuse(f"it has an empty {what}; leave it out")
    if list(segment.tags) != sorted(set(segment.tags)):
        raise refuse(f"its tags {segment.tags} are not sorted and unique; sort them")
    spans = [(segment.start_s, segment.stop_s), *((timed.start_s, timed.stop_s) for timed in segment.timed_labels)]
    if not all(math.isfinite(time_s) for span in spans for time_s in span):
        raise refuse("a time is not a finite number; correct it")
    return [
        segment.segment_id, segment.video_id, repr(float(segment.start_s)), repr(float(segment.stop_s)),
        ";".join(segment.labels), segment.domain, segment.split, segment.noun, segment.pair_id, ";".join(segment.tags),
        ";".join(f"{t.label} {float(t.start_s)!r} {float(t.stop_s)!r}" for t in segment.timed_labels),
    ]  # fmt: skip


def read_manifest(path: Path, card: DatasetCard) -> Manifest:
    """Read a manifest (.csv or .parquet) and check it against its card; media are not looked at.

    Raises ManifestError with one `file:line: ...` a fault (the first 50). In a Parquet file a line is a row, from 1.
    """
    rows, faults, sha256 = _read_rows(path)
    faults = sorted([*faults, *find_segment_faults(rows, card, path)], key=lambda fault: fault.line)
    if faults:
        listed = [str(fault) for fault in faults[:_N_LISTED]]
        if len(faults) > _N_LISTED:
            listed.append(f"... and {len(faults) - _N_LISTED} more")
        raise ManifestError("\n".join(listed))
    return Manifest(card.name, tuple(row.segment for row in rows), sha256)


def read_unchecked_segments(path: Path) -> tuple[Segment, ...]:
    """Read a manifest without a card to check it against; raises ManifestError where a cell can't be read."""
    rows, faults, _ = _read_rows(path)
    if faults:
        raise ManifestError("\n".join(str(fault) for fault in sorted(faults, key=lambda fault: fault.line)[:_N_LISTED]))
    return tuple(row.segment for row in rows)


def check_manifest(path: Path, card: DatasetCard, probe_duration_s: ProbeDuration | None = None) -> list[Fault]:
    """Read a manifest and find all of its faults by line, then the warnings; with a probe, those of its media too.

    Raises ManifestError only where there is no table to check: no such file, an unknown or a missing column.
    """
    rows, faults, _ = _read_rows(path)
    faults = [*faults, *find_segment_faults(rows, card, path)]
    if probe_duration_s is not None:
        faults += find_media_faults(rows, probe_duration_s, path)
    return [
        *sorted(faults, key=lambda fault: fault.line),
        *find_leak_warnings(rows, path),
        *find_count_warnings((row.segment for row in rows), card, path),
    ]


def _read_rows(path: Path) -> tuple[list[ManifestRow], list[Fault], str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(f"no manifest {path}; make it with an importer") from error
    except OSError as error:
        raise ManifestError(f"{path} can't be read: {error.strerror}; name a .csv or .parquet file") from error
    rows: list[ManifestRow] = []
    faults: list[Fault] = []
    cells: Iterator[tuple[int, Mapping[str, Any]]]
    if path.suffix == ".csv":
        cells = _read_csv_cells(path, content, faults)
    elif path.suffix == ".parquet":
        cells = _read_parquet_cells(path, content)
    else:
        raise ManifestError(f"{path}: a manifest ends in .csv or .parquet")
    for line, values in cells:
        row, found = _parse_row(line, values)
        rows.append(row)
        faults += [Fault(str(path), line, row.segment.segment_id, message, remedy) for message, remedy in found]
    return rows, faults, hashlib.sha256(content).hexdigest()


def _require_columns(path: Path, names: Sequence[str]) -> None:
    place = f"{path}:1" if path.suffix == ".csv" else str(path)
    for name in names:
        separator = next((mark for mark in ";\t|" if mark in name), None)
        if separator is not None and set(name.split(separator)) & {*COLUMNS}:
            raise ManifestError(f"{place}: columns are separated by {separator!r}; save the file with commas")
        if name not in COLUMNS:
            raise ManifestError(f"{place}: unknown column {name!r}; {suggest(name, COLUMNS, there='a manifest has')}")
        if names.count(name) > 1:
            raise ManifestError(f"{place}: column {name!r} is there twice; drop one")
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if missing:
        raise ManifestError(f"{place}: no column {missing[0]!r}; a manifest needs {', '.join(REQUIRED_COLUMNS)}")


def _read_csv_cells(path: Path, content: bytes, faults: list[Fault]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = next(reader, None)
        if header is None:
            raise ManifestError(f"{path} is empty; make it with an importer")
        _require_columns(path, header)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                message = f"it has {len(cells)} cells, the header {len(header)}"
                faults.append(Fault(str(path), line, cells[0], message, "quote cells that hold a comma"))
            elif cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ManifestError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error
    except csv.Error as error:
        raise ManifestError(f"{path}:{reader.line_num}: not valid CSV: {error}; correct the quotes") from error


def _read_parquet_cells(path: Path, content: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{path} is no Parquet file: {error}; write it again") from error
    _require_columns(path, table.column_names)
    yield from enumerate(table.to_pylist(), start=1)


def _parse_row(line: int, values: Mapping[str, Any]) -> tuple[ManifestRow, list[tuple[str, str]]]:
    """Make a segment of cells (text, or Parquet's numbers, lists and structs); faults as (message, remedy)."""
    found: list[tuple[str, str]] = []

    def read_text(name: str) -> str:
        value = values.get(name)
        text = "" if value is None else value if isinstance(value, str) else str(value)
        if any(c in text for c in "\r\n\0"):
            found.append((f"{name} {text!r} holds a line break", "take it out"))
        return text

    def read_names(name: str) -> tuple[str, ...]:
        value = values.get(name)
        parts = [str(v) for v in value] if isinstance(value, list) else read_text(name).split(";")
        if any(";" in part for part in parts) or (len(parts) > 1 and not all(parts)):
            found.append((f"{name} {value!r} has an empty name or one with ';'", "write names joined by single ';'"))
        return tuple(part for part in parts if part)

    def read_time(what: str, value: Any) -> float | None:
        try:
            return float(value)
        except (TypeError, ValueError):
            found.append((f"{what} {value!r} is no number", "give seconds, such as 12.5"))
            return None

    start_s, stop_s = (read_time(name, values.get(name)) for name in ("start_s", "stop_s"))
    timed_labels: list[TimedLabel] = []
    value = values.get("timed_labels")
    entries: list[Any] = value if isinstance(value, list) else list(filter(None, read_text("timed_labels").split(";")))
    for entry in entries:
        if isinstance(entry, dict):
            parts = [entry.get(key) for key in ("label", "start_s", "stop_s")]
        else:
            parts = entry.rsplit(" ", 2)
        if len(parts) != 3 or not parts[0]:
            found.append((f"timed label {entry!r} is not `label start stop`", "give a class and two times in seconds"))
            continue
        first_s, last_s = (read_time(f"time of timed label {parts[0]!r}", part) for part in parts[1:])
        if first_s is not None and last_s is not None:
            timed_labels.append(TimedLabel(parts[0], first_s, last_s))
    segment = Segment(
        segment_id=read_text("segment_id"), video_id=read_text("video_id"),
        start_s=math.nan if start_s is None else start_s, stop_s=math.nan if stop_s is None else stop_s,
        labels=read_names("labels"), domain=read_text("domain"), split=read_text("split"), noun=read_text("noun"),
        pair_id=read_text("pair_id"), tags=tuple(sorted(set(read_names("tags")))), timed_labels=tuple(timed_labels),
    )  # fmt: skip
    return ManifestRow(line, segment, start_s is not None and stop_s is not None), found


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a manifest; `line` 0 means the file as a whole.

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


def find_media_faults(rows: Sequence[ManifestRow], probe_duration_s: ProbeDuration, path: Path) -> list[Fault]:
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
                durations[key] = probe_duration_s(segment)
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
    summaries = []
    for (domain, split), group in members.items():
        counts = Counter(label for segment in group for label in segment.labels)
        n_per_class = tuple(counts[name] for name in card.classes)
        n_videos = len({segment.video_id for segment in group})
        n_short = sum(math.floor(s.stop_s * 60) - math.floor(s.start_s * 60) < 64 for s in group)
        summaries.append(SplitSummary(domain, split, len(group), n_per_class, n_videos, n_short))
    return summaries


N_LISTED_VIDEOS = 20


def list_fault_lines(faults: Sequence[Fault]) -> list[str]:
    """List faults as `LEVEL: fault`, errors before warnings.

    Of missing videos, and of unreadable ones, the first N_LISTED_VIDEOS have a line each, which counts their segments;
    a last one after all errors counts the others. Whatever else is wrong has a line of its own.
    """
    videos: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        if fault.media:
            videos.setdefault((fault.media, fault.message), []).append(fault)
    of_videos: dict[int, str] = {}  # by the fault that stands for its video
    more = []
    for kind in ("missing", "unreadable"):
        of_kind = [members for (media, _), members in videos.items() if media == kind]
        of_videos.update((id(members[0]), _describe_video(members)) for members in of_kind[:N_LISTED_VIDEOS])
        if hidden := of_kind[N_LISTED_VIDEOS:]:
            n_segments = sum(map(len, hidden))
            what = f"{kind} video{'s' if len(hidden) > 1 else ''}"
            counted = f"and {len(hidden)} more {what}, of {n_segments} segments"
            more.append(f"error: {hidden[0][0].path}: {counted}; --json lists all")
    errors = [
        of_videos.get(id(fault), f"error: {fault}")
        for fault in faults
        if fault.level == "error" and (not fault.media or id(fault) in of_videos)
    ]
    return [*errors, *more, *(f"warning: {fault}" for fault in faults if fault.level == "warning")]


def _describe_video(members: Sequence[Fault]) -> str:
    first, n_more = members[0], len(members) - 1
    of_video = f" and {n_more} more of its video" if n_more else ""
    return f"error: {first.path}:{first.line}: segment {first.segment_id}{of_video}: {first.message}; {first.remedy}"


def join_missing(faults: Sequence[Fault], n_videos: int, folder: Path) -> list[Fault]:
    """Put one fault of the file before the others, in place of those of missing videos, where all n_videos are.

    It says what was looked for first.
    """
    missing = [fault for fault in faults if fault.media == "missing"]
    reason = missing[0].message.removeprefix("no media: ")
    message = f"none of the {n_videos} videos is in {folder}: {reason}"
    joined = Fault(missing[0].path, 0, "", message, "name the folder that holds them with --media, or mount its disk")
    return [joined, *(fault for fault in faults if fault.media != "missing")]
