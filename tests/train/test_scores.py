import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, confusion_matrix

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.train.scores import (
    NO_BIN,
    BinScore,
    ClassScore,
    Score,
    Scores,
    SourceBins,
    average_scores,
    bin_by_source,
    compute_scores,
)
from echoshift.train.splits import LabelledSegments

CLASSES = ("take", "put", "open")
# Predicted: take, put, put, open, take.
PROBABILITIES = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.0, 0.1, 0.9], [0.4, 0.3, 0.3]])
LABELS = np.array([0, 1, 0, 0, 0])
HAS_AUDIO = np.array([True, False, True, False, False])


def label(pairs, n_per_pair=None):
    """Make labelled segments of (class index, noun), each as often as n_per_pair says."""
    chosen = [pair for pair, n in zip(pairs, n_per_pair or [1] * len(pairs), strict=True) for _ in range(n)]
    segments = tuple(
        Segment(str(i), "v", 0.0, 1.0, (CLASSES[k],), "D1", "train", noun) for i, (k, noun) in enumerate(chosen)
    )
    return LabelledSegments(segments, np.array([k for k, _ in chosen], dtype=np.int64))


def read_score(score):
    return score.value, score.n, score.n_classes


def test_single_label_by_hand():
    bins = SourceBins("pair", np.array([0, 1, 1, 2, NO_BIN]))
    scores = compute_scores(PROBABILITIES, LABELS, HAS_AUDIO, CLASSES, bins)
    assert scores == Scores(
        task="single-label",
        n=5,
        top1=Score(value=3 / 5, n=5),
        class_mean=Score(value=(2 / 4 + 1) / 2, n=5, n_classes=2),
        silent=Score(value=2 / 3, n=3),
        audible=Score(value=1 / 2, n=2),
        rare=Score(value=2 / 3, n=3),
        frequent=Score(value=0.0, n=1),
        bins=(
            BinScore(name="0-1", score=Score(value=1.0, n=1)),
            BinScore(name="2-10", score=Score(value=1 / 2, n=2)),
            BinScore(name="over 10", score=Score(value=0.0, n=1)),
        ),
        binned_by="pair",
        per_class=(
            ClassScore(name="take", value=1 / 2, n=4),
            ClassScore(name="put", value=1.0, n=1),
            ClassScore(name="open", value=None, n=0),
        ),
        confusion=((2, 1, 1), (0, 1, 0), (0, 0, 0)),
    )
    assert scores.main == scores.top1


def test_single_label_against_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(8), size=300).astype(np.float32)
    labels = rng.integers(0, 8, size=300)
    scores = compute_scores(probabilities, labels, rng.random(300) < 0.5, [str(k) for k in range(8)])
    predicted = probabilities.argmax(axis=1)
    assert scores.top1.value == pytest.approx(accuracy_score(labels, predicted))
    assert scores.class_mean.value == pytest.approx(balanced_accuracy_score(labels, predicted))
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(labels, predicted))
    assert (scores.rare, scores.frequent, scores.bins, scores.binned_by) == (None, None, (), None)


