"""The report's results: the table of every grid, what classes and parts of the test set score, and all runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.pipeline.errors import EchoshiftError
from echoshift.train.grids import Grid, PlannedRun, Stage, list_grids, list_shifts, plan_runs, read_grid
from echoshift.train.look.report_tables import Cell, PageTable, percent, show
from echoshift.train.runs import RunKey, RunRecord, keep_latest
from echoshift.train.scores import compute_interval
from echoshift.train.splits import DataPlaces
from echoshift.train.stage2.config import SelectionRule
from echoshift.train.tables import MEAN, PERCENT, Table, TableRow, average_hits, lay_out, make_table
from echoshift.train.watching import EpochWatcher, SilentWatcher

PRESETS = ("paper", "released", "quick")
RULES: tuple[SelectionRule, ...] = ("last", "mean_last", "source_val", "target_oracle")
PARTS = ("silent", "audible", "rare", "frequent")
MAX_BREAKDOWNS = 30
MAX_SHOWN_CLASSES, MAX_CONFUSED_CLASSES = 40, 20
MAX_RUNS = 2000
ORACLE = "The rule target_oracle sees the target's test labels: an upper bound, no result."
OTHERS = "all others"


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """What a report is made of.

    Attributes:
        runs_dir: where steps and results lie, `runs/DATASET`.
        resolve: makes the configuration, as JSON, of a preset, stage and overrides.
        present_shifts: names of the card's shifts of which the manifest has segments.
        presets: those under which grids are looked for; `grids` are grid files of one's own.
        n_segments: how many segments of each domain's split are shown, beside those named in `segment_ids`.
        watcher: told how the work goes.
    """

    places: DataPlaces
    runs_dir: Path
    resolve: Callable[[str, Stage, tuple[str, ...]], Mapping[str, Any]]
    present_shifts: tuple[str, ...]
    presets: tuple[str, ...] = PRESETS
    grids: tuple[str, ...] = ()
    n_segments: int = 2
    segment_ids: tuple[str, ...] = ()
    watcher: EpochWatcher = field(default_factory=SilentWatcher)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What the runs of one row scored in one shift, class by class and part by part of the test set, over seeds.

    Attributes:
        confusion: names, and counts summed over seeds, rows are labels; of many classes the ones with the most test
            segments, and the others together. None where a run has none (multi-label, mean of networks).
    """

    title: str
    seeds: tuple[int, ...]
    classes: PageTable
    parts: PageTable | None
    confusion: tuple[tuple[str, ...], list[list[int]]] | None


@dataclass(frozen=True, slots=True)
class GridResult:
    """A grid's table under one preset and selection rule; the breakdowns are at most MAX_BREAKDOWNS of `n_breakdowns`.

    `command` runs what is missing, `score` is that of the last row that has one, with its interval.
    """

    name: str
    title: str
    preset: str
    selection: SelectionRule
    table: PageTable
    n_rows: int
    n_rows_done: int
    breakdowns: Sequence[Breakdown]
    n_breakdowns: int
    command: str

    @property
    def is_whole(self) -> bool:
        """Whether every row has a run."""
        return self.n_rows_done == self.n_rows


def gather_grids(
    request: ReportRequest, records: Sequence[RunRecord]
) -> tuple[list[GridResult], PageTable, set[RunKey]]:
    """Gather what `echoshift table` prints of every grid, under every preset and rule of which there are runs.

    Returns them, those of which most rows have runs first; a table of the grids of the dataset's task without a run;
    and the runs that are shown.
    """
    card, latest = request.places.card, keep_latest(records)
    results: list[GridResult] = []
    without: list[tuple[str, str, str]] = []
    shown: set[RunKey] = set()
    for name in (*list_grids(), *request.grids):
        grid = read_grid(name)
        if grid.task not in (None, card.task):
            request.watcher.advance()
            continue
        found = _plan_presets(grid, request, latest)
        for preset, planned in found:
            for rule in RULES:
                keys = {(run.stage, run.config_hash, run.shift, run.seed, rule) for run in planned} & set(latest)
                if keys:
                    shown |= keys
                    id_ = f"{grid.name}-{preset}-{rule}"
                    results.append(_make_result(id_, grid, name, preset, rule, planned, request, records))
        if not found and set(list_shifts(grid, card)) & set(request.present_shifts):
            without.append((str(name), grid.title, f"make ablate GRID={name} DATASET={card.name}"))
        request.watcher.advance()
    results.sort(key=lambda each: (-each.n_rows_done / each.n_rows, -each.n_rows_done, each.name))
    columns = ("grid", "what it compares", "command")
    return results, PageTable("grids-without-runs", "Grids without a run", columns, without), shown


