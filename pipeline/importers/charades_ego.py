"""Imports CharadesEgo's official lists: paired third- and first-person videos with timed activities (METHODS 1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.importers.annotation_csv import parse_seconds, read_annotation_rows
from echoshift.pipeline.manifest import require_counts
from echoshift.pipeline.segments import Segment, TimedLabel

Pairs = Literal["all", "half", "none"]
VIEWS = {"third": "3rd", "first": "1st"}
_EGO = "EGO"
_logger = logging.getLogger(__name__)


def import_charades_ego(
    folder: Path,
    card: DatasetCard,
    labelled_fraction: float = 0.5,
    pairs: Pairs = "all",
    allow_counts: bool = False,
) -> tuple[Segment, ...]:
    """Read `CharadesEgo_v1_{train,test}_only{1st,3rd}.csv`; a segment is a whole video, 0 to its `length`.

    labels are the distinct classes in order, none is allowed; timed_labels keep each action's times, cut to the video
    (an action with nothing left inside stays in labels alone; how many were cut is logged). pair_id is the id without
    EGO. The first `labelled_fraction` of the first-person train file (rounded down) is tagged `labelled`, the rest
    `unlabelled` (A section 5.1: half; released code: the file's first half; A Fig. 5 varies it).

    `pairs` thins the train split for A section 5.2's question whether pairs are needed. The paper says only "half of
    the paired videos from both views" and "unpaired videos"; our reading, with pairs ranked in the order of the
    first-person file: `half` keeps both views of every other pair; `none` keeps the same first-person videos and the
    third-person videos of the other pairs, so that no event is seen from both sides while both settings have equally
    many videos. Taking every other pair leaves the labelled fraction as it is. Videos without a counterpart are left
    out of both. Test is never thinned.

    Raises ManifestError naming file and line, or domain and split where the full files' counts are not the card's.
    """
    if not 0 <= labelled_fraction <= 1:
        raise ManifestError(f"labelled_fraction {labelled_fraction} is not between 0 and 1")
    if pairs not in ("all", "half", "none"):
        raise ManifestError(f"pairs {pairs!r} is not one of all, half, none")
    n_cut = 0
    files: dict[tuple[str, str], list[Segment]] = {}
    for split in card.splits:
        for domain, view in VIEWS.items():
            path = folder / f"CharadesEgo_v1_{split}_only{view}.csv"
            files[domain, split], n_cut_here = _read_view(path, card, domain, split)
            n_cut += n_cut_here
    if n_cut:
        _logger.warning("%s: %d actions reach beyond their videos and were cut there", folder, n_cut)
    require_counts((s for group in files.values() for s in group), card, folder, allow_counts)
    files["first", "train"] = tag_labelled(files["first", "train"], labelled_fraction)
    if pairs != "all":
        files["third", "train"], files["first", "train"] = thin_pairs(
            files["third", "train"], files["first", "train"], pairs
        )
    return tuple(segment for group in files.values() for segment in group)


def _read_view(path: Path, card: DatasetCard, domain: str, split: str) -> tuple[list[Segment], int]:
    """Read one file; return its segments and how many actions were cut."""
    segments: list[Segment] = []
    n_cut = 0
    first_lines: dict[str, int] = {}
    for line, cells in read_annotation_rows(path, ("id", "actions", "length")):
        place = f"{path}:{line}"
        video_id = cells["id"]
        if not video_id or video_id.endswith(_EGO) != (domain == "first"):
            raise ManifestError(f"{place}: id {video_id!r} is not of a {domain}-person video; get the file again")
        first_line = first_lines.setdefault(video_id, line)
        if first_line != line:
            raise ManifestError(f"{place}: id {video_id} is that of line {first_line} too; get the file again")
        length_s = parse_seconds(cells["length"], place)
        if length_s == 0:
            raise ManifestError(f"{place}: video {video_id} has length 0; get the file again")
        actions = [_parse_action(text, card, place) for text in cells["actions"].split(";") if text.strip()]
        inside = [replace(action, stop_s=min(action.stop_s, length_s)) for action in actions]
        kept = tuple(action for action in inside if action.stop_s > action.start_s)
        n_cut += sum(action not in kept for action in actions)
        segments.append(
            Segment(
                segment_id=video_id,
                video_id=video_id,
                start_s=0.0,
                stop_s=length_s,
                labels=tuple(dict.fromkeys(action.label for action in actions)),
                domain=domain,
                split=split,
                pair_id=video_id.removesuffix(_EGO),
                timed_labels=kept,
            )
        )
    return segments, n_cut


def _parse_action(text: str, card: DatasetCard, place: str) -> TimedLabel:
    parts = text.split()
    if len(parts) != 3 or parts[0] not in card.class_index:
        raise ManifestError(f"{place}: action {text!r} is not `class start end` with a class of the card; correct it")
    return TimedLabel(parts[0], parse_seconds(parts[1], place), parse_seconds(parts[2], place))


def tag_labelled(segments: Sequence[Segment], labelled_fraction: float) -> list[Segment]:
    """Tag the first `labelled_fraction` of segments (rounded down) `labelled`, the others `unlabelled`."""
    # 1e-9: 0.29 * 100 is 28.999... in floating point.
    n_labelled = math.floor(labelled_fraction * len(segments) + 1e-9)
    return [
        replace(segment, tags=("labelled",) if i < n_labelled else ("unlabelled",))
        for i, segment in enumerate(segments)
    ]


def thin_pairs(
    third: Sequence[Segment], first: Sequence[Segment], pairs: Literal["half", "none"]
) -> tuple[list[Segment], list[Segment]]:
    """Thin the train splits of two views as `import_charades_ego` says."""
    in_third = {segment.pair_id for segment in third}
    ranked = [segment.pair_id for segment in first if segment.pair_id in in_third]
    even, odd = set(ranked[::2]), set(ranked[1::2])
    from_third = even if pairs == "half" else odd
    return [s for s in third if s.pair_id in from_third], [s for s in first if s.pair_id in even]
