"""Scores of predictions on a test set, the step that makes them, and intervals and paired tests over runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest
from echoshift.train.splits import LabelledSegments, count_labels, label_target_test, select_labelled
from echoshift.train.steps import Step, hash_json

# Zhang et al. 2022, section 5.1: rare are 0-1 and 2-10 instances in the source, frequent are those with more than 10.
BIN_NAMES = ("0-1", "2-10", "over 10")
BIN_STARTS = (2, 11)
N_RARE_BINS = 2
NO_BIN = -1
HITS = "hits.npz"
PairKey = tuple[str, int]  # a shift's name and a seed
LEVEL = 0.95
# Differences this close are equal up to rounding; a t-test would divide by the rounding error.
_EQUAL = 1e-12
_TOLERANCE = 1e-3  # how far rounding in half precision may take a probability out of 0..1


class ScoreModel(BaseModel):
    """Base of all scores: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(ScoreModel):
    """A number in 0..1, None if computed from no segments.

    `n` counts test segments, `n_classes` the classes of a mean over classes (None for other numbers).
    """

    value: float | None
    n: int
    n_classes: int | None = None


class ClassScore(ScoreModel):
    """Accuracy (single-label) or average precision of one class; None for a class without positives.

    `n` counts the test segments that have the class.
    """

    name: str
    value: float | None
    n: int


class BinScore(ScoreModel):
    """Score of the segments (or classes) seen a given number of times in the source, such as `2-10`."""

    name: str
    score: Score


class Scores(ScoreModel):
    """All scores of one set of predictions.

    Attributes:
        task: decides which fields are set; those of the other task are None.
        n: test segments.
        top1: share of segments whose likeliest class is the label; equal probabilities go to the lower index.
        class_mean: mean of the classes' accuracies, over those that have test segments.
        map_zero: mean of all K non-interpolated average precisions, 0 for a class without positives (released code of
            Zhang et al. 2022). `main` for multi-label.
        map_present: the mean over the classes that have positives.
        silent, audible: `main` on the segments without and with audio; multi-label: `map_present`, because a subset of
            the segments lacks classes through no fault of the predictions.
        rare, frequent, bins: by how often the source shows the same (`bin_by_source`); multi-label: mean average
            precision of the bin's classes that have positives. None and () if no bins were given.
        binned_by: what was counted in the source, `pair` or `class`.
        per_class: in the card's order.
        confusion: counts, rows are labels, columns predictions; None for multi-label.
    """

    task: Literal["single-label", "multi-label"]
    n: int
    top1: Score | None = None
    class_mean: Score | None = None
    map_zero: Score | None = None
    map_present: Score | None = None
    silent: Score
    audible: Score
    rare: Score | None = None
    frequent: Score | None = None
    bins: tuple[BinScore, ...] = ()
    binned_by: Literal["pair", "class"] | None = None
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None

    @property
    def main(self) -> Score:
        """The score that tables show: top-1, or mean average precision with empty classes counted 0."""
        score = self.top1 if self.task == "single-label" else self.map_zero
        assert score is not None
        return score


@dataclass(frozen=True, slots=True)
class SourceBins:
    """Bin of each test segment, or of each class where the task is multi-label.

    Attributes:
        by: what was counted in the source: `pair` (class and noun) or `class`.
        index: into BIN_NAMES, int64 [n] (multi-label: [K]); NO_BIN for a segment without a noun.
    """

    by: Literal["pair", "class"]
    index: np.ndarray


def bin_by_source(source: LabelledSegments, test: LabelledSegments, n_classes: int) -> SourceBins:
    """Bin test segments by how many train segments of the source show the same (Zhang et al. 2022, Fig. 4).

    Single-label: the same pair of class and noun (EPIC: verb and noun) where both splits have nouns; a test segment
    without a noun is then in no bin, and a source segment without one counts for none. Where either split has no nouns
    at all, it is the same class. Multi-label: classes are binned, by the number of source segments that have them.
    """
    if test.labels.ndim == 2:
        return SourceBins("class", _find_bins(count_labels(source.labels, n_classes)))
    source_nouns, test_nouns = ([segment.noun for segment in part.segments] for part in (source, test))
    if not any(source_nouns) or not any(test_nouns):
        return SourceBins("class", _find_bins(count_labels(source.labels, n_classes))[test.labels])
    seen = Counter(zip(source.labels.tolist(), source_nouns, strict=True))
    counts = np.array([seen[pair] for pair in zip(test.labels.tolist(), test_nouns, strict=True)], dtype=np.int64)
    has_noun = np.array([bool(noun) for noun in test_nouns])
    return SourceBins("pair", np.where(has_noun, _find_bins(counts), NO_BIN))


