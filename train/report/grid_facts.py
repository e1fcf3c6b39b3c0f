"""Gathers the grids that have runs: their tables, and by row and shift the classes' scores and confusion matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import EchoshiftError
from echoshift.train.grids import Grid, PlannedRun, Stage, list_grids, list_shifts, plan_runs, read_grid
from echoshift.train.report.breakdowns import Breakdown, LooseRuns, break_down, gather_loose
from echoshift.train.runs import RunKey, RunRecord, SelectionRule, keep_latest
from echoshift.train.tables import Table, average_hits, make_table

PRESETS = ("paper", "released", "quick")
RULES: tuple[SelectionRule, ...] = ("last", "mean_last", "source_val", "target_oracle")
MAX_BREAKDOWNS = 30

Resolve = Callable[[str, Stage, tuple[str, ...]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class GridFacts:
    """One grid under one preset and selection rule.

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
        """How many rows have a run."""
        return sum(row.n_done > 0 for row in self.table.rows)


@dataclass(frozen=True, slots=True)
class GridsFacts:
    """All grids: those with runs, those of the dataset's task without (name and title), and which runs they show.

    `loose` are the runs that no grid shows, without `n_other_manifest` of them that are of another manifest.
    """

    done: tuple[GridFacts, ...]
    without_runs: tuple[tuple[str, str], ...]
    shown: frozenset[RunKey]
    loose: tuple[LooseRuns, ...]
    n_other_manifest: int


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
    """Gather what `echoshift table` prints of every grid, under every preset and rule of which there are runs.

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
    loose, n_left_out = gather_loose(latest.values(), frozenset(shown), manifest_sha256)
    return GridsFacts(tuple(done), tuple(without), frozenset(shown), tuple(loose), n_left_out)


def _order(grid: GridFacts) -> tuple[float, int]:
    """Put the grids first of which most rows have runs, then the larger ones."""
    return -grid.n_rows_done / len(grid.table.rows), -grid.n_rows_done


def _gather_grid(
    grid: Grid,
    card: DatasetCard,
    present_shifts: Sequence[str],
    latest: Mapping[RunKey, RunRecord],
    resolve: Resolve,
    presets: Sequence[str],
) -> list[tuple[str, list[PlannedRun]]]:
    """Plan a grid under each preset, and keep the shifts and seeds of which there are runs."""
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
