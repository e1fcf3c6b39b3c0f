"""Breaks down what runs scored by class and by part of the test set, over seeds, with their confusion matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.train.grids import PlannedRun
from echoshift.train.runs import RunKey, RunRecord, SelectionRule
from echoshift.train.scores import MeanInterval, compute_interval
from echoshift.train.tables import PERCENT

MAX_SHOWN_CLASSES = 40
MAX_CONFUSED_CLASSES = 20
PARTS = ("silent", "audible", "rare", "frequent")
OTHERS = "all others"


@dataclass(frozen=True, slots=True)
class ClassBar:
    """What one class, or part of the test set, scores, in percent: mean, lowest and highest over seeds.

    `n` test segments are of it.
    """

    name: str
    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What the runs of one row scored in one shift, class by class.

    Attributes:
        seeds: of the runs that are done.
        classes: in the card's order; of more than MAX_SHOWN_CLASSES the ones with the most test segments.
        parts: silent, audible, rare and frequent test segments, those of them that the runs tell.
        confused: names of the confusion matrix's rows and columns.
        confusion: counts summed over seeds, rows are labels; of more than MAX_CONFUSED_CLASSES classes the ones with
            the most test segments, and the others together. None where a run has none (multi-label, mean of networks).
    """

    row: str
    shift: str
    seeds: tuple[int, ...]
    classes: tuple[ClassBar, ...]
    n_classes: int
    parts: tuple[ClassBar, ...]
    confused: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True, slots=True)
class LooseRuns:
    """Runs of one configuration, shift and selection rule that are in no grid's table, over their seeds.

    `interval` is of their main score, in percent; None where no run has one.
    """

    stage: str
    config_hash: str
    selection: SelectionRule
    interval: MeanInterval | None
    breakdown: Breakdown


def break_down(
    planned: Sequence[PlannedRun], latest: Mapping[RunKey, RunRecord], rule: SelectionRule, manifest_sha256: str
) -> list[Breakdown]:
    """Break down by class what planned runs scored, row by row and shift by shift, without those that have no run."""
    grouped: dict[tuple[str, str], list[RunRecord]] = {}
    for run in planned:
        record = latest.get((run.stage, run.config_hash, run.shift, run.seed, rule))
        if record is not None and record.manifest_sha256 == manifest_sha256:
            grouped.setdefault((run.row, run.shift), []).append(record)
    rows = list(dict.fromkeys(run.row for run in planned))
    ordered = sorted(grouped.items(), key=lambda item: (rows.index(item[0][0]),))
    return [_break_down(row, shift, records) for (row, shift), records in ordered]


def _break_down(row: str, shift: str, records: Sequence[RunRecord]) -> Breakdown:
    per_class = [record.scores.per_class for record in records]
    bars = [
        _average(scores[0].name, [score.value for score in scores], scores[0].n)
        for scores in zip(*per_class, strict=True)
    ]
    parts = []
    for part in PARTS:
        scores = [getattr(record.scores, part) for record in records]
        if all(score is not None for score in scores):
            parts.append(_average(part, [score.value for score in scores], scores[0].n))
    shown = _find_largest(bars, MAX_SHOWN_CLASSES)
    confused = _find_largest(bars, MAX_CONFUSED_CLASSES)
    matrices = [record.scores.confusion for record in records]
    summed = None
    if all(matrix is not None for matrix in matrices):
        total = np.sum([np.array(matrix) for matrix in matrices], axis=0)
        summed = tuple(tuple(int(count) for count in line) for line in fold_confusion(total, confused))
    return Breakdown(
        row=row,
        shift=shift,
        seeds=tuple(record.seed for record in records),
        classes=tuple(bars[k] for k in shown),
        n_classes=len(bars),
        parts=tuple(parts),
        confused=(*(bars[k].name for k in confused), *([OTHERS] if len(confused) < len(bars) else [])),
        confusion=summed,
    )


def fold_confusion(counts: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Keep the rows and columns of some classes, and add up those of all others, int64 [k + 1, k + 1] from [K, K].

    All classes kept is the matrix itself.
    """
    if len(kept) == len(counts):
        return counts
    others = [k for k in range(len(counts)) if k not in set(kept)]
    rows = np.concatenate([counts[kept], counts[others].sum(axis=0, keepdims=True)])
    return np.concatenate([rows[:, kept], rows[:, others].sum(axis=1, keepdims=True)], axis=1)


def _find_largest(bars: Sequence[ClassBar], n: int) -> list[int]:
    """Find the n classes with the most test segments, in the card's order."""
    return sorted(sorted(range(len(bars)), key=lambda k: (-bars[k].n, k))[:n])


def _average(name: str, values: Sequence[float | None], n: int) -> ClassBar:
    there = [value * PERCENT for value in values if value is not None]
    mean = float(np.mean(there)) if there else None
    return ClassBar(name, mean, min(there, default=None), max(there, default=None), n)


def gather_loose(
    records: Iterable[RunRecord], shown: frozenset[RunKey], manifest_sha256: str
) -> tuple[list[LooseRuns], int]:
    """Gather the runs that aren't `shown` in a grid's table, and counts those of another manifest, left out.

    A configuration is called by the row that first asked for it, or by its hash.
    """
    rows: dict[str, str] = {}
    grouped: dict[tuple[str, str, str, SelectionRule], list[RunRecord]] = {}
    n_left_out = 0
    for record in records:
        if record.row:
            rows.setdefault(record.config_hash, record.row)
        if record.key in shown:
            continue
        if record.manifest_sha256 != manifest_sha256:
            n_left_out += 1
            continue
        key = (record.stage, record.config_hash, record.shift, record.selection)
        grouped.setdefault(key, []).append(record)
    loose = []
    order = list(dict.fromkeys(key[:2] for key in grouped))
    for key in sorted(grouped, key=lambda key: (key[0], order.index(key[:2]), key[2:])):
        (stage, config_hash, shift, rule), found = key, grouped[key]
        scores = [value * PERCENT for record in found if (value := record.scores.main.value) is not None]
        name = rows.get(config_hash, f"settings {config_hash}")
        interval = compute_interval(scores) if scores else None
        loose.append(LooseRuns(stage, config_hash, rule, interval, _break_down(name, shift, found)))
    return loose, n_left_out