def _find_bins(counts: np.ndarray) -> np.ndarray:
    return np.digitize(counts, BIN_STARTS).astype(np.int64)


def compute_scores(
    probabilities: np.ndarray,
    labels: np.ndarray,
    has_audio: np.ndarray,
    classes: Sequence[str],
    bins: SourceBins | None = None,
) -> Scores:
    """Compute all scores of one set of predictions.

    `probabilities` float [n, K]: softmax (single-label) or sigmoid. `labels` int64 [n] of indices, or [n, K] of 0 and
    1, which makes the task multi-label. `has_audio` bool [n]. `classes` are the K names. Raises RunError naming what
    has the wrong shape, isn't finite or lies outside 0..1.
    """
    _check(probabilities, labels, has_audio, classes, bins)
    probabilities = probabilities.astype(np.float64)
    if labels.ndim == 2:
        return _score_multi(probabilities, labels.astype(bool), has_audio, classes, bins)
    return _score_single(probabilities, labels, has_audio, classes, bins)


def average_scores(scores: Sequence[Scores]) -> Scores:
    """Average the scores of several networks on the same segments, number by number.

    The result has no confusion matrix, as there is no single prediction to count.
    """
    dumped = [one.model_dump(mode="python", exclude={"confusion"}) for one in scores]
    return Scores.model_validate(_average(dumped))