def _plan_presets(
    grid: Grid, request: ReportRequest, latest: Mapping[RunKey, RunRecord]
) -> list[tuple[str, list[PlannedRun]]]:
    """Plan a grid under each preset, and keep the shifts and seeds of which there are runs."""
    card = request.places.card
    admitted = [shift for shift in (grid.shifts or list_shifts(grid, card)) if shift in request.present_shifts]
    found: list[tuple[str, list[PlannedRun]]] = []
    shown: set[RunKey] = set()
    for preset in request.presets if admitted else ():

        def resolve(stage: Any, overrides: tuple[str, ...], preset: str = preset) -> Mapping[str, Any]:
            return request.resolve(preset, stage, overrides)

        try:
            planned = plan_runs(grid, card, resolve, shifts=admitted)
        except EchoshiftError:
            continue  # a preset or a grid that this dataset's settings don't allow can have no runs either
        hashes = {(run.stage, run.config_hash) for run in planned}
        done = {key for key in latest if key[:2] in hashes and key[2] in admitted}
        if not done <= shown:  # presets share rows: one that adds none would only repeat a table with gaps
            shown |= done
            shifts = [shift for shift in admitted if any(key[2] == shift for key in done)]
            seeds = sorted({*grid.seeds, *(key[3] for key in done)})
            found.append((preset, plan_runs(grid, card, resolve, shifts=shifts, seeds=seeds)))
    return found


def _make_result(
    id_: str,
    grid: Grid,
    name: str,
    preset: str,
    rule: SelectionRule,
    planned: list[PlannedRun],
    request: ReportRequest,
    records: Sequence[RunRecord],
) -> GridResult:
    card, sha256 = request.places.card, request.places.manifest.sha256
    hits = average_hits(planned, records, request.runs_dir, selection=rule, manifest_sha256=sha256)
    table = make_table(
        grid, records, planned, card, selection=rule, columns=("silent", "rare"), manifest_sha256=sha256, hits=hits
    )
    shifts = {run.shift for run in planned}
    of_grid = [shift for shift in (grid.shifts or list_shifts(grid, card)) if shift in request.present_shifts]
    missing = [shift for shift in of_grid if shift not in shifts]
    notes = [f"No run yet in {', '.join(missing)}."] if missing else []
    latest = keep_latest(records)
    grouped: dict[tuple[str, str], list[RunRecord]] = {}
    for run in sorted(planned, key=lambda run: [row.name for row in grid.rows].index(run.row)):
        record = latest.get((run.stage, run.config_hash, run.shift, run.seed, rule))
        if record is not None and record.manifest_sha256 == sha256:
            grouped.setdefault((run.row, run.shift), []).append(record)
    breakdowns = [
        break_down(f"{id_}-{i}", f"{row}, {shift}", found)
        for i, ((row, shift), found) in enumerate(list(grouped.items())[:MAX_BREAKDOWNS])
    ]
    return GridResult(
        name=grid.name,
        title=table.title,
        preset=preset,
        selection=rule,
        table=lay_out_page(id_, f"{table.title} ({grid.name}, {rule})", table, notes),
        n_rows=len(table.rows),
        n_rows_done=sum(row.n_done > 0 for row in table.rows),
        breakdowns=breakdowns,
        n_breakdowns=len(grouped),
        command=f"make ablate GRID={name} DATASET={card.name}{'' if preset == 'paper' else f' PRESET={preset}'}",
    )


