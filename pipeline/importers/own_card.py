"""Makes a card for a dataset that brings none, from the names that its files hold."""

from __future__ import annotations

from itertools import permutations

from pydantic import ValidationError

from pipeline.cards import DatasetCard, MediaLayout, Shift
from pipeline.errors import CardError

SPLIT_ORDER = ("train", "validation", "val", "test")


def make_card_from_names(
    name: str, description: str, *, classes: set[str], domains: set[str], splits: set[str], multi_label: bool = False
) -> DatasetCard:
    """Makes a card: classes and domains sorted, train before test, every ordered pair of domains a shift.

    Raises CardError where the names make no dataset (a single class).
    """
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
