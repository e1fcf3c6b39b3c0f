"""Makes a grid's table of what its runs scored: rows times shifts and their mean, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.cards import DatasetCard, PublishedNumber
from echoshift.pipeline.errors import RunError
from echoshift.train.grids import ColumnGroup, Grid, PlannedRun, list_shifts
from echoshift.train.intervals import (
    MeanInterval,
    PairedTest,
    PairKey,
    SegmentTest,
    compare_pairs,
    compare_segments,
    compute_interval,
)
from echoshift.train.runs import RunRecord, keep_latest
from echoshift.train.scores import Score
from echoshift.train.selection_rules import SelectionRule
from echoshift.train.table_notes import write_notes

MEAN = "mean"
PERCENT = 100.0
_PARTS: dict[ColumnGroup, tuple[str, str]] = {"silent": ("silent", "audible"), "rare": ("rare", "frequent")}


@dataclass(frozen=True, slots=True)
class TableCell:
    """A mean over seeds in percent, None where no seed is done, and how many seeds the grid asks for.

    A cell over several shifts is, for each seed in which all of them are done, their mean.
    """

    interval: MeanInterval | None
    n_planned: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row; cells, and published numbers in percent, are by column.

    `difference` (in points) and `segments` test it against the baseline; None for the baseline itself, and where there
    is nothing to compare with.
    """

    name: str
    cells: Mapping[str, TableCell]
    published: Mapping[str, float]
    difference: PairedTest | None
    segments: SegmentTest | None
    n_done: int
    n_planned: int


@dataclass(frozen=True, slots=True)
class Table:
    """What a grid came to.

    Attributes:
        title: the grid's, with the dataset's name.
        dataset, is_synthetic: of the card; numbers of a synthetic one are no benchmark.
        columns: shifts, `mean` where there are several, then `silent`, `audible`, `rare`, `frequent` on request.
        baseline: the row that the others are compared with, "" for none.
        rows: in the grid's order.
        notes: whole sentences that belong below the table wherever it is shown.
    """

    title: str
    dataset: str
    is_synthetic: bool
    columns: tuple[str, ...]
    baseline: str
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]


