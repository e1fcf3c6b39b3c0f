"""A grid's table: rows times shifts and their mean, intervals, paired tests, notes; as text, Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from echoshift.pipeline.cards import DatasetCard, PublishedNumber
from echoshift.pipeline.errors import RunError
from echoshift.train.grids import ColumnGroup, Grid, PlannedRun, list_shifts
from echoshift.train.runs import RunRecord, keep_latest
from echoshift.train.scores import (
    MeanInterval,
    PairedTest,
    PairKey,
    Score,
    SegmentTest,
    compare_pairs,
    compare_segments,
    compute_interval,
    read_hits,
)
from echoshift.train.stage2.config import SelectionRule

MEAN = "mean"
PERCENT = 100.0
NO_BENCHMARK = "The dataset is synthetic: these numbers are no benchmark."
_METRICS = {
    "single-label": "Top-1 accuracy in %",
    "multi-label": "Mean average precision in %, a class without positives counting 0",
}
_PARTS: dict[ColumnGroup, tuple[str, str]] = {"silent": ("silent", "audible"), "rare": ("rare", "frequent")}
_NOTHING = "-"
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_CSV_FIELDS = ("dataset", "row", "column", "value", "half_width", "n", "n_planned", "p_value", "published", "note")


@dataclass(frozen=True, slots=True)
class TableCell:
    """Mean over seeds in percent, None if no seed is done, and the number of seeds that the grid plans.

    A cell over several shifts averages, over the seeds in which all shifts are done, the mean over shifts.
    """

    interval: MeanInterval | None
    n_planned: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row; cells and published numbers (percent) are by column.

    `difference` (points) and `segments` test it against the baseline; None for the baseline itself, and where nothing
    can be compared.
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
    """Results of a grid.

    Attributes:
        title: the grid's, with the dataset's name.
        dataset, is_synthetic: of the card; numbers on a synthetic dataset are no benchmark.
        columns: shifts, `mean` if there are several, then `silent`, `audible`, `rare`, `frequent` on request.
        baseline: the row that the others are compared with, "" for none.
        rows: in the grid's order.
        notes: sentences to show below the table.
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
    """Make the table of a grid's planned runs from records, oldest first; notes name what is missing.

    The last record of the same configuration, shift, seed and selection rule counts for a planned run; with
    `manifest_sha256`, only records of that manifest. `columns` replaces the grid's.
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
            cells[part] = _average_over_shifts(_take_part(used[name], part), shifts, n_seeds)
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
        notes=_write_notes(
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
    """Tell whether a run trains on the target's own labels: an oracle, or supervised."""
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


def _take_part(runs: RowRuns, part: str) -> dict[PairKey, float | None]:
    """Return the score on a part of the test set of each run in percent, None if it has no segments there."""
    scores: dict[PairKey, Score | None] = {pair: getattr(record.scores, part) for pair, record in runs.items()}
    return {
        pair: None if score is None or score.value is None else score.value * PERCENT for pair, score in scores.items()
    }


def _average_over_shifts(
    values: Mapping[PairKey, float | None] | Mapping[PairKey, float], shifts: Sequence[str], n_planned: int
) -> TableCell:
    """Average over seeds the mean over shifts, leaving out shifts without such segments."""
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
        return None  # a single test segment cannot be resampled
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


