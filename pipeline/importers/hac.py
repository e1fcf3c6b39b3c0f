"""Imports the lists of the Human-Animal-Cartoon dataset of SimMMDG."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.importers.annotation_csv import read_annotation_rows
from echoshift.pipeline.manifest_check import MediaProbe, require_counts
from echoshift.pipeline.segments import Segment


def import_hac(folder: Path, card: DatasetCard, probe: MediaProbe, allow_counts: bool = False) -> tuple[Segment, ...]:
    """Read `HAC_{train,test}_only_{human,animal,cartoon}.csv`, rows `file,label` without a header.

    A segment is a whole video; the lists give no lengths, so the probe reads them from the media. video_id is
    `<domain>/videos/<file without its ending>`, SimMMDG's place for it: names repeat between animal and cartoon.
    segment_id is `<domain>/<split>/<name>`: 24 human videos are listed in train and in test.
    Raises ManifestError naming file and line, and the probe's MediaError for a video that is missing or unreadable.
    """
    segments: list[Segment] = []
    for split in card.splits:
        for domain in card.domains:
            segments += _read_list(folder / f"HAC_{split}_only_{domain}.csv", card, domain, split)
    require_counts(segments, card, folder, allow_counts)
    return tuple(replace(segment, stop_s=probe.probe_duration_s(segment)) for segment in segments)


def _read_list(path: Path, card: DatasetCard, domain: str, split: str) -> list[Segment]:
    segments: list[Segment] = []
    first_lines: dict[str, int] = {}
    for line, cells in read_annotation_rows(path, ("file", "label"), has_header=False):
        name, dot, _ending = cells["file"].rpartition(".")
        if not (name and dot) or "/" in name:
            raise ManifestError(f"{path}:{line}: {cells['file']!r} is not the name of a video file; get the list again")
        first_line = first_lines.setdefault(name, line)
        if first_line != line:
            raise ManifestError(f"{path}:{line}: {name} is on line {first_line} too; get the list again")
        index = cells["label"]
        if not index.isdecimal() or int(index) >= len(card.classes):
            raise ManifestError(
                f"{path}:{line}: label {index!r} is not 0 to {len(card.classes) - 1}; get the list again"
            )
        segments.append(
            Segment(
                segment_id=f"{domain}/{split}/{name}",
                video_id=f"{domain}/videos/{name}",
                start_s=0.0,
                stop_s=0.0,
                labels=(card.classes[int(index)],),
                domain=domain,
                split=split,
            )
        )
    return segments
