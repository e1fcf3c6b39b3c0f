"""Draws progress on a terminal: a bar with rate and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from echoshift.cli.terminal import format_rate


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Show how many steps end in a second, or in a minute."""
        return Text(format_rate(task.finished_speed or task.speed or 0))


class BarProgress:
    """Shows a stretch of work as a bar on stderr."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._what = ""

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of work of n_total steps."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._what = what
        self._task = self._bar.add_task(what, total=n_total)

    def describe(self, what: str) -> None:
        """Describe how the work under way goes, in place of what it was begun as."""
        self._what = what
        if self._task is not None:
            self._bar.update(self._task, description=what)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count steps done; a note stands behind what the work was begun as."""
        if self._task is not None:
            self._bar.update(self._task, advance=n, description=f"{self._what}, {note}" if note else None)


@contextmanager
def draw_bar() -> Iterator[BarProgress]:
    """Draw a bar while the block runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(), Elapsed())
    with Progress(*columns, Remaining(), console=Console(stderr=True)) as bar:
        yield BarProgress(bar)
