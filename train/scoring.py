"""Scores the target's test split as a step: the one place where its labels meet predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest
from echoshift.train.scores import average_scores, compute_scores
from echoshift.train.source_bins import bin_by_source
from echoshift.train.splits import LabelledSegments, label_target_test, select_labelled
from echoshift.train.steps import Step, hash_json

HITS = "hits.npz"


@dataclass(frozen=True, slots=True)
class TestSplit:
    """What is scored: the target's test segments with their labels, and the source's train split for the bins."""

    test: LabelledSegments
    source_train: LabelledSegments
    classes: tuple[str, ...]

    __test__ = False  # it is no test of pytest's

    @property
    def segment_ids(self) -> list[str]:
        """The ids of what is scored."""
        return [segment.segment_id for segment in self.test.segments]


def open_test_split(
    manifest: Manifest, card: DatasetCard, shift: Shift, kept: Sequence[str], source_train: LabelledSegments
) -> TestSplit:
    """Return the target's test segments that have features (`kept`), with their labels; for scores alone.

    Raises RunError where none is left.
    """
    if not kept:
        raise RunError(f"{shift.name}: the target has no test segment to score; import a manifest with a test split")
    test = select_labelled(label_target_test(manifest, card, shift), set(kept))
    return TestSplit(test, source_train, card.classes)


def plan_scores_step(split: TestSplit, inputs: Mapping[str, str]) -> Step:
    """Plan the step; `inputs` are the keys of the predictions, and what names the sound."""
    source = split.source_train
    return Step(
        "scores",
        2,
        {"classes": list(split.classes)},
        {
            **inputs,
            "test": hash_json([split.segment_ids, split.test.labels.tolist(), [s.noun for s in split.test.segments]]),
            "source": hash_json(
                [[s.segment_id for s in source.segments], source.labels.tolist(), [s.noun for s in source.segments]]
            ),
        },
    )


def make_scores(
    split: TestSplit, predict: Callable[[], np.ndarray], has_audio: np.ndarray
) -> Callable[[Path], Mapping[str, Any]]:
    """Make what the step does: compute the scores, and keep which segments are right, for tests over segments.

    `predict` gives probabilities of the split's segments in their order, float [n, K], or of several networks, float
    [networks, n, K], whose scores are averaged; `has_audio` is bool [n].
    """

    def make(folder: Path) -> Mapping[str, Any]:
        found = predict()
        each = found[None] if found.ndim == 2 else found
        bins = bin_by_source(split.source_train, split.test, len(split.classes))
        scores = [compute_scores(p, split.test.labels, has_audio, split.classes, bins) for p in each]
        if split.test.labels.ndim == 1:
            is_right = (each.argmax(axis=2) == split.test.labels).mean(axis=0)
            _write_hits(folder / HITS, split.segment_ids, is_right if len(each) > 1 else is_right.astype(bool))
        return (scores[0] if len(scores) == 1 else average_scores(scores)).model_dump(mode="json")

    return make


def read_hits(folder: Path) -> tuple[list[str], np.ndarray] | None:
    """Read which test segments a run has right: their ids and bool [n], or, of several networks, the share of those
    that are right, float64 [n]; None where the folder doesn't say.
    """
    path = folder / HITS
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["segment_ids"].tolist(), arrays["is_right"]


def _write_hits(path: Path, segment_ids: Sequence[str], is_right: np.ndarray) -> None:
    fresh = path.with_name(f"{path.name}.partial.npz")
    np.savez(fresh, segment_ids=np.array(segment_ids), is_right=is_right)
    fresh.replace(path)