def make_table(
    grid: Grid,
    records: Iterable[RunRecord],
    planned: Sequence[PlannedRun],
    card: DatasetCard,
    *,
    selection: SelectionRule = "last",
    columns: Sequence[ColumnGroup] | None = None,
    manifest_sha256: str | None = None,
    hits: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Table:
    """Make the table of a grid's planned runs from the records there are, oldest first; what is missing is said.

    A record counts for a planned run of the same configuration, shift and seed under the same selection rule, the last
    one where there are several; with `manifest_sha256`, only those of that manifest. `columns` replaces the grid's.
    `hits` are, by row and shift, each test segment's share of seeds in which it is right (`compare_segments`).
    Published numbers stand beside a row where the card has them and isn't synthetic; that of the mean, only where all
    shifts that the grid admits (`list_shifts`) are planned. Raises RunError where nothing is planned.
    """
    if not planned:
        raise RunError(f"grid {grid.name} has no runs to make a table of")
    groups = grid.columns if columns is None else columns
    shifts = list(dict.fromkeys(run.shift for run in planned))
    found = _find_records(records, planned, card, selection)
    used = {row: _of_manifest(runs, manifest_sha256) for row, runs in found.items()}
    has_all_shifts = set(shifts) == set(list_shifts(grid, card))
    published = _find_published(grid, card)
    names = [*shifts, *([MEAN] if len(shifts) > 1 else []), *(part for group in groups for part in _PARTS[group])]
    rows = []
    for name in used:
        n_seeds = len({run.seed for run in planned if run.row == name})
        main = _take_main(used[name])
        cells = {shift: _average_over_shifts(main, [shift], n_seeds) for shift in shifts}
        if MEAN in names:
            cells[MEAN] = _average_over_shifts(main, shifts, n_seeds)
        for part in (part for group in groups for part in _PARTS[group]):
            cells[part] = _average_over_shifts(_take(used[name], _get_part(part)), shifts, n_seeds)
        rows.append(
            TableRow(
                name=name,
                cells=cells,
                published=_keep(published[name].scores, names, has_all_shifts) if name in published else {},
                difference=_compare(name, used, grid.baseline),
                segments=_compare_hits(name, hits or {}, grid.baseline),
                n_done=len(used[name]),
                n_planned=sum(run.row == name for run in planned),
            )
        )
    n_left_out = sum(map(len, found.values())) - sum(map(len, used.values()))
    return Table(
        title=f"{grid.title}, {card.name}",
        dataset=card.name,
        is_synthetic=card.synthetic,
        columns=tuple(names),
        baseline=grid.baseline,
        rows=tuple(rows),
        notes=write_notes(
            card=card,
            records=[record for runs in used.values() for record in runs.values()],
            missing={row.name: (row.n_done, row.n_planned) for row in rows if row.n_done < row.n_planned},
            n_other_manifest=n_left_out,
            baseline=grid.baseline if any(row.difference for row in rows) else "",
            has_segment_tests=any(row.segments for row in rows),
            parts=[part for group in groups for part in _PARTS[group]],
            published=[published[row.name] for row in rows if row.published],
            selection=selection,
            warned={name: runs for name in used if (runs := {p: r for p, r in used[name].items() if r.warnings})},
            with_target_labels=[name for name in used if any(_reads_target(run) for run in planned if run.row == name)],
        ),
    )


def _reads_target(run: PlannedRun) -> bool:
    """Return whether a run trains on labels of the target's unlabelled part: an oracle, or supervised."""
    kinds = [
        network.get("stage2", {}).get("pseudo_labels", {}).get("kind") for network in run.config.get("streams", ())
    ]
    setting = run.config.get("alignment", {}).get("alignment", {}).get("setting") if run.stage == "alignment" else None
    return "oracle" in kinds or setting == "supervised"


RowRuns = Mapping[PairKey, RunRecord]


def _find_records(
    records: Iterable[RunRecord],
    planned: Sequence[PlannedRun],
    card: DatasetCard,
    selection: SelectionRule,
) -> dict[str, dict[PairKey, RunRecord]]:
    latest = keep_latest(record for record in records if record.dataset == card.name)
    found: dict[str, dict[PairKey, RunRecord]] = {run.row: {} for run in planned}
    for run in planned:
        record = latest.get((run.stage, run.config_hash, run.shift, run.seed, selection))
        if record is not None:
            found[run.row][run.shift, run.seed] = record
    return found


def _of_manifest(runs: RowRuns, sha256: str | None) -> RowRuns:
    return {pair: run for pair, run in runs.items() if sha256 in (None, run.manifest_sha256)}


def _take_main(runs: RowRuns) -> dict[PairKey, float]:
    scores = ((pair, record.scores.main.value) for pair, record in runs.items())
    return {pair: value * PERCENT for pair, value in scores if value is not None}


def _take(runs: RowRuns, get: Callable[[RunRecord], Score | None]) -> dict[PairKey, float | None]:
    """Take one score of each run, in percent, None where the run has no segments for it."""
    scores = {pair: get(record) for pair, record in runs.items()}
    return {
        pair: None if score is None or score.value is None else score.value * PERCENT for pair, score in scores.items()
    }


def _get_part(part: str) -> Callable[[RunRecord], Score | None]:
    return lambda record: getattr(record.scores, part)


def _average_over_shifts(
    values: Mapping[PairKey, float | None] | Mapping[PairKey, float], shifts: Sequence[str], n_planned: int
) -> TableCell:
    """Average over seeds the mean over shifts; a shift without such segments takes no part in it."""
    means = []
    for seed in dict.fromkeys(seed for _, seed in values):
        if all((shift, seed) in values for shift in shifts):
            numbers = [number for shift in shifts if (number := values[shift, seed]) is not None]
            if numbers:
                means.append(float(np.mean(numbers)))
    return TableCell(compute_interval(means) if means else None, n_planned)


def _compare(name: str, used: Mapping[str, RowRuns], baseline: str) -> PairedTest | None:
    if name == baseline or not set(used[name]) & set(used.get(baseline, {})):
        return None
    return compare_pairs(_take_main(used[name]), _take_main(used[baseline]))


def _compare_hits(name: str, hits: Mapping[str, Mapping[str, np.ndarray]], baseline: str) -> SegmentTest | None:
    if name == baseline or name not in hits or baseline not in hits:
        return None
    if any(len(of_shift) < 2 for row in (name, baseline) for of_shift in hits[row].values()):
        return None  # a lone test segment can't be drawn anew
    test = compare_segments(hits[name], hits[baseline])
    return SegmentTest(test.difference * PERCENT, test.low * PERCENT, test.high * PERCENT, test.p_value, test.n)


def _find_published(grid: Grid, card: DatasetCard) -> dict[str, PublishedNumber]:
    if card.synthetic or grid.published is None:
        return {}
    listed = {
        number.method: number
        for number in card.published
        if (number.paper, number.table, number.metric) == (grid.published.paper, grid.published.table, card.metric)
    }
    return {row.name: listed[row.published] for row in grid.rows if row.published in listed}


def _keep(scores: Mapping[str, float], columns: Sequence[str], has_all_shifts: bool) -> dict[str, float]:
    return {c: scores[c] for c in columns if c in scores and (c != MEAN or has_all_shifts)}
