"""Segments and cards from a user's own manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path

from pydantic import ValidationError

from echoshift.pipeline.cards import DatasetCard, MediaLayout, Shift
from echoshift.pipeline.errors import CardError, find_nearest
from echoshift.pipeline.manifest import read_manifest, read_unchecked_segments, require_counts
from echoshift.pipeline.segments import Segment

SPLIT_ORDER = ("train", "validation", "val", "test")


def make_card_from_names(
    name: str, description: str, *, classes: set[str], domains: set[str], splits: set[str], multi_label: bool = False
) -> DatasetCard:
    """Make a card: classes and domains sorted, train before test, every ordered pair of domains a shift.

    Empty names are left out, for the check of the segments to find. Raises CardError where the names make no dataset
    (a single class).
    """
    classes, domains, splits = classes - {""}, domains - {""}, splits - {""}
    if len(classes) < 2:
        only = f"one class alone, {next(iter(classes))!r}" if classes else "no class"
        raise CardError(f"the files of {name} hold {only}; a dataset needs two or more")
    try:
        return DatasetCard(
            name=name,
            title=name,
            description=description,
            task="multi-label" if multi_label else "single-label",
            metric="map" if multi_label else "top1",
            classes=tuple(sorted(classes)),
            domains=tuple(sorted(domains)),
            splits=(*(s for s in SPLIT_ORDER if s in splits), *sorted(splits - set(SPLIT_ORDER))),
            shifts=tuple(Shift(source=(source,), target=target) for source, target in permutations(sorted(domains), 2)),
            media=MediaLayout(rgb=("{video_id}",), audio=("{video_id}",)),
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'card'}: {e['msg']}" for e in error.errors())
        raise CardError(f"the names in {name} make no dataset: {faults}") from error


def list_doubts(card: DatasetCard, segments: Iterable[Segment]) -> Iterator[str]:
    """Describe what of a card made from names may be a slip of who wrote them: the splits, the task, a typo."""
    segments = list(segments)
    if not {"train", "test"} <= set(card.splits):
        yield f"the splits are {', '.join(card.splits)}: what trains reads `train`, what scores reads `test`"
    n_others = sum(len(segment.labels) != 1 for segment in segments)
    if card.task == "multi-label":
        yield f"multi-label, because {n_others} of {len(segments)} segments have several labels or none"
    counts = Counter(label for segment in segments for label in segment.labels)
    for rare in card.classes:
        alike = find_nearest(rare, [name for name in card.classes if 10 * counts[rare] <= counts[name]])
        if alike and counts[rare]:
            yield f"{rare!r} ({counts[rare]} segments) may be a misspelt {alike[0]!r} ({counts[alike[0]]})"
    if len(card.domains) < 2:
        yield f"one domain alone, {card.domains[0]!r}, makes no shift"


def import_own_csv(path: Path, card: DatasetCard, allow_counts: bool = False) -> tuple[Segment, ...]:
    """Read a manifest (.csv or .parquet) for `write_manifest` to copy, which writes every column in the house's order.

    Raises ManifestError with every fault, or where counts differ from those of the card.
    """
    segments = read_manifest(path, card).segments
    require_counts(segments, card, path, allow_counts)
    return segments


def card_from_csv(path: Path, name: str) -> DatasetCard:
    """Make a card of what a manifest holds; multi-label where any segment has several labels or none.

    Raises ManifestError where the file is no table, CardError where its names make no dataset (a single class).
    """
    segments = read_unchecked_segments(path)
    return make_card_from_names(
        name,
        f"Made from {path.name}.",
        classes={label for segment in segments for label in segment.labels},
        domains={segment.domain for segment in segments},
        splits={segment.split for segment in segments},
        multi_label=any(len(segment.labels) != 1 for segment in segments),
    )
