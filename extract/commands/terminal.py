"""Prints tables and progress: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table: framed on a terminal, elsewhere plain columns of which no text is cut or folded."""
    lines = [[str(cell) for cell in row] for row in rows]
    right = [bool(lines) and all(re.fullmatch(r"[\d.,%+-]+", line[i]) for line in lines) for i in range(len(columns))]
    console = Console()
    if not console.is_terminal:
        widths = [max(map(len, (column, *(line[i] for line in lines)))) for i, column in enumerate(columns)]
        print(title)
        for line in (list(columns), *lines):
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
            print("  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for column, numeric in zip(columns, right, strict=True):
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Shows steps per second."""
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s")


class TerminalProgress:
    """Shows a bar with rate and time left on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._is_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            Elapsed(),
            Remaining(),
            console=Console(stderr=True),
            disable=not self._is_terminal,
        )
        self._task: TaskID | None = None
        self._what, self._n_total, self._n_done = "", 0, 0
        self._started = self._last_line = time.monotonic()

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of work of n_total steps."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=n_total)
        self._what, self._n_total, self._n_done = what, n_total, 0
        self._started = self._last_line = time.monotonic()

    def describe(self, what: str) -> None:
        """Says how the work under way goes, in place of what it was begun as; elsewhere it is a line of its own."""
        self._what = what
        if self._task is not None:
            self._bar.update(self._task, description=what)
        if not self._is_terminal:
            self._last_line = time.monotonic()
            print(what, file=sys.stderr, flush=True)

    def advance(self, n: int = 1) -> None:
        """Counts steps done."""
        self._n_done += n
        if self._task is not None:
            self._bar.advance(self._task, n)
        now = time.monotonic()
        if not self._is_terminal and now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            rate = self._n_done / (now - self._started)
            left_s = (self._n_total - self._n_done) / rate
            print(
                f"{self._what}: {self._n_done}/{self._n_total} {self._unit}, {rate:.1f}/s, {left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def show_progress(unit: str) -> Iterator[TerminalProgress]:
    """Shows progress while the block runs."""
    progress = TerminalProgress(unit)
    with progress._bar:
        yield progress
