"""Segments and cards from folders of videos: <domain>/<split>/<class>/, and HAC's lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError, MediaError, suggest
from echoshift.pipeline.importers.annotation_csv import read_annotation_rows
from echoshift.pipeline.importers.own import make_card_from_names
from echoshift.pipeline.manifest import ProbeDuration, require_counts
from echoshift.pipeline.segments import Segment

VIDEO_ENDINGS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
)  # fmt: skip


def import_folder(
    root: Path,
    probe_duration_s: Callable[[Path], float],
    card: DatasetCard | None = None,
    allow_counts: bool = False,
) -> tuple[Segment, ...]:
    """Make a segment of every video file in `<domain>/<split>/<class>/` below `root`, sorted by path.

    A segment is the whole video, as long as `probe_duration_s` says; its segment_id and video_id are the path below
    `root` with `/` and without the ending. Files with other endings and names that begin with a dot are passed over.
    Without a card the names are taken as they are (`card_from_folder` makes the card). Raises ManifestError naming the
    folder for a domain, split or class that the card doesn't have, both files where two differ in their endings only,
    and every file that can't be measured.
    """
    card = card_from_folder(root) if card is None else card
    segments: list[Segment] = []
    unreadable: list[str] = []
    seen: dict[str, Path] = {}
    for domain, split, label, path in _list_videos(root):
        for what, name, known in (
            ("domain", domain, card.domains),
            ("split", split, card.splits),
            ("class", label, card.classes),
        ):
            if name not in known:
                hint = suggest(name, known, there=f"card {card.name} has")
                raise ManifestError(f"{path}: unknown {what} {name!r}; {hint}")
        video_id = path.relative_to(root).with_suffix("").as_posix()
        other = seen.setdefault(video_id, path)
        if other != path:
            raise ManifestError(f"{other} and {path} differ only in their endings; keep one, or rename the other")
        try:
            duration_s = probe_duration_s(path)
        except MediaError as error:
            unreadable.append(str(error))
            continue
        segments.append(Segment(video_id, video_id, 0.0, duration_s, (label,), domain, split))
    if unreadable:
        raise ManifestError("\n".join(unreadable))
    require_counts(segments, card, root, allow_counts)
    return tuple(segments)


def card_from_folder(root: Path, name: str | None = None) -> DatasetCard:
    """Make a single-label card of the folders' names: classes and domains sorted, every ordered pair a shift.

    `name` is the root folder's unless given. Raises ManifestError where no video is in such folders, CardError where
    they make no dataset (a single class).
    """
    found = _list_videos(root)
    return make_card_from_names(
        name or root.resolve().name,
        "Made from the names of folders.",
        classes={label for _, _, label, _ in found},
        domains={domain for domain, _, _, _ in found},
        splits={split for _, split, _, _ in found},
    )


def list_stray_videos(root: Path) -> list[Path]:
    """List the video files below `root` that lie elsewhere than in <domain>/<split>/<class>/: no import takes them."""
    taken = {path for _, _, _, path in _list_videos(root)}
    found = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in VIDEO_ENDINGS and path not in taken)
    return [
        path for path in found if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    ]


def _list_videos(root: Path) -> list[tuple[str, str, str, Path]]:
    if not root.is_dir():
        raise ManifestError(f"no folder {root}")
    found: list[tuple[str, str, str, Path]] = []
    for path in sorted(root.glob("*/*/*/*")):
        parts = path.relative_to(root).parts
        if path.suffix.lower() in VIDEO_ENDINGS and path.is_file() and not any(p.startswith(".") for p in parts):
            found.append((parts[0], parts[1], parts[2], path))
    if not found:
        raise ManifestError(f"no video in {root}/<domain>/<split>/<class>/; put the files there")
    return found


def import_hac(
    folder: Path, card: DatasetCard, probe_duration_s: ProbeDuration, allow_counts: bool = False
) -> tuple[Segment, ...]:
    """Read `HAC_{train,test}_only_{human,animal,cartoon}.csv`, rows `file,label` without a header.

    A segment is a whole video; the lists give no lengths, so `probe_duration_s` reads them from the media. video_id is
    `<domain>/videos/<file without its ending>`, SimMMDG's place for it: names repeat between animal and cartoon.
    segment_id is `<domain>/<split>/<name>`: 24 human videos are listed in train and in test.
    Raises ManifestError naming file and line, and MediaError for a video that is missing or unreadable.
    """
    segments: list[Segment] = []
    for split in card.splits:
        for domain in card.domains:
            segments += _read_list(folder / f"HAC_{split}_only_{domain}.csv", card, domain, split)
    require_counts(segments, card, folder, allow_counts)
    return tuple(replace(segment, stop_s=probe_duration_s(segment)) for segment in segments)


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
        segment_id, video_id = f"{domain}/{split}/{name}", f"{domain}/videos/{name}"
        segments.append(Segment(segment_id, video_id, 0.0, 0.0, (card.classes[int(index)],), domain, split))
    return segments