def average_hits(
    planned: Sequence[PlannedRun],
    records: Iterable[RunRecord],
    runs_dir: Path,
    *,
    selection: SelectionRule = "last",
    manifest_sha256: str | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Return, by row and shift, each test segment's share of seeds in which it is right, float64 [n].

    Rows with missing runs or hits (multi-label, deleted steps), or whose seeds have different test segments, are left
    out and get no test over segments.
    """
    latest = keep_latest(records)
    hits: dict[str, dict[str, np.ndarray]] = {}
    for row in dict.fromkeys(run.row for run in planned):
        found: dict[str, list[tuple[list[str], np.ndarray]]] = {}
        for run in (run for run in planned if run.row == row):
            record = latest.get((run.stage, run.config_hash, run.shift, run.seed, selection))
            if record is None or "scores" not in record.steps or manifest_sha256 not in (None, record.manifest_sha256):
                break
            of_run = read_hits(runs_dir / "steps" / f"scores-{record.steps['scores']}")
            if of_run is None:
                break
            found.setdefault(run.shift, []).append(of_run)
        else:
            means = _average(found)
            if means is not None:
                hits[row] = means
    return hits


def _average(found: Mapping[str, list[tuple[list[str], np.ndarray]]]) -> dict[str, np.ndarray] | None:
    means = {}
    for shift, runs in found.items():
        if any(ids != runs[0][0] for ids, _ in runs):
            return None
        means[shift] = np.mean([is_right for _, is_right in runs], axis=0)
    return means


def _write_notes(
    *,
    card: DatasetCard,
    records: Sequence[RunRecord],
    missing: Mapping[str, tuple[int, int]],
    n_other_manifest: int,
    baseline: str,
    has_segment_tests: bool,
    parts: Sequence[str],
    published: Sequence[PublishedNumber],
    selection: SelectionRule,
    with_target_labels: Sequence[str] = (),
    warned: Mapping[str, Mapping[tuple[str, int], RunRecord]] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Return a table's notes, each a sentence or two.

    `missing` maps a row to its numbers of runs done and planned, `warned` to its runs with warnings by shift and seed.
    """
    notes = [NO_BENCHMARK] if card.synthetic else []
    notes.append(
        f"{_METRICS[card.task]} on the target's test split: mean ± half width of the 95 % t-interval (n seeds); one "
        f"seed has no interval. Weights by the rule `{selection}`."
    )
    if selection == "target_oracle":
        notes.append("The rule `target_oracle` sees the target's test labels: an upper bound, no result.")
    if selection == "mean_last":
        notes.append("The rule `mean_last`: each run's score is the mean over its last checkpoints.")
    for row in with_target_labels:
        notes.append(f"Row {row!r} is trained on the target's own labels: an upper bound, no result.")
    if baseline:
        notes.append(
            f"Difference to {baseline!r} in points over (shift, seed) pairs: mean ± half width (n pairs), and p of the "
            f"paired t-test."
        )
    if has_segment_tests:
        notes.append("p (segments): paired bootstrap over test segments, the trained networks given.")
    notes.extend(_describe_part(part, records, card) for part in parts)
    for number in {number.note: number for number in published}.values():
        setting = f" ({number.note})" if number.note else ""
        notes.append(f"Published: {number.paper}, {number.table}{setting}; theirs, not measured here.")
    for row, (n_done, n_planned) in missing.items():
        notes.append(f"Row {row!r} is not whole: {n_done} of {n_planned} runs are done.")
    for row, runs in warned.items():
        (shift, seed), record = next(iter(runs.items()))
        notes.append(
            f"Row {row!r}: {len(runs)} of its runs ended with a warning, such as {shift}, seed {seed}: "
            f"{record.warnings[0]}."
        )
    if n_other_manifest:
        notes.append(f"Runs on another manifest that are left out: {n_other_manifest}.")
    for what, values in (
        ("manifests", {record.manifest_sha256[:12] for record in records}),
        ("versions of the code", {record.code_version for record in records}),
        ("devices", {record.device for record in records}),
    ):
        if len(values) > 1:
            notes.append(f"The runs are of {len(values)} {what}: {', '.join(sorted(values))}.")
    return tuple(notes)


def _describe_part(part: str, records: Sequence[RunRecord], card: DatasetCard) -> str:
    """Describe a part of the test set, with its number of segments (or classes) summed over shifts."""
    by_shift = {record.shift: record.scores for record in records}
    scores = [getattr(of_shift, part) for of_shift in by_shift.values()]
    counted = [score for score in scores if score is not None]
    if not counted:
        return f"{part.capitalize()}: no run says."
    n_total = sum(of_shift.n for of_shift in by_shift.values())
    if part in ("silent", "audible"):
        meaning = f"test segments {'without' if part == 'silent' else 'with'} sound"
    else:
        of = " or ".join(sorted({s.binned_by for s in by_shift.values() if s.binned_by is not None}))
        what = "class and noun" if of == "pair" else "class" if of == "class" else "class, with noun where known,"
        seen = "at most 10" if part == "rare" else "more than 10"
        meaning = f"{what} seen {seen} times in the source"
    if card.task == "multi-label":
        meaning += ", over the classes that have positives there"
    if part in ("rare", "frequent") and card.task == "multi-label":
        n_classes = sum(score.n_classes or 0 for score in counted)
        return f"{part.capitalize()}: {meaning}; {n_classes} classes, summed over shifts."
    return f"{part.capitalize()}: {meaning}; {sum(s.n for s in counted)} of {n_total} test segments."


def lay_out(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table as text.

    A number is followed by its interval's half width and, in brackets, its n, or `n of N` if runs are missing.
    Published numbers have their own column after the one that they belong to.
    """
    published = [column for column in table.columns if any(column in row.published for row in table.rows)]
    has_differences = any(row.difference for row in table.rows)
    has_segments = any(row.segments for row in table.rows)
    header = ["row"]
    for column in table.columns:
        header += [column, f"{column}, published"] if column in published else [column]
    header += [f"difference to {table.baseline}", "p"] if has_differences else []
    header += ["p (segments)"] if has_segments else []
    lines = []
    for row in table.rows:
        words = [row.name]
        for column in table.columns:
            words.append(_format_cell(row.cells[column]))
            if column in published:
                words.append(f"{row.published[column]:.1f}" if column in row.published else _NOTHING)
        if has_differences:
            words += _format_difference(row.difference)
        if has_segments:
            words.append(_format_p(row.segments.p_value) if row.segments else _NOTHING)
        lines.append(words)
    return header, lines


def format_markdown(table: Table) -> str:
    """Format a table as Markdown: title, table, notes as a list."""
    header, lines = lay_out(table)
    rows = ["| " + " | ".join(word.replace("|", r"\|") for word in words) + " |" for words in (header, *lines)]
    rows.insert(1, "|---|" + "---:|" * (len(header) - 1))
    return "\n".join([f"**{table.title}**", "", *rows, "", *(f"- {note}" for note in table.notes)]) + "\n"


def format_csv(table: Table) -> str:
    """Format a table as CSV, one line a number, in percent and points, without rounding beyond 6 digits.

    `n` counts seeds, for differences (shift, seed) pairs or test segments; `n_planned` is how many the grid asks for.
    The half width over segments is half of the bootstrap interval, which need not be symmetric.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        for fields in _list_numbers(table, row):
            note = NO_BENCHMARK if table.is_synthetic else ""
            writer.writerow({"dataset": table.dataset, "row": row.name, **fields, "note": note})
    return text.getvalue()


def format_latex(table: Table) -> str:
    """Format a table as a LaTeX tabular with booktabs rules; the notes follow as comments."""
    header, lines = lay_out(table)
    rows = [" & ".join(_escape_latex(word) for word in words) + r" \\" for words in (header, *lines)]
    body = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    columns = "l" + "r" * (len(header) - 1)
    comments = [f"% {line}" for line in (table.title, *table.notes)]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", *comments]) + "\n"


def _list_numbers(table: Table, row: TableRow) -> list[dict[str, object]]:
    numbers: list[dict[str, object]] = []
    for column in table.columns:
        cell = row.cells[column]
        published = row.published.get(column, "")
        numbers.append({"column": column, **_list_interval(cell.interval), "n_planned": cell.n_planned})
        numbers[-1]["published"] = published
    if row.difference is not None:
        test = row.difference
        interval = _list_interval(MeanInterval(test.difference, test.half_width, test.n))
        p_value = "" if test.p_value is None else f"{test.p_value:.6g}"
        column = f"difference to {table.baseline}"
        numbers.append({"column": column, **interval, "n_planned": row.n_planned, "p_value": p_value})
    if row.segments is not None:
        fields = {"value": f"{row.segments.difference:.6g}", "n": row.segments.n, "p_value": row.segments.p_value}
        half_width = (row.segments.high - row.segments.low) / 2
        numbers.append({"column": "difference over segments", "half_width": f"{half_width:.6g}", **fields})
    return numbers


def _list_interval(interval: MeanInterval | None) -> dict[str, object]:
    if interval is None:
        return {"value": "", "half_width": "", "n": 0}
    half_width = "" if interval.half_width is None else f"{interval.half_width:.6g}"
    return {"value": f"{interval.mean:.6g}", "half_width": half_width, "n": interval.n}


def _format_cell(cell: TableCell) -> str:
    n = cell.interval.n if cell.interval else 0
    of = f"{n} of {cell.n_planned}" if n < cell.n_planned else f"{n}"
    if cell.interval is None:
        return f"{_NOTHING} ({of})"
    spread = "" if cell.interval.half_width is None else f" ±{cell.interval.half_width:.1f}"
    return f"{cell.interval.mean:.1f}{spread} ({of})"


def _format_difference(test: PairedTest | None) -> list[str]:
    if test is None:
        return [_NOTHING, _NOTHING]
    spread = "" if test.half_width is None else f" ±{test.half_width:.1f}"
    return [f"{test.difference:+.1f}{spread} ({test.n})", _NOTHING if test.p_value is None else _format_p(test.p_value)]


def _format_p(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _escape_latex(text: str) -> str:
    return re.sub(r"[\\~^±&%$#_{}]", lambda match: _LATEX.get(match[0], f"\\{match[0]}"), text)
