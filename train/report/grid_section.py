"""Makes the page's section on results: the table of every grid, what classes score, confusion, and all runs."""

from __future__ import annotations

from collections.abc import Sequence

from echoshift.pipeline.cards import DatasetCard
from echoshift.train.report.blocks import (
    Bar,
    BarsBlock,
    Block,
    Cell,
    ChoiceBlock,
    Column,
    ConfusionBlock,
    DetailsBlock,
    HeadingBlock,
    MissingBlock,
    Section,
    TableBlock,
    TextBlock,
    count,
    number,
    percent,
)
from echoshift.train.report.breakdowns import PARTS, Breakdown, ClassBar, LooseRuns
from echoshift.train.report.grid_facts import MAX_BREAKDOWNS, GridFacts, GridsFacts
from echoshift.train.runs import RunKey, RunRecord
from echoshift.train.tables import Table, TableRow, lay_out

TEXT = False  # of a column: it holds no numbers
MAX_RUNS = 2000


def make_grid_section(facts: GridsFacts, runs: Sequence[RunRecord], card: DatasetCard) -> Section:
    """Make the section; `runs` are the latest of each configuration, shift, seed and rule."""
    blocks: list[Block] = []
    whole = [grid for grid in facts.done if grid.n_rows_done == len(grid.table.rows)]
    for i, grid in enumerate(whole):
        blocks += _make_grid_blocks(i, grid)
    partial = [grid for grid in facts.done if grid.n_rows_done < len(grid.table.rows)]
    if partial:
        inner = tuple(
            DetailsBlock(
                f"{grid.table.title}: {grid.name} ({grid.n_rows_done} of {len(grid.table.rows)} rows, "
                f"preset {grid.preset}, rule {grid.selection})",
                tuple(_make_grid_blocks(i, grid)[1:]),
            )
            for i, grid in enumerate(partial, start=len(whole))
        )
        blocks.append(DetailsBlock(f"{len(partial)} tables of which some rows have runs", inner, is_open=not whole))
    if not facts.done:
        name = "a-table2" if card.task == "single-label" else "a-table3"
        text = "No grid has a run yet." if not runs else "The runs there are belong to no grid with these settings."
        blocks.append(MissingBlock(text, f"make ablate GRID={name} DATASET={card.name}"))
    blocks += _make_loose_blocks(facts)
    if facts.without_runs:
        rows = tuple(
            (Cell(name), Cell(title), Cell(f"make ablate GRID={name} DATASET={card.name}"))
            for name, title in facts.without_runs
        )
        columns = (Column("grid", TEXT), Column("what it compares", TEXT), Column("command", TEXT))
        table = TableBlock("grids-without-runs", "Grids of this dataset's task without a run", columns, rows)
        blocks.append(DetailsBlock(f"{len(rows)} grids have no run yet", (table,)))
    lead = "" if not facts.done else "Each table is what `echoshift table` prints, with its intervals and its notes."
    return Section("results", "Results", lead, tuple(blocks))


def make_run_section(runs: Sequence[RunRecord], shown: frozenset[RunKey], dataset: str) -> Section:
    """Make the section that lists every run, whatever grid it is of; the last MAX_RUNS of them."""
    if not runs:
        missing = MissingBlock("No run has come to its end yet.", f"make stage1 DATASET={dataset}")
        return Section("runs", "All runs", "", (missing,))
    columns = (
        Column("stage", TEXT),
        Column("row", TEXT),
        Column("shift", TEXT),
        Column("seed"),
        Column("rule", TEXT),
        *map(
            Column, ("score, %", "n", "class mean, %", "silent, %", "audible, %", "rare, %", "frequent, %", "minutes")
        ),
        Column("device", TEXT),
        Column("code", TEXT),
        Column("settings", TEXT),
        Column("in a table", TEXT),
    )
    rows = []
    for run in runs[-MAX_RUNS:]:
        scores = run.scores
        parts = (scores.class_mean or scores.map_present, scores.silent, scores.audible, scores.rare, scores.frequent)
        rows.append(
            (
                Cell(run.stage),
                Cell(run.row or "–"),
                Cell(run.shift),
                count(run.seed),
                Cell(run.selection),
                percent(scores.main.value),
                count(scores.n),
                *(percent(part.value if part else None) for part in parts),
                number(run.duration_s / 60),
                Cell(run.device),
                Cell(run.code_version),
                Cell(run.config_hash),
                Cell("yes" if run.key in shown else "no"),
            )
        )
    metric = "mean average precision" if runs[0].scores.task == "multi-label" else "top-1 accuracy"
    notes = [f"Score: {metric} on the target's test split."]
    if any(run.selection == "target_oracle" for run in runs):
        notes.append("The rule target_oracle sees the target's test labels: an upper bound, no result.")
    if len(runs) > MAX_RUNS:
        notes.append(f"The last {MAX_RUNS:,} of {len(runs):,} runs.")
    n_left = sum(run.key not in shown for run in runs)
    if n_left:
        notes.append(f"{n_left:,} runs are in no table above: their settings are no grid's, under any preset.")
    table = TableBlock("all-runs", "All runs, oldest first", columns, tuple(rows), tuple(notes))
    return Section("runs", "All runs", f"{len(runs):,} results in results.jsonl.", (table,))


