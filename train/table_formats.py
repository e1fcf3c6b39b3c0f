"""Writes a table as text: columns and rows of words, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re

from echoshift.train.intervals import MeanInterval, PairedTest
from echoshift.train.table_notes import NO_BENCHMARK
from echoshift.train.tables import Table, TableCell, TableRow

_NOTHING = "-"
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_CSV_FIELDS = ("dataset", "row", "column", "value", "half_width", "n", "n_planned", "p_value", "published", "note")


def lay_out(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the header's words and those of each row.

    A number is followed by its interval's half width and, in brackets, its n, or `n of N` where runs are missing.
    Published numbers have a column of their own behind the one that they belong to.
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
    The half width over segments is half of the bootstrap interval, which needn't lie even about the value.
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
