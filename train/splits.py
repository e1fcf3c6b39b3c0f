"""Splits of a manifest for one shift; segments of the target lose their labels here, before any training."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.errors import ManifestError, suggest
from echoshift.pipeline.importers.charades_ego import tag_labelled, thin_pairs
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.location import Place


@dataclass(frozen=True, slots=True)
class DataPlaces:
    """A dataset's card, manifest, media and cache, and the device to compute on.

    `media_root` need not exist if everything that is read is cached.
    """

    card: DatasetCard
    manifest: Manifest
    media_root: Path
    cache_dir: Place
    device: str = "auto"


TRAIN, TEST = "train", "test"


@dataclass(frozen=True, slots=True)
class LabelledSegments:
    """Segments with their labels: class indices int64 [n], or float32 [n, K] where the task is multi-label."""

    segments: tuple[Segment, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.segments)


@dataclass(frozen=True, slots=True)
class ShiftSplits:
    """Segments of a shift, in file order. Only what is named labelled has labels in the target.

    Attributes:
        source_train, source_val: the source's train and test split.
        target_labelled: the labelled part of the target's train split; empty except in semi-supervised settings.
        target_train: the rest of it, unlabelled.
        target_test: unlabelled; only `label_target_test` returns its labels.
    """

    source_train: LabelledSegments
    source_val: LabelledSegments
    target_labelled: LabelledSegments
    target_train: tuple[Segment, ...]
    target_test: tuple[Segment, ...]


def find_shift(card: DatasetCard, name: str) -> Shift:
    """Find a shift of a card by its name, such as D1-D2; raises ManifestError listing the card's shifts."""
    for shift in card.shifts:
        if shift.name == name:
            return shift
    hint = suggest(name, (s.name for s in card.shifts), listed_by=f"echoshift list shifts {card.name}", there="it has")
    raise ManifestError(f"{card.name} has no shift {name!r}; {hint}")


def read_shift_names(card: DatasetCard, text: str) -> list[str]:
    """Split shift names at blanks or commas; names in the card may themselves contain both."""
    known = sorted((shift.name for shift in card.shifts), key=len, reverse=True)
    names: list[str] = []
    rest = text.strip(" ,")
    while rest:
        begun = (name for name in known if rest.startswith(name) and rest[len(name) :][:1] in ("", " ", ","))
        name = next(begun, None) or rest.replace(",", " ").split()[0]
        names.append(name)
        rest = rest[len(name) :].lstrip(" ,")
    return names


def split_for_shift(
    manifest: Manifest,
    card: DatasetCard,
    shift: Shift,
    *,
    use_tags: bool = False,
    labelled_fraction: float | None = None,
    pairs: Literal["all", "half", "none"] = "all",
) -> ShiftSplits:
    """Split a manifest for one shift.

    The labelled part of the target is what is tagged `labelled` (`use_tags`), or the first `labelled_fraction` of its
    train split; `pairs` thins the train splits (`thin_pairs`). Raises ManifestError naming domain and split if a
    required part is empty.
    """
    source_train = _select(manifest, shift.source, TRAIN)
    target_train = _select(manifest, (shift.target,), TRAIN)
    for domain in (*shift.source, shift.target):
        _require([s for s in (*source_train, *target_train) if s.domain == domain], manifest, domain, TRAIN)
    if pairs != "all":
        if not {s.pair_id for s in source_train if s.pair_id} & {s.pair_id for s in target_train}:
            raise ManifestError(
                f"the manifest of {manifest.dataset} pairs no train segment of {'+'.join(shift.source)} with one of "
                f"{shift.target}; use all of them (target_labels.pairs=all)"
            )
        source_train, target_train = thin_pairs(source_train, target_train, pairs)
        _require(source_train, manifest, "+".join(shift.source), TRAIN)
    if labelled_fraction is not None:
        target_train = tag_labelled(target_train, labelled_fraction)
    is_labelled = use_tags or labelled_fraction is not None
    labelled = [s for s in target_train if is_labelled and "labelled" in s.tags]
    unlabelled = [s for s in target_train if not (is_labelled and "labelled" in s.tags)]
    return ShiftSplits(
        source_train=_label(source_train, card),
        source_val=_label(_select(manifest, shift.source, TEST), card),
        target_labelled=_label(labelled, card),
        target_train=strip_labels(unlabelled),
        target_test=strip_labels(_select(manifest, (shift.target,), TEST)),
    )


def label_target_test(manifest: Manifest, card: DatasetCard, shift: Shift) -> LabelledSegments:
    """Return the target's test split with its labels; for scoring only."""
    return _label(_select(manifest, (shift.target,), TEST), card)


def label_target_train(
    manifest: Manifest, card: DatasetCard, shift: Shift, segment_ids: Sequence[str]
) -> LabelledSegments:
    """Return train segments of the target with their labels; only for oracles, which tables mark as such."""
    known = {segment.segment_id: segment for segment in _select(manifest, (shift.target,), TRAIN)}
    return _label([known[segment_id] for segment_id in segment_ids], card)


def select_labelled(part: LabelledSegments, kept: Container[str]) -> LabelledSegments:
    """Select the segments whose ids are in `kept`, in order."""
    rows = np.array([i for i, s in enumerate(part.segments) if s.segment_id in kept], dtype=np.int64)
    return LabelledSegments(tuple(part.segments[i] for i in rows), part.labels[rows])


def keep_segments(splits: ShiftSplits, kept: Container[str]) -> ShiftSplits:
    """Drop from a shift's splits the segments whose ids are not in `kept`."""

    def keep(part: Sequence[Segment]) -> tuple[Segment, ...]:
        return tuple(segment for segment in part if segment.segment_id in kept)

    return ShiftSplits(
        source_train=select_labelled(splits.source_train, kept),
        source_val=select_labelled(splits.source_val, kept),
        target_labelled=select_labelled(splits.target_labelled, kept),
        target_train=keep(splits.target_train),
        target_test=keep(splits.target_test),
    )


def list_segment_ids(splits: ShiftSplits) -> list[str]:
    """List the ids of all segments of a shift."""
    labelled = (splits.source_train, splits.source_val, splits.target_labelled)
    groups = (*(part.segments for part in labelled), splits.target_train, splits.target_test)
    return [segment.segment_id for group in groups for segment in group]


def strip_labels(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Remove labels, timed labels and noun from segments."""
    return tuple(replace(segment, labels=(), timed_labels=(), noun="") for segment in segments)


def count_labels(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Count samples by class, int64 [K]; `labels` are indices [n] or 0/1 [n, K]."""
    if labels.ndim == 2:
        return labels.sum(axis=0).astype(np.int64)
    return np.bincount(labels, minlength=n_classes)


def _select(manifest: Manifest, domains: Sequence[str], split: str) -> list[Segment]:
    return [segment for segment in manifest if segment.domain in domains and segment.split == split]


def _require(segments: Sequence[Segment], manifest: Manifest, domain: str, split: str) -> None:
    if not segments:
        raise ManifestError(
            f"the manifest of {manifest.dataset} has no segment of {domain}, split {split}; "
            f"import it with that domain, or choose another shift"
        )


def _label(segments: Sequence[Segment], card: DatasetCard) -> LabelledSegments:
    index = card.class_index
    if card.task == "multi-label":
        labels = np.zeros((len(segments), len(card.classes)), dtype=np.float32)
        for i, segment in enumerate(segments):
            labels[i, [index[label] for label in segment.labels]] = 1
        return LabelledSegments(tuple(segments), labels)
    return LabelledSegments(tuple(segments), np.array([index[s.labels[0]] for s in segments], dtype=np.int64))
