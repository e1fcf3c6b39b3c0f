"""Computes what predictions score on a test set, each number with how many segments it stands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from echoshift.pipeline.errors import RunError
from echoshift.train.source_bins import BIN_NAMES, N_RARE_BINS, NO_BIN, SourceBins

_TOLERANCE = 1e-3  # how far rounding in half precision may take a probability out of 0..1


class ScoreModel(BaseModel):
    """What all scores have in common: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(ScoreModel):
    """A number in 0..1 with what it stands on; None where there is nothing to stand on.

    `n` counts test segments; `n_classes` the classes that a mean over classes is over, None for other numbers.
    """

    value: float | None
    n: int
    n_classes: int | None = None


class ClassScore(ScoreModel):
    """What one class scores: its accuracy (single-label) or average precision; None for one without positives.

    `n` counts the test segments that have the class.
    """

    name: str
    value: float | None
    n: int


class BinScore(ScoreModel):
    """The score of what the source shows a certain number of times, such as `2-10`."""

    name: str
    score: Score


class Scores(ScoreModel):
    """Everything that one set of predictions scores.

    Attributes:
        task: decides which fields are there; those of the other task are None.
        n: test segments.
        top1: share of segments whose likeliest class is the label; equal probabilities go to the lower index.
        class_mean: mean of the classes' accuracies, over those that have test segments.
        map_zero: mean of all K non-interpolated average precisions, 0 for a class without positives (A's released
            code, METHODS section 6). It is what `main` is for multi-label.
        map_present: the mean over the classes that have positives.
        silent, audible: the same as `main` on the segments without and with sound; multi-label: `map_present` there,
            because a part of the segments lacks classes for no fault of the predictions.
        rare, frequent, bins: by what the source shows (`bin_by_source`); multi-label: mean average precision of the
            bin's classes that have positives. None and () where no bins were given.
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
    """Average the scores of several networks on the same segments, each number by itself.

    The result has no confusion matrix: there is no one prediction that it would count.
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
