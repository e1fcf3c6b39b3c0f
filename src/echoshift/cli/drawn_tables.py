"""Draws tables on a terminal: framed where their words fit, else row by row, so that no name is broken into pieces."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def draw_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """Draw a table on stdout; `right` says which columns are numbers. Text is no markup, whatever brackets it has."""
    console = Console()
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for column, is_number in zip(columns, right, strict=True):
        table.add_column(Text(column), justify="right" if is_number else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    # The minimum is what the longest word of each column asks for: lines may break between words, not within.
    if table.__rich_measure__(console, console.options.update(max_width=10_000)).minimum <= console.width:
        console.print(table)
    else:
        _draw_rows(console, title, columns, lines)


def _draw_rows(console: Console, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Draw each row as a block with a line a column; the terminal itself wraps what is longer than it."""
    width = max(map(len, columns))
    console.print(Text(title, style="bold"))
    for number, line in enumerate(lines):
        if number:
            console.print()
        for column, cell in zip(columns, line, strict=True):
            console.print(Text.assemble(("  " + column.ljust(width), "dim"), "  ", cell), soft_wrap=True)
