"""Checks which segments a page shows: all classes first, the same whenever it is made, and those that are named."""

from __future__ import annotations

import pytest

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.train.report.segment_choice import choose_segments

SEGMENTS = tuple(
    Segment(f"{split}-{i}", "v", float(i), i + 1.0, (label,), "a", split)
    for split in ("train", "test")
    for i, label in enumerate(["cut"] * 20 + ["pour"] * 2 + ["wash"])
)


def make_manifest(segments: tuple[Segment, ...]) -> Manifest:
    return Manifest("small", segments, "0" * 64)


def test_each_class_comes_before_a_second_of_any() -> None:
    chosen = choose_segments(make_manifest(SEGMENTS), 3)
    assert [(s.split, s.labels[0]) for s in chosen] == [
        (split, label) for split in ("train", "test") for label in ("cut", "pour", "wash")
    ]
    five = [s for s in choose_segments(make_manifest(SEGMENTS), 5) if s.split == "train"]
    assert sorted(s.labels[0] for s in five) == ["cut", "cut", "pour", "pour", "wash"]


def test_the_choice_depends_on_no_order_and_grows_with_the_number() -> None:
    ids = {s.segment_id for s in choose_segments(make_manifest(SEGMENTS), 4)}
    assert {s.segment_id for s in choose_segments(make_manifest(SEGMENTS[::-1]), 4)} == ids
    assert ids < {s.segment_id for s in choose_segments(make_manifest(SEGMENTS), 9)}
    assert len(choose_segments(make_manifest(SEGMENTS), 1000)) == len(SEGMENTS)


def test_named_segments_are_there_whatever_the_number() -> None:
    assert [s.segment_id for s in choose_segments(make_manifest(SEGMENTS), 0, ["test-7", "train-3"])] == [
        "train-3",
        "test-7",
    ]
    with pytest.raises(RunError, match=r"no segment 'train-33'; did you mean train-3"):
        choose_segments(make_manifest(SEGMENTS), 1, ["train-33"])
