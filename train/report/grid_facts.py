"""Gathers the grids that have runs: their tables, and by row and shift the classes' scores and confusion matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cards import DatasetCard
from pipeline.errors import EchoshiftError
from train.grids import Grid, PlannedRun, Stage, list_grids, list_shifts, plan_runs, read_grid
from train.hits import average_hits
from train.runs import RunKey, RunRecord, SelectionRule, keep_latest
from train.tables import PERCENT, Table, make_table

PRESETS = ("paper", "released", "quick")
RULES: tuple[SelectionRule, ...] = ("last", "mean_last", "source_val", "target_oracle")
MAX_SHOWN_CLASSES = 40
MAX_CONFUSED_CLASSES = 20
MAX_BREAKDOWNS = 30
PARTS = ("silent", "audible", "rare", "frequent")
OTHERS = "all others"

Resolve = Callable[[str, Stage, tuple[str, ...]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ClassBar:
    """Is what one class, or part of the test set, scores, in percent: mean, lowest and highest over seeds.

    `n` test segments are of it.
    """

    name: str
    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Is what the runs of one row scored in one shift, class by class.

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
class GridFacts:
    """Is one grid under one preset and selection rule.

    Attributes:
        breakdowns: of each row and shift with a run, at most MAX_BREAKDOWNS of `n_breakdowns`.
        missing_shifts: the shifts of the grid in which nothing is done yet; the table leaves them out.
        command: what runs what is missing.
    """

    name: str
    preset: str
    selection: SelectionRule
    table: Table
    breakdowns: tuple[Breakdown, ...]
    n_breakdowns: int
    missing_shifts: tuple[str, ...]
    command: str

    @property
    def n_rows_done(self) -> int:
        """Gives how many rows have a run."""
        return sum(row.n_done > 0 for row in self.table.rows)


@dataclass(frozen=True, slots=True)
class GridsFacts:
    """Is all grids: those with runs, those of the dataset's task without (name and title), and which runs they show."""

    done: tuple[GridFacts, ...]
    without_runs: tuple[tuple[str, str], ...]
    shown: frozenset[RunKey]


def gather_grids(
    card: DatasetCard,
    present_shifts: Sequence[str],
    records: Sequence[RunRecord],
    manifest_sha256: str,
    runs_dir: Path,
    resolve: Resolve,
    *,
    presets: Sequence[str] = PRESETS,
    more: Sequence[str] = (),
    notify: Callable[[], None] = lambda: None,
) -> GridsFacts:
    """Gathers what `echoshift table` prints of every grid, under every preset and rule of which there are runs.

    `resolve` makes the configuration of a preset, stage and overrides; `more` are grid files of one's own.
    """
    done: list[GridFacts] = []
    without: list[tuple[str, str]] = []
    shown: set[RunKey] = set()
    latest = keep_latest(records)
    for name in (*list_grids(), *more):
        grid = read_grid(name)
        found = (
            []
            if grid.task not in (None, card.task)
            else _gather_grid(grid, card, present_shifts, latest, resolve, presets)
        )
        for preset, planned in found:
            for rule in RULES:
                keys = {(run.stage, run.config_hash, run.shift, run.seed, rule) for run in planned}
                if keys & set(latest):
                    shown |= keys & set(latest)
                    done.append(
                        _make_facts(
                            grid, name, preset, rule, planned, card, present_shifts, records, manifest_sha256, runs_dir
                        )
                    )
        if not found and grid.task in (None, card.task) and set(list_shifts(grid, card)) & set(present_shifts):
            without.append((str(name), grid.title))
        notify()
    done.sort(key=lambda grid: (*_order(grid), grid.name))
    return GridsFacts(tuple(done), tuple(without), frozenset(shown))


def _order(grid: GridFacts) -> tuple[float, int]:
    """Puts the grids first of which most rows have runs, then the larger ones."""
    return -grid.n_rows_done / len(grid.table.rows), -grid.n_rows_done


