"""Checks what a shift trains on, and that nothing of the target keeps a label unless it is named labelled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.segments import Manifest, Segment, TimedLabel
from echoshift.train.splits import (
    count_labels,
    find_shift,
    label_target_test,
    read_shift_names,
    split_for_shift,
)

CARD = DatasetCard(
    name="d", title="D", task="single-label", metric="top1", classes=("a", "b", "c"), domains=("s", "u", "t"),
    shifts=(Shift(source=("s",), target="t"), Shift(source=("s", "u"), target="t")),
)  # fmt: skip
MULTI = CARD.model_copy(update={"task": "multi-label", "metric": "map"})
SHIFT, BOTH = CARD.shifts


def make_segment(domain: str, split: str, i: int, labels: Sequence[str] = ("b",), **changes: object) -> Segment:
    fields = {
        "noun": "pan", "pair_id": f"{split}{i}", "timed_labels": tuple(TimedLabel(name, 0, 1) for name in labels),
    } | changes  # fmt: skip
    return Segment(f"{domain}-{split}-{i}", f"{domain}{i}", 0.0, 1.0, tuple(labels), domain, split, **fields)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("s-t s+u-t", ["s-t", "s+u-t"]),
        ("s-t,s+u-t, s-t", ["s-t", "s+u-t", "s-t"]),
        ("Garten, hinten-Küche Süd", ["Garten, hinten-Küche Süd"]),
        (" s-t Garten, hinten-Küche Süd,x-y z", ["s-t", "Garten, hinten-Küche Süd", "x-y", "z"]),
        ("s-tt", ["s-tt"]),
        (" , ", []),
    ],
)
def test_names_of_shifts_may_hold_blanks_where_the_card_has_them(text, names):
    blank = Shift(source=("Garten, hinten",), target="Küche Süd")
    card = CARD.model_copy(update={"shifts": (*CARD.shifts, blank)})
    assert read_shift_names(card, text) == names


def make_manifest(*more: Segment, domains: Sequence[str] = ("s", "u", "t"), n: int = 6) -> Manifest:
    made = [make_segment(d, split, i, "abc"[i % 3]) for d in domains for split in ("train", "test") for i in range(n)]
    return Manifest("d", (*made, *more), "0")


def list_ids(segments: Sequence[Segment]) -> list[str]:
    return [segment.segment_id for segment in segments]


def test_a_shift_is_found_by_its_name():
    assert find_shift(CARD, "s+u-t") == BOTH
    with pytest.raises(ManifestError, match=r"d has no shift 'x-t'; did you mean 's-t'\?"):
        find_shift(CARD, "x-t")


def test_domains_and_splits_go_where_they_belong():
    splits = split_for_shift(make_manifest(), CARD, SHIFT)
    for part, domain, split in (
        (splits.source_train.segments, "s", "train"), (splits.source_val.segments, "s", "test"),
        (splits.target_train, "t", "train"), (splits.target_test, "t", "test"),
    ):  # fmt: skip
        assert list_ids(part) == [f"{domain}-{split}-{i}" for i in range(6)]
    assert splits.source_train.labels.dtype == np.int64
    assert splits.source_train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(splits.target_labelled) == 0
    assert splits.target_labelled.labels.shape == (0,)


def test_several_sources_are_one():
    splits = split_for_shift(make_manifest(), CARD, BOTH)
    assert {segment.domain for segment in splits.source_train.segments} == {"s", "u"}
    assert len(splits.source_train) == 12
    assert {segment.domain for segment in splits.target_train} == {"t"}


@pytest.mark.parametrize("card", [CARD, MULTI])
def test_nothing_of_the_target_says_what_happens_in_it(card):
    manifest = make_manifest()
    splits = split_for_shift(manifest, card, SHIFT)
    originals = {segment.segment_id: segment for segment in manifest}
    for segment in (*splits.target_train, *splits.target_test):
        assert (segment.labels, segment.timed_labels, segment.noun) == ((), (), "")
        own = originals[segment.segment_id]
        assert (segment.video_id, segment.start_s, segment.stop_s) == (own.video_id, own.start_s, own.stop_s)
        assert (segment.domain, segment.split, segment.pair_id) == (own.domain, own.split, own.pair_id)
    assert all(segment.labels and segment.noun for segment in splits.source_train.segments)


def test_other_labels_of_the_target_split_alike():
    poisoned = [
        make_segment(s.domain, s.split, int(s.segment_id[-1]), "c" if s.domain == "t" else s.labels)
        for s in make_manifest()
    ]
    splits = [split_for_shift(m, CARD, SHIFT) for m in (make_manifest(), Manifest("d", tuple(poisoned), "1"))]
    for part in ("source_train", "source_val"):
        before, after = (getattr(s, part) for s in splits)
        assert before.segments == after.segments and np.array_equal(before.labels, after.labels)
    assert splits[0].target_train == splits[1].target_train
    assert splits[0].target_test == splits[1].target_test


def test_only_the_scores_get_the_labels_of_the_targets_test_split():
    test = label_target_test(make_manifest(), CARD, SHIFT)
    assert list_ids(test.segments) == [f"t-test-{i}" for i in range(6)]
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("fraction", "n"), [(0.0, 0), (0.34, 2), (0.5, 3), (1.0, 6)])
def test_the_first_fraction_of_the_targets_train_split_keeps_its_labels(fraction, n):
    splits = split_for_shift(make_manifest(), CARD, SHIFT, labelled_fraction=fraction)
    assert list_ids(splits.target_labelled.segments) == [f"t-train-{i}" for i in range(n)]
    assert splits.target_labelled.labels.tolist() == [0, 1, 2, 0, 1, 2][:n]
    assert list_ids(splits.target_train) == [f"t-train-{i}" for i in range(n, 6)]
    assert all(not segment.labels for segment in (*splits.target_train, *splits.target_test))


def test_tags_name_what_is_labelled_where_they_are_asked():
    tagged = [
        make_segment("t", "train", 6, "a", tags=("labelled",)),
        make_segment("t", "train", 7, tags=("unlabelled",)),
    ]
    manifest = make_manifest(*tagged)
    asked = split_for_shift(manifest, CARD, SHIFT, use_tags=True)
    assert list_ids(asked.target_labelled.segments) == ["t-train-6"]
    assert list_ids(asked.target_train) == [f"t-train-{i}" for i in (*range(6), 7)]
    not_asked = split_for_shift(manifest, CARD, SHIFT)
    assert len(not_asked.target_labelled) == 0
    assert not next(s for s in not_asked.target_train if s.segment_id == "t-train-6").labels


@pytest.mark.parametrize(
    ("pairs", "of_source"), [("all", [0, 1, 2, 3, 4, 5]), ("half", [0, 2, 4]), ("none", [1, 3, 5])]
)
def test_pairs_thin_the_train_splits_and_nothing_else(pairs, of_source):
    splits = split_for_shift(make_manifest(), CARD, SHIFT, pairs=pairs)
    assert list_ids(splits.source_train.segments) == [f"s-train-{i}" for i in of_source]
    of_target = range(6) if pairs == "all" else (0, 2, 4)
    assert list_ids(splits.target_train) == [f"t-train-{i}" for i in of_target]
    shared = {s.pair_id for s in splits.source_train.segments} & {s.pair_id for s in splits.target_train}
    assert len(shared) == {"all": 6, "half": 3, "none": 0}[pairs]
    assert len(splits.source_val) == len(splits.target_test) == 6


@pytest.mark.parametrize(
    ("domains", "shift", "words"),
    [
        (("u", "t"), SHIFT, "the manifest of d has no segment of s, split train"),
        (("s", "u"), BOTH, "the manifest of d has no segment of t, split train; import it with that domain"),
        (("t",), BOTH, "no segment of s, split train"),
        (("s", "t"), BOTH, "no segment of u, split train"),
    ],
)
def test_an_empty_part_is_named(domains, shift, words):
    with pytest.raises(ManifestError, match=words):
        split_for_shift(make_manifest(domains=domains), CARD, shift)


def test_pairs_of_a_manifest_without_pairs_are_an_error():
    unpaired = [make_segment(d, split, 0, pair_id="") for d in ("s", "t") for split in ("train", "test")]
    with pytest.raises(ManifestError, match="pairs no train segment of s with one of t"):
        split_for_shift(Manifest("d", tuple(unpaired), "0"), CARD, SHIFT, pairs="half")


def test_several_labels_are_zeros_and_ones():
    more = [make_segment("s", "train", 6, ("a", "c")), make_segment("s", "train", 7, ())]
    labels = split_for_shift(make_manifest(*more), MULTI, SHIFT).source_train.labels
    assert labels.dtype == np.float32
    assert labels[6:].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert labels[:3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert count_labels(labels, 3).tolist() == [3, 2, 3]


def test_counts_name_classes_that_have_no_sample():
    assert count_labels(np.array([0, 0, 1]), 4).tolist() == [2, 1, 0, 0]