def _average(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        if set(first) >= {"value", "n"}:
            numbers = [score["value"] for score in values]
            mean = None if any(number is None for number in numbers) else float(np.mean(numbers))
            return {**first, "value": mean}
        return {name: _average([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_average(parts) for parts in zip(*values, strict=True))
    return first


def _score_single(
    probabilities: np.ndarray,
    labels: np.ndarray,
    has_audio: np.ndarray,
    classes: Sequence[str],
    bins: SourceBins | None,
) -> Scores:
    n_classes = len(classes)
    predicted = probabilities.argmax(axis=1)
    confusion = np.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    is_hit = predicted == labels
    per_class = [_score_class(name, confusion[k, k], confusion[k].sum()) for k, name in enumerate(classes)]
    present = [score.value for score in per_class if score.value is not None]
    fields: dict[str, Any] = {}
    if bins is not None:
        fields = _make_bin_fields(bins, lambda chosen: _mean_hits(is_hit[chosen]))
    return Scores(
        task="single-label",
        n=len(labels),
        top1=_mean_hits(is_hit),
        class_mean=Score(value=float(np.mean(present)), n=len(labels), n_classes=len(present)),
        silent=_mean_hits(is_hit[~has_audio]),
        audible=_mean_hits(is_hit[has_audio]),
        per_class=tuple(per_class),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        **fields,
    )


def _score_multi(
    probabilities: np.ndarray,
    labels: np.ndarray,
    has_audio: np.ndarray,
    classes: Sequence[str],
    bins: SourceBins | None,
) -> Scores:
    n = len(labels)
    precisions = compute_average_precisions(probabilities, labels)
    fields: dict[str, Any] = {}
    if bins is not None:
        fields = _make_bin_fields(bins, lambda chosen: _mean_present(precisions[chosen], n))
    silent, audible = (
        _mean_present(compute_average_precisions(probabilities[chosen], labels[chosen]), int(chosen.sum()))
        for chosen in (~has_audio, has_audio)
    )
    return Scores(
        task="multi-label",
        n=n,
        map_zero=Score(value=float(np.nan_to_num(precisions).mean()), n=n, n_classes=len(classes)),
        map_present=_mean_present(precisions, n),
        silent=silent,
        audible=audible,
        per_class=tuple(
            ClassScore(name=name, value=None if np.isnan(precisions[k]) else float(precisions[k]), n=int(count))
            for (k, name), count in zip(enumerate(classes), labels.sum(axis=0), strict=True)
        ),
        **fields,
    )


def compute_average_precisions(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute each class's non-interpolated average precision, float64 [K]; NaN for a class without positives."""
    from sklearn.metrics import average_precision_score

    precisions = np.full(labels.shape[1], np.nan)
    for k in np.flatnonzero(labels.any(axis=0)):
        precisions[k] = average_precision_score(labels[:, k], probabilities[:, k])
    return precisions


def _make_bin_fields(bins: SourceBins, score: Callable[[np.ndarray], Score]) -> dict[str, Any]:
    is_rare = (bins.index != NO_BIN) & (bins.index < N_RARE_BINS)
    return {
        "rare": score(is_rare),
        "frequent": score(bins.index >= N_RARE_BINS),
        "bins": tuple(BinScore(name=name, score=score(bins.index == i)) for i, name in enumerate(BIN_NAMES)),
        "binned_by": bins.by,
    }


def _score_class(name: str, n_hits: int, n: int) -> ClassScore:
    return ClassScore(name=name, value=float(n_hits / n) if n else None, n=int(n))


def _mean_hits(is_hit: np.ndarray) -> Score:
    return Score(value=float(is_hit.mean()) if len(is_hit) else None, n=len(is_hit))


def _mean_present(precisions: np.ndarray, n: int) -> Score:
    present = precisions[~np.isnan(precisions)]
    return Score(value=float(present.mean()) if len(present) else None, n=n, n_classes=len(present))


def _check(
    probabilities: np.ndarray,
    labels: np.ndarray,
    has_audio: np.ndarray,
    classes: Sequence[str],
    bins: SourceBins | None,
) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != len(classes) or not len(probabilities):
        raise RunError(f"probabilities have shape {list(probabilities.shape)}, not [n, {len(classes)}] with n > 0")
    n, n_classes = probabilities.shape
    is_multi = labels.ndim == 2
    if labels.shape != ((n, n_classes) if is_multi else (n,)):
        raise RunError(f"labels have shape {list(labels.shape)}; {n} predictions of {n_classes} classes need as many")
    if has_audio.shape != (n,) or has_audio.dtype != bool:
        raise RunError(f"has_audio is {has_audio.dtype} {list(has_audio.shape)}, not bool [{n}]")
    if bins is not None and bins.index.shape != ((n_classes,) if is_multi else (n,)):
        raise RunError(f"bins have shape {list(bins.index.shape)}, not [{n_classes if is_multi else n}]")
    faulty = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(faulty):
        raise RunError(f"predictions of {len(faulty)} of {n} segments aren't finite, the first is number {faulty[0]}")
    if probabilities.min() < -_TOLERANCE or probabilities.max() > 1 + _TOLERANCE:
        raise RunError(
            f"probabilities lie in {probabilities.min():.3g}..{probabilities.max():.3g}, not in 0..1; are they logits?"
        )
    if is_multi:
        if not np.isin(labels, (0, 1)).all():
            raise RunError("multi-label labels hold other values than 0 and 1")
    elif not np.issubdtype(labels.dtype, np.integer):
        raise RunError(f"single-label labels are {labels.dtype}, not indices of classes")
    elif labels.min() < 0 or labels.max() >= n_classes:
        raise RunError(f"labels lie in {labels.min()}..{labels.max()}, not in 0..{n_classes - 1}")


@dataclass(frozen=True, slots=True)
class TestSplit:
    """Test segments of the target with their labels, and the source's train split for the bins."""

    test: LabelledSegments
    source_train: LabelledSegments
    classes: tuple[str, ...]

    __test__ = False  # not for pytest to collect

    @property
    def segment_ids(self) -> list[str]:
        """Ids of the test segments."""
        return [segment.segment_id for segment in self.test.segments]


def open_test_split(
    manifest: Manifest, card: DatasetCard, shift: Shift, kept: Sequence[str], source_train: LabelledSegments
) -> TestSplit:
    """Return the target's test segments that have features (`kept`), with their labels; for scoring only.

    Raises RunError if none is left.
    """
    if not kept:
        raise RunError(f"{shift.name}: the target has no test segment to score; import a manifest with a test split")
    test = select_labelled(label_target_test(manifest, card, shift), set(kept))
    return TestSplit(test, source_train, card.classes)


def plan_scores_step(split: TestSplit, inputs: Mapping[str, str]) -> Step:
    """Plan the step; `inputs` are the keys of the predictions and of the audio."""
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
    """Return the function that the step runs: it computes the scores and writes which segments are right (`hits.npz`).

    `predict` returns probabilities of the split's segments in their order, float [n, K], or of several networks, float
    [networks, n, K], whose scores are averaged. `has_audio` is bool [n].
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
    """Read which test segments a run got right: ids, and bool [n] or the share of its networks, float64 [n].

    Returns None if the folder has no such file (multi-label).
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


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """Mean of n runs with the half width of its 95 % t-interval, None for a single run."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Mean difference of a method to a baseline on the same n pairs, with a two-sided p-value of a paired t-test.

    `p_value` is None for a single pair, and where all differences are equal but not 0, so that there is no spread; it
    is 1 where all are 0.
    """

    difference: float
    half_width: float | None
    p_value: float | None
    n: int


@dataclass(frozen=True, slots=True)
class SegmentTest:
    """Difference with its 95 % bootstrap interval over n test segments, and its two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def compute_interval(values: Sequence[float]) -> MeanInterval:
    """Compute the mean of runs and the half width of its 95 % t-interval; raises RunError for none or a NaN."""
    from scipy.special import stdtrit  # Student's t; importing scipy.stats takes a second

    numbers = _require_finite(values, "scores of runs")
    n = len(numbers)
    half_width = float(stdtrit(n - 1, (1 + LEVEL) / 2) * numbers.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return MeanInterval(float(numbers.mean()), half_width, n)


def compare_pairs(ours: Mapping[PairKey, float], baseline: Mapping[PairKey, float]) -> PairedTest:
    """Test, by a paired t-test over the (shift, seed) pairs that both have, whether `ours` differs from the baseline.

    Runs that share a seed or a shift are not independent, so the p-value tends to be too small. Raises RunError if no
    pair is in both.
    """
    from scipy.special import stdtr

    keys = [key for key in ours if key in baseline]
    if not keys:
        raise RunError("no run has a baseline of the same shift and seed to compare with")
    first = _require_finite([ours[key] for key in keys], "scores of runs")
    second = _require_finite([baseline[key] for key in keys], "scores of the baseline's runs")
    differences, n = first - second, len(keys)
    interval = compute_interval(differences.tolist())
    if np.ptp(differences) <= _EQUAL:
        p_value = 1.0 if n > 1 and abs(interval.mean) <= _EQUAL else None
    else:
        statistic = interval.mean / (differences.std(ddof=1) / np.sqrt(n))
        p_value = float(2 * stdtr(n - 1, -abs(statistic)))
    return PairedTest(interval.mean, interval.half_width, p_value, n)


def compare_segments(
    ours: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray], *, n_draws: int = 10_000, seed: int = 0
) -> SegmentTest:
    """Test by a paired bootstrap over test segments whether a mean over segments differs from the baseline's.

    Both map a shift to one number a test segment, float [n] in the same order: whether it is right, or the share of
    seeds in which it is. The difference is the mean over shifts of the mean over segments; segments are resampled
    within each shift. The test is of these trained networks on other segments, not of another training. Average
    precision is not a mean over segments and cannot be tested so. Raises RunError naming the shift that does not fit.
    """
    if not ours or set(ours) != set(baseline):
        raise RunError(f"segments of shifts {sorted(ours)} can't be compared with those of {sorted(baseline)}")
    rng = np.random.default_rng(seed)
    means, drawn = [], []
    for shift, values in ours.items():
        if values.shape != baseline[shift].shape or values.ndim != 1 or len(values) < 2:
            raise RunError(f"{shift}: {list(values.shape)} and {list(baseline[shift].shape)} aren't 2 or more segments")
        differences = np.subtract(values, baseline[shift], dtype=np.float64)
        _require_finite(differences, f"{shift}: differences of segments")
        # Equivalent to drawing n segments with replacement: count how often each distinct difference is drawn.
        distinct, counts = np.unique(differences, return_counts=True)
        n = len(differences)
        drawn.append(rng.multinomial(n, counts / n, size=n_draws) @ distinct / n)
        means.append(differences.mean())
    averages = np.mean(drawn, axis=0)
    low, high = np.quantile(averages, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    n_beyond = min(int((averages <= 0).sum()), int((averages >= 0).sum()))
    return SegmentTest(
        difference=float(np.mean(means)),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (n_beyond + 1) / (n_draws + 1)),
        n=sum(map(len, ours.values())),
    )


def _require_finite(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise RunError(f"{what}: {len(numbers)} values, {int((~np.isfinite(numbers)).sum())} of them not finite")
    return numbers