def _gather_grid(
    grid: Grid,
    card: DatasetCard,
    present_shifts: Sequence[str],
    latest: Mapping[RunKey, RunRecord],
    resolve: Resolve,
    presets: Sequence[str],
) -> list[tuple[str, list[PlannedRun]]]:
    """Plans a grid under each preset, and keeps the shifts and seeds of which there are runs."""
    admitted = [shift for shift in (grid.shifts or list_shifts(grid, card)) if shift in present_shifts]
    found: list[tuple[str, list[PlannedRun]]] = []
    shown: set[RunKey] = set()
    for preset in presets:
        if not admitted:
            break
        of_preset = partial(resolve, preset)
        try:
            planned = plan_runs(grid, card, of_preset, shifts=admitted)
        except EchoshiftError:
            continue  # a preset or a grid that this dataset's settings don't allow can have no runs either
        hashes = {(run.stage, run.config_hash) for run in planned}
        done = {key for key in latest if key[:2] in hashes and key[2] in admitted}
        if not done <= shown:  # presets share rows: one that adds none would only repeat a table with gaps
            shown |= done
            shifts = [shift for shift in admitted if any(key[2] == shift for key in done)]
            seeds = sorted({*grid.seeds, *(key[3] for key in done)})
            found.append((preset, plan_runs(grid, card, of_preset, shifts=shifts, seeds=seeds)))
    return found


def _make_facts(
    grid: Grid,
    name: str,
    preset: str,
    rule: SelectionRule,
    planned: list[PlannedRun],
    card: DatasetCard,
    present_shifts: Sequence[str],
    records: Sequence[RunRecord],
    manifest_sha256: str,
    runs_dir: Path,
) -> GridFacts:
    hits = average_hits(planned, records, runs_dir, selection=rule, manifest_sha256=manifest_sha256)
    table = make_table(
        grid,
        records,
        planned,
        card,
        selection=rule,
        columns=("silent", "rare"),
        manifest_sha256=manifest_sha256,
        hits=hits,
    )
    breakdowns = break_down(planned, keep_latest(records), rule, manifest_sha256)
    shifts = {run.shift for run in planned}
    of_grid = grid.shifts or list_shifts(grid, card)
    chosen = f" PRESET={preset}" if preset not in ("", PRESETS[0]) else ""
    return GridFacts(
        name=grid.name,
        preset=preset,
        selection=rule,
        table=table,
        breakdowns=tuple(breakdowns[:MAX_BREAKDOWNS]),
        n_breakdowns=len(breakdowns),
        missing_shifts=tuple(shift for shift in of_grid if shift in present_shifts and shift not in shifts),
        command=f"make ablate GRID={name} DATASET={card.name}{chosen}",
    )


def break_down(
    planned: Sequence[PlannedRun], latest: Mapping[RunKey, RunRecord], rule: SelectionRule, manifest_sha256: str
) -> list[Breakdown]:
    """Breaks down by class what planned runs scored, row by row and shift by shift, without those that have no run."""
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
    """Keeps the rows and columns of some classes, and adds up those of all others, int64 [k + 1, k + 1] from [K, K].

    All classes kept is the matrix itself.
    """
    if len(kept) == len(counts):
        return counts
    others = [k for k in range(len(counts)) if k not in set(kept)]
    rows = np.concatenate([counts[kept], counts[others].sum(axis=0, keepdims=True)])
    return np.concatenate([rows[:, kept], rows[:, others].sum(axis=1, keepdims=True)], axis=1)


def _find_largest(bars: Sequence[ClassBar], n: int) -> list[int]:
    """Finds the n classes with the most test segments, in the card's order."""
    return sorted(sorted(range(len(bars)), key=lambda k: (-bars[k].n, k))[:n])


def _average(name: str, values: Sequence[float | None], n: int) -> ClassBar:
    there = [value * PERCENT for value in values if value is not None]
    mean = float(np.mean(there)) if there else None
    return ClassBar(name, mean, min(there, default=None), max(there, default=None), n)
