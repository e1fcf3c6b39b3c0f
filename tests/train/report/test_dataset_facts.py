"""Checks what the report counts of a dataset against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.train.report.dataset_facts import compare_labels, count_dataset
from echoshift.train.report.dataset_section import make_dataset_section

CARD = DatasetCard(
    name="small",
    title="Small",
    task="single-label",
    metric="top1",
    classes=("cut", "pour", "wash"),
    domains=("a", "b", "empty"),
    shifts=(Shift(source=("a",), target="b"), Shift(source=("a",), target="empty")),
)


def make_segment(number: int, domain: str, split: str, label: str, duration_s: float) -> Segment:
    return Segment(f"{domain}-{number}", f"v{number // 2}", 1.0, 1.0 + duration_s, (label,), domain, split)


SEGMENTS = (
    make_segment(0, "a", "train", "cut", 1.0),
    make_segment(1, "a", "train", "cut", 2.0),
    make_segment(2, "a", "train", "pour", 4.0),
    make_segment(3, "a", "train", "wash", 0.5),
    make_segment(4, "a", "test", "wash", 3.0),
    make_segment(5, "b", "train", "pour", 8.0),
    make_segment(6, "b", "train", "pour", 2.0),
)
HAS_AUDIO = {"a-0": True, "a-1": False, "a-2": False, "b-5": True}


def test_counts_are_those_by_hand() -> None:
    facts = count_dataset(Manifest("small", SEGMENTS, "0" * 64), CARD, HAS_AUDIO, "sound.zarr")
    assert [(part.domain, part.split) for part in facts.parts] == [("a", "train"), ("b", "train"), ("a", "test")]
    train = facts.parts[0]
    assert (train.n_segments, train.n_videos, train.n_per_class) == (4, 2, (2, 1, 1))
    assert (train.n_heard, train.n_silent, train.silent_share) == (1, 2, 2 / 3)
    assert (train.total_s, train.shortest_s, train.median_s, train.longest_s) == (7.5, 0.5, 1.5, 4.0)
    assert train.n_short == 2  # 64 frames at 60 a second are 1.07 s
    assert facts.parts[1].silent_share == 0.0 and facts.parts[2].silent_share is None
    assert (facts.n_segments, facts.n_videos, facts.total_s) == (7, 5, 20.5)


def test_durations_are_counted_once_each() -> None:
    facts = count_dataset(Manifest("small", SEGMENTS, "0" * 64), CARD, {})
    assert {domain: sum(counts) for domain, counts in facts.durations.items()} == {"a": 5, "b": 2}
    assert facts.duration_bins[0] <= 0.5 and facts.duration_bins[-1] >= 8.0
    counts, _ = np.histogram([1.0, 2.0, 4.0, 0.5, 3.0], np.array(facts.duration_bins))
    assert facts.durations["a"] == tuple(counts.tolist())


def test_labels_shift_by_their_total_variation() -> None:
    (shift,) = compare_labels(SEGMENTS, CARD)  # the domain without segments can't be compared
    # a: 2/4, 1/4, 1/4; b: 0, 1, 0; half of 1/2 + 3/4 + 1/4.
    assert (shift.source, shift.target, shift.distance) == ("a", "b", pytest.approx(0.75))
    assert (shift.largest, shift.source_share, shift.target_share) == ("pour", 0.25, 1.0)


def test_what_no_store_of_sound_knows_is_said() -> None:
    facts = count_dataset(Manifest("small", SEGMENTS, "0" * 64), CARD, {})
    missing = [block for block in make_dataset_section(facts, CARD).blocks if block.kind == "missing"]
    assert [block.command for block in missing] == ["make extract DATASET=small ENCODERS=resnet18_audio"]