def _make_grid_blocks(i: int, grid: GridFacts) -> list[Block]:
    table = grid.table
    chosen = [f"preset {grid.preset}"] if grid.preset else []
    heading = f"{table.title}: {grid.name}"
    how = " and ".join([*chosen, f"rule {grid.selection}"])
    words = f"Under {how}. Whatever is missing is run by `{grid.command}`."
    blocks: list[Block] = [HeadingBlock(heading, f"grid-{i}"), TextBlock(words, "quiet")]
    blocks.append(make_score_bars(table))
    blocks.append(_make_table_block(f"grid-table-{i}", table, grid))
    panels = []
    for breakdown in grid.breakdowns:
        panels.append((f"{breakdown.row}, {breakdown.shift}", _make_breakdown(breakdown, grid.name)))
    if panels:
        blocks.append(ChoiceBlock(f"choice-{i}", "Class by class: row and shift", tuple(panels)))
    if grid.n_breakdowns > len(grid.breakdowns):
        text = f"The first {len(grid.breakdowns)} of {grid.n_breakdowns} rows and shifts can be chosen."
        blocks.append(TextBlock(text, "quiet"))
    return blocks


def _make_loose_blocks(facts: GridsFacts) -> list[Block]:
    """Show runs that are in no table: a line each configuration and shift, and the same breakdowns."""
    if not facts.loose:
        return []
    text = (
        "Runs made with settings of their own (`--set`, `--config`) are in no table above; give the report the same, "
        "and their grid's table is here."
    )
    panels = tuple(
        (
            f"{loose.breakdown.row}, {loose.breakdown.shift}, {loose.stage}, {loose.selection}, {loose.config_hash}",
            _make_breakdown(loose.breakdown, f"{loose.stage}, {loose.selection}, {loose.config_hash}"),
        )
        for loose in facts.loose[:MAX_BREAKDOWNS]
    )
    blocks: list[Block] = [
        HeadingBlock("Runs outside the grids", "loose-runs"),
        TextBlock(text, "quiet"),
        _make_loose_table(facts.loose, facts.n_other_manifest),
        ChoiceBlock("choice-loose", "Class by class: row, shift, stage, rule, settings", panels),
    ]
    if len(facts.loose) > MAX_BREAKDOWNS:
        blocks.append(TextBlock(f"The first {MAX_BREAKDOWNS} of {len(facts.loose)} can be chosen.", "quiet"))
    return blocks