def lay_out_page(id_: str, caption: str, table: Table, notes: Sequence[str] = ()) -> PageTable:
    """Lay a grid's table out as `echoshift table` prints it, with bars in its main column, sorted in full precision."""
    header, lines = lay_out(table)
    main = MEAN if MEAN in table.columns else table.columns[0]
    rows = []
    for row, words in zip(table.rows, lines, strict=True):
        cells = [Cell(words[0])]
        for name, word in zip(header[1:], words[1:], strict=True):
            value = _find_value(row, name)
            cells.append(Cell(word, value, value / PERCENT if name == main and value is not None else None))
        rows.append(cells)
    return PageTable(id_, caption, header, rows, [*table.notes, *notes])


def _find_value(row: TableRow, column: str) -> float | None:
    if column in row.cells:
        interval = row.cells[column].interval
        return interval.mean if interval else None
    if column.endswith(", published"):
        return row.published.get(column.removesuffix(", published"))
    if column == "p (segments)":
        return row.segments.p_value if row.segments else None
    if row.difference is None:
        return None
    return row.difference.p_value if column == "p" else row.difference.difference


def break_down(id_: str, title: str, records: Sequence[RunRecord]) -> Breakdown:
    """Break down what runs of one configuration and shift scored, a record a seed."""
    scores = list(zip(*(record.scores.per_class for record in records), strict=True))
    names, n_segments = [each[0].name for each in scores], [each[0].n for each in scores]
    largest = sorted(range(len(scores)), key=lambda k: (-n_segments[k], k))
    shown = sorted(largest[:MAX_SHOWN_CLASSES])
    n_seeds = len(records)
    of_seeds = f"mean of {n_seeds} seeds" if n_seeds > 1 else f"seed {records[0].seed}"
    columns = ("mean, %", *(("lowest, %", "highest, %") if n_seeds > 1 else ()), "test segments")
    rows = [(names[k], *_average([score.value for score in scores[k]]), n_segments[k]) for k in shown]
    few = f"The {len(shown)} of {len(scores)} classes with the most test segments." if len(shown) < len(scores) else ""
    classes = PageTable(f"{id_}-classes", f"By class, {of_seeds}", ("class", *columns), rows, [few] if few else [])
    parts = []
    for part in PARTS:
        found = [getattr(record.scores, part) for record in records]
        if all(score is not None for score in found):
            parts.append((part, *_average([score.value for score in found]), found[0].n))
    of_parts = PageTable(f"{id_}-parts", f"By part of the test set, {of_seeds}", ("part", *columns), parts)
    matrices = [record.scores.confusion for record in records]
    confusion = None
    if all(matrix is not None for matrix in matrices):
        kept = sorted(largest[:MAX_CONFUSED_CLASSES])
        folded = fold_confusion(np.sum([np.array(matrix) for matrix in matrices], axis=0), kept)
        confusion = ((*(names[k] for k in kept), *([OTHERS] if len(kept) < len(names) else [])), folded.tolist())
    seeds = tuple(record.seed for record in records)
    return Breakdown(title, seeds, classes, of_parts if parts else None, confusion)


def _average(values: Sequence[float | None]) -> list[Cell]:
    """Average a score over seeds, in percent: the mean with a bar, and of several seeds the lowest and highest."""
    there = [value * PERCENT for value in values if value is not None]
    if not there:
        return [show(None)] * (3 if len(values) > 1 else 1)
    mean = float(np.mean(there))
    return [Cell(f"{mean:.1f}", mean, mean / PERCENT), *map(show, (min(there), max(there)) if len(values) > 1 else ())]


