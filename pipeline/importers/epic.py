"""Imports the EPIC-Kitchens-55 domain adaptation splits of MM-SADA (METHODS 1)."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.importers.annotation_csv import read_annotation_rows
from echoshift.pipeline.manifest import require_counts
from echoshift.pipeline.restricted_pickle import (
    NUMPY_CONSTRUCTORS,
    PANDAS_CONSTRUCTORS,
    PickledFrame,
    read_restricted_pickle,
)
from echoshift.pipeline.segments import Segment

COLUMNS = ("uid", "video_id", "start_timestamp", "stop_timestamp", "verb_class")


def import_epic(
    folder: Path, card: DatasetCard, nouns_csv: Path | None = None, allow_counts: bool = False
) -> tuple[Segment, ...]:
    """Read `D{1,2,3}_{train,test}` of a folder, each as .pkl or, where there is none, as .csv.

    segment_id is the uid: (video, start_frame) is not unique. Times come from the time stamps, exactly. `nouns_csv` is
    EPIC-55's EPIC_train_action_labels.csv, joined on uid; it covers the train files, the nouns of the others stay "".
    Raises ManifestError naming file and row for a fault, or domain and split where a count is not the card's.
    """
    nouns = (
        {}
        if nouns_csv is None
        else {cells["uid"]: cells["noun"] for _, cells in read_annotation_rows(nouns_csv, ("uid", "noun"))}
    )
    segments: list[Segment] = []
    first_places: dict[str, str] = {}
    for split in card.splits:
        for domain in card.domains:
            for place, cells in _read_split(folder, f"{domain}_{split}"):
                segment = _make_segment(place, cells, card, domain, split, nouns)
                first = first_places.setdefault(segment.segment_id, place)
                if first != place:
                    raise ManifestError(
                        f"{place}: uid {segment.segment_id} is that of {first} too; get the files again"
                    )
                segments.append(segment)
    if nouns_csv is not None and not any(segment.noun for segment in segments):
        raise ManifestError(f"{nouns_csv} knows none of the uids; give EPIC-55's EPIC_train_action_labels.csv")
    require_counts(segments, card, folder, allow_counts)
    return tuple(segments)


def _read_split(folder: Path, stem: str) -> list[tuple[str, dict[str, str]]]:
    pickle_path, csv_path = folder / f"{stem}.pkl", folder / f"{stem}.csv"
    if not pickle_path.exists():
        if not csv_path.exists():
            raise ManifestError(f"neither {pickle_path} nor {csv_path.name} is there; get MM-SADA's six split files")
        return [(f"{csv_path}:{line}", cells) for line, cells in read_annotation_rows(csv_path, COLUMNS)]
    frame = read_restricted_pickle(pickle_path, {**NUMPY_CONSTRUCTORS, **PANDAS_CONSTRUCTORS})
    if not isinstance(frame, PickledFrame):
        raise ManifestError(f"{pickle_path} holds no pandas frame; get MM-SADA's split files again")
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise ManifestError(f"{pickle_path}: no column {missing[0]!r}; get MM-SADA's split files again")
    rows = zip(*(frame.columns[name].tolist() for name in COLUMNS), strict=True)
    return [
        (f"{pickle_path}:row {i}", dict(zip(COLUMNS, map(str, row), strict=True)))
        for i, row in enumerate(rows, start=1)
    ]


def _make_segment(
    place: str, cells: dict[str, str], card: DatasetCard, domain: str, split: str, nouns: dict[str, str]
) -> Segment:
    index = cells["verb_class"]
    if not index.isdecimal() or int(index) >= len(card.classes):
        raise ManifestError(f"{place}: verb_class {index!r} is not 0 to {len(card.classes) - 1}; get the file again")
    start_s, stop_s = (parse_timestamp(cells[f"{which}_timestamp"], place) for which in ("start", "stop"))
    if stop_s <= start_s:
        raise ManifestError(f"{place}: uid {cells['uid']} stops before it starts; correct its time stamps")
    uid, labels = cells["uid"], (card.classes[int(index)],)
    return Segment(uid, cells["video_id"], start_s, stop_s, labels, domain, split, nouns.get(uid, ""))


def parse_timestamp(text: str, place: str) -> float:
    """Read HH:MM:SS.ss as seconds: the float64 nearest to the exact value; raises ManifestError naming the place."""
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)", text, flags=re.ASCII)
    if match is None:
        raise ManifestError(f"{place}: time stamp {text!r} is not HH:MM:SS.ss; correct it")
    hours, minutes, seconds = match.groups()
    return float(int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds))