def test_average_precision_by_hand_under_both_conventions():
    # Class 0: ranks pos, neg, pos: (1/1 + 2/3) / 2. Class 1: neg, pos, neg: 1/2. Class 2 has no positives.
    probabilities = np.array([[0.9, 0.8, 0.5], [0.6, 0.7, 0.4], [0.3, 0.1, 0.6]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=np.float32)
    bins = SourceBins("class", np.array([0, 2, 1]))
    scores = compute_scores(probabilities, labels, np.array([True, False, True]), CLASSES, bins)
    first, second = 5 / 6, 1 / 2
    assert read_score(scores.map_zero) == (pytest.approx((first + second) / 3), 3, 3)
    assert read_score(scores.map_present) == (pytest.approx((first + second) / 2), 3, 2)
    assert scores.main == scores.map_zero
    assert scores.audible == Score(value=1.0, n=2, n_classes=1)  # class 0 alone has positives there, both
    assert scores.silent == Score(value=1.0, n=1, n_classes=1)
    assert read_score(scores.rare) == (pytest.approx(first), 3, 1)
    assert read_score(scores.frequent) == (pytest.approx(second), 3, 1)
    assert [(c.n, c.value) for c in scores.per_class] == [(2, pytest.approx(first)), (1, second), (0, None)]
    assert (scores.top1, scores.class_mean, scores.confusion) == (None, None, None)


def test_average_precision_against_scikit_learn_with_ties():
    rng = np.random.default_rng(1)
    probabilities = rng.integers(0, 5, size=(60, 4)) / 4
    labels = (rng.random((60, 4)) < 0.3).astype(np.float32)
    scores = compute_scores(probabilities, labels, np.ones(60, dtype=bool), list("abcd"))
    assert scores.map_zero.value == pytest.approx(average_precision_score(labels, probabilities, average="macro"))
    assert scores.silent == Score(value=None, n=0, n_classes=0)


@pytest.mark.parametrize("labels", [LABELS, np.eye(3, dtype=np.float32)[LABELS]])
def test_scores_come_back_from_json(labels):
    index = np.zeros(5 if labels.ndim == 1 else 3, dtype=np.int64)
    scores = compute_scores(PROBABILITIES, labels, HAS_AUDIO, CLASSES, SourceBins("class", index))
    assert Scores.model_validate(json.loads(scores.model_dump_json(exclude_defaults=True))) == scores


def change(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probabilities": PROBABILITIES[:, :2]}, r"shape \[5, 2\], not \[n, 3\]"),
        ({"probabilities": np.zeros((0, 3)), "labels": LABELS[:0], "has_audio": HAS_AUDIO[:0]}, "with n > 0"),
        ({"probabilities": change(PROBABILITIES, (2, 1), np.nan)}, "1 of 5 segments aren't finite.*number 2"),
        ({"probabilities": PROBABILITIES * 4}, "are they logits"),
        ({"labels": LABELS[:4]}, r"labels have shape \[4\]; 5 predictions"),
        ({"labels": change(LABELS, 0, -1)}, r"labels lie in -1..1, not in 0..2"),
        ({"labels": LABELS.astype(np.float32)}, "float32, not indices"),
        ({"labels": np.full((5, 3), 0.5)}, "other values than 0 and 1"),
        ({"has_audio": np.ones(5)}, "float64"),
        ({"bins": SourceBins("class", np.zeros(3, dtype=np.int64))}, r"bins have shape \[3\], not \[5\]"),
    ],
)
def test_impossible_input_is_named(changes, words):
    given = {"probabilities": PROBABILITIES, "labels": LABELS, "has_audio": HAS_AUDIO, **changes}
    with pytest.raises(RunError, match=words):
        compute_scores(given["probabilities"], given["labels"], given["has_audio"], CLASSES, given.get("bins"))


def test_pairs_are_binned_by_their_count_in_the_source():
    pairs = [(0, "cup"), (1, "cup"), (1, "tap"), (2, "tap"), (2, "")]
    source = label(pairs, [11, 10, 2, 1, 30])
    test = label([*pairs, (0, "tap")])
    bins = bin_by_source(source, test, 3)
    # 11, 10, 2, 1 instances; no noun; never seen together, though both are frequent.
    assert (bins.by, bins.index.tolist()) == ("pair", [2, 1, 1, 0, NO_BIN, 0])


def test_classes_are_binned_where_there_are_no_nouns():
    source = label([(0, ""), (1, "")], [12, 3])
    bins = bin_by_source(source, label([(0, "cup"), (1, "cup"), (2, "cup")]), 3)
    assert (bins.by, bins.index.tolist()) == ("class", [2, 1, 0])


def test_multi_label_bins_are_of_classes():
    segments = label([(0, "cup")], [12]).segments
    labels = np.zeros((12, 3), dtype=np.float32)
    labels[:, 0], labels[:5, 1] = 1, 1
    source = LabelledSegments(segments, labels)
    bins = bin_by_source(source, LabelledSegments(segments[:4], labels[:4]), 3)
    assert (bins.by, bins.index.tolist()) == ("class", [2, 1, 0])


def test_the_scores_of_several_networks_are_averaged_number_by_number() -> None:
    labels, has_audio = np.array([0, 1, 1, 0]), np.array([True, True, True, True])
    first, second = (
        compute_scores(np.eye(2)[guesses], labels, has_audio, ("a", "b")) for guesses in ([0, 1, 1, 0], [0, 0, 1, 1])
    )
    mean = average_scores([first, second])
    assert mean.top1 is not None and (mean.top1.value, mean.top1.n) == (0.75, 4)
    assert [(c.name, c.value, c.n) for c in mean.per_class] == [("a", 0.75, 2), ("b", 0.75, 2)]
    assert mean.silent.value is None, "there is no silent segment"
    assert mean.confusion is None
