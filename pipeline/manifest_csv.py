"""Reads and writes manifests: CSV, diffable and exact to the last bit; Parquet is read too.

One header row, then one segment a line: segment_id, video_id, start_s, stop_s, labels, domain, split, noun, pair_id,
tags, timed_labels. `labels` and `tags` are joined by `;`, `timed_labels` is `label start stop;...` in seconds. Times
are written with repr, so a float64 comes back as itself. The last four columns may be absent.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.manifest_check import (
    Fault,
    ManifestRow,
    MediaProbe,
    find_count_warnings,
    find_leak_warnings,
    find_media_faults,
    find_segment_faults,
)
from echoshift.pipeline.places import MANIFESTS_DIR
from echoshift.pipeline.segments import Manifest, Segment, TimedLabel
from echoshift.pipeline.suggestions import suggest

REQUIRED_COLUMNS = ("segment_id", "video_id", "start_s", "stop_s", "labels", "domain", "split")
OPTIONAL_COLUMNS = ("noun", "pair_id", "tags", "timed_labels")
COLUMNS = REQUIRED_COLUMNS + OPTIONAL_COLUMNS
_JOINED = ("label", "tag", "timed label")
_N_LISTED = 50


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
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
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
    faults = _sort_faults([*faults, *find_segment_faults(rows, card, path)])
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
        raise ManifestError("\n".join(str(fault) for fault in _sort_faults(faults)[:_N_LISTED]))
    return tuple(row.segment for row in rows)


def check_manifest(path: Path, card: DatasetCard, probe: MediaProbe | None = None) -> list[Fault]:
    """Read a manifest and find all of its faults by line, then the warnings; with a probe, those of its media too.

    Raises ManifestError only where there is no table to check: no such file, an unknown or a missing column.
    """
    rows, faults, _ = _read_rows(path)
    faults = [*faults, *find_segment_faults(rows, card, path)]
    if probe is not None:
        faults += find_media_faults(rows, probe, path)
    return [
        *_sort_faults(faults),
        *find_leak_warnings(rows, path),
        *find_count_warnings((row.segment for row in rows), card, path),
    ]


def _sort_faults(faults: list[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: fault.line)


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
