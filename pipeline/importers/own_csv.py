"""Imports a manifest in echoshift's own format from anywhere."""

from __future__ import annotations

from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.importers.own_card import make_card_from_names
from echoshift.pipeline.manifest_check import require_counts
from echoshift.pipeline.manifest_csv import read_manifest, read_unchecked_segments
from echoshift.pipeline.segments import Segment


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