def fold_confusion(counts: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Keep the rows and columns of some classes, and add up those of all others, int64 [k + 1, k + 1] from [K, K].

    All classes kept is the matrix itself.
    """
    if len(kept) == len(counts):
        return counts
    others = [k for k in range(len(counts)) if k not in set(kept)]
    rows = np.concatenate([counts[kept], counts[others].sum(axis=0, keepdims=True)])
    return np.concatenate([rows[:, kept], rows[:, others].sum(axis=1, keepdims=True)], axis=1)


def gather_loose(
    records: Sequence[RunRecord], shown: set[RunKey], manifest_sha256: str
) -> tuple[PageTable, list[Breakdown]]:
    """Gather the runs of this manifest that aren't `shown` in a grid's table, over their seeds.

    A configuration is called by the row that first asked for it, or by its hash.
    """
    names: dict[str, str] = {}
    grouped: dict[tuple[str, str, str, SelectionRule], list[RunRecord]] = {}
    n_left_out = 0
    for record in records:
        if record.row:
            names.setdefault(record.config_hash, record.row)
        if record.key not in shown and record.manifest_sha256 != manifest_sha256:
            n_left_out += 1
        elif record.key not in shown:
            key = (record.stage, record.config_hash, record.shift, record.selection)
            grouped.setdefault(key, []).append(record)
    rows: list[tuple[Any, ...]] = []
    breakdowns: list[Breakdown] = []
    order = list(dict.fromkeys(key[:2] for key in grouped))
    for key in sorted(grouped, key=lambda key: (key[0], order.index(key[:2]), key[2:])):
        (stage, config_hash, shift, rule), found = key, grouped[key]
        scores = [value * PERCENT for record in found if (value := record.scores.main.value) is not None]
        interval = compute_interval(scores) if scores else None
        numbers = (interval.mean, interval.half_width) if interval else (None, None)
        name = names.get(config_hash, f"settings {config_hash}")
        title = f"{name}, {shift}, {stage}, {rule}, {config_hash}"
        breakdowns.append(break_down(f"loose-{len(rows)}", title, found))
        of_part = {row[0].text: row[1] for row in (breakdowns[-1].parts.rows if breakdowns[-1].parts else ())}
        of_parts = (of_part.get(part) for part in PARTS)
        rows.append((name, stage, shift, rule, config_hash, *numbers, len(found), *of_parts))
    notes = ["Mean over seeds, and half width of the 95 % t-interval; one seed has none."]
    notes += [ORACLE] if any(key[3] == "target_oracle" for key in grouped) else []
    notes += [f"Runs on another manifest that are left out: {n_left_out:,}."] if n_left_out else []
    scored = ("score, %", "± half width", "seeds", *(f"{part}, %" for part in PARTS))
    columns = ("row", "stage", "shift", "rule", "settings", *scored)
    return PageTable("loose", "By configuration and shift, over seeds", columns, rows, notes), breakdowns


def list_runs(runs: Sequence[RunRecord], shown: set[RunKey]) -> PageTable:
    """List every run, whatever grid it is of, oldest first; the last MAX_RUNS of them."""
    rows = []
    for run in runs[-MAX_RUNS:]:
        scores = run.scores
        parts = (scores.class_mean or scores.map_present, *(getattr(scores, part) for part in PARTS))
        numbers = (percent(scores.main.value), scores.n, *(percent(part.value if part else None) for part in parts))
        names = (run.device, run.code_version, run.config_hash, "yes" if run.key in shown else "no")
        who = (run.stage, run.row or "–", run.shift, run.seed, run.selection)
        rows.append((*who, *numbers, run.duration_s / 60, *names))
    metric = "mean average precision" if runs and runs[0].scores.task == "multi-label" else "top-1 accuracy"
    notes = [f"Score: {metric} on the target's test split."]
    notes += [ORACLE] if any(run.selection == "target_oracle" for run in runs) else []
    notes += [f"The last {MAX_RUNS:,} of {len(runs):,} runs."] if len(runs) > MAX_RUNS else []
    n_left = sum(run.key not in shown for run in runs)
    if n_left:
        notes.append(f"{n_left:,} runs are in no table above: their settings are no grid's, under any preset.")
    scored = ("score, %", "n", "class mean, %", *(f"{part}, %" for part in PARTS), "minutes")
    columns = ("stage", "row", "shift", "seed", "rule", *scored, "device", "code", "settings", "in a table")
    return PageTable("all-runs", "All runs, oldest first", columns, rows, notes)