def _make_loose_table(found: Sequence[LooseRuns], n_other_manifest: int) -> TableBlock:
    names = ("row", "stage", "shift", "rule", "settings")
    numbers = ("score, %", "± half width", "seeds", "silent, %", "audible, %", "rare, %", "frequent, %")
    rows = []
    for loose in found:
        parts = {part.name: part.mean for part in loose.breakdown.parts}
        interval = loose.interval
        rows.append(
            (
                Cell(loose.breakdown.row),
                Cell(loose.stage),
                Cell(loose.breakdown.shift),
                Cell(loose.selection),
                Cell(loose.config_hash),
                number(interval.mean if interval else None),
                number(interval.half_width if interval else None),
                count(len(loose.breakdown.seeds)),
                *(number(parts.get(part)) for part in PARTS),
            )
        )
    notes = ["Mean over seeds, and half width of the 95 % t-interval; one seed has none."]
    if any(loose.selection == "target_oracle" for loose in found):
        notes.append("The rule target_oracle sees the target's test labels: an upper bound, no result.")
    if n_other_manifest:
        notes.append(f"Runs on another manifest that are left out: {n_other_manifest:,}.")
    columns = (*(Column(name, TEXT) for name in names), *map(Column, numbers))
    return TableBlock("loose", "By configuration and shift, over seeds", columns, tuple(rows), tuple(notes))


def make_score_bars(table: Table) -> BarsBlock:
    """Make bars of a table's main column: the mean over shifts, or the one shift; spans are the intervals."""
    column = "mean" if "mean" in table.columns else table.columns[0]
    bars = []
    for row in table.rows:
        interval = row.cells[column].interval
        if interval is None:
            bars.append(Bar(row.name, None, None, None, "no run"))
            continue
        half = interval.half_width
        low, high = (None, None) if half is None else (max(interval.mean - half, 0), min(interval.mean + half, 100))
        spread = "" if half is None else f" ±{half:.1f}"
        bars.append(Bar(row.name, interval.mean, low, high, f"{interval.mean:.1f}{spread}"))
    return BarsBlock(
        f"{column}, % on the target's test split; the thin line is the 95 % interval over seeds", tuple(bars)
    )


def _make_table_block(id_: str, table: Table, grid: GridFacts) -> TableBlock:
    header, lines = lay_out(table)
    rows = tuple(
        tuple(
            Cell(words, _find_value(table, row, name)) if j else Cell(words)
            for j, (name, words) in enumerate(zip(header, line, strict=True))
        )
        for row, line in zip(table.rows, lines, strict=True)
    )
    notes = list(table.notes)
    if grid.missing_shifts:
        notes.append(f"No run yet in {', '.join(grid.missing_shifts)}.")
    columns = (Column(header[0], TEXT), *map(Column, header[1:]))
    return TableBlock(id_, f"{table.title} ({grid.name}, {grid.selection})", columns, rows, tuple(notes))


def _find_value(table: Table, row: TableRow, column: str) -> float | None:
    """Find the number that a cell is sorted by, in full precision."""
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


def _make_breakdown(breakdown: Breakdown, whose: str) -> tuple[Block, ...]:
    n = len(breakdown.seeds)
    over = f"mean of {n} seeds, the thin line from the lowest to the highest" if n > 1 else f"seed {breakdown.seeds[0]}"
    blocks: list[Block] = [BarsBlock(f"By class, %, and test segments: {over}", _make_bars(breakdown.classes, n))]
    if len(breakdown.classes) < breakdown.n_classes:
        text = f"The {len(breakdown.classes)} of {breakdown.n_classes} classes with the most test segments are shown."
        blocks.append(TextBlock(text, "quiet"))
    if breakdown.confusion is not None:
        summed = f", summed over {n} seeds" if n > 1 else ""
        caption = f"Confusion of {breakdown.row}, {breakdown.shift} ({whose}): test segments{summed}"
        blocks.append(ConfusionBlock(caption, breakdown.confused, breakdown.confusion))
    else:
        text = "There is no confusion matrix: segments have several labels, or the score is a mean of networks'."
        blocks.append(TextBlock(text, "quiet"))
    if breakdown.parts:
        bars = _make_bars(breakdown.parts, n)
        blocks.append(BarsBlock("By part of the test set, %, and its test segments", bars))
    return tuple(blocks)


def _make_bars(found: Sequence[ClassBar], n_seeds: int) -> tuple[Bar, ...]:
    bars = []
    for part in found:
        words = f"– ({part.n:,})" if part.mean is None else f"{part.mean:.1f} ({part.n:,})"
        low, high = (part.low, part.high) if n_seeds > 1 else (None, None)
        bars.append(Bar(part.name, part.mean, low, high, words))
    return tuple(bars)
