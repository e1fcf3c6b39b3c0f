"""What commands print: tables, JSON, progress and notices, with rich; plain lines off a terminal.

Answers go to stdout, everything else to stderr. Plain is what isn't a terminal, calls itself dumb, or says NO_COLOR.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol, TextIO

import typer

BEGUN_S, INTERVAL_S, LONGEST_SILENCE_S = 5.0, 10.0, 600.0

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices: result and errors only.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there; numbers unrounded.")
]


def is_plain(stream: TextIO) -> bool:
    """Return whether a stream gets plain text: no frames, no colours, no bars."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not stream.isatty()


def print_json(document: object) -> None:
    """Print a document, indented on a terminal, else in one line; numbers that aren't finite are null."""
    indent = 2 if sys.stdout.isatty() else None
    typer.echo(json.dumps(make_jsonable(document), indent=indent, ensure_ascii=False, allow_nan=False))


def make_jsonable(value: object) -> Any:
    """Turn dataclasses, pydantic models, paths, times, enums and NumPy values into what JSON holds, unrounded.

    Raises TypeError for anything else, so that nothing goes out as its repr.
    """
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, inf_nan_mode="null", fallback=_to_plain)


def _to_plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: framed on a terminal, elsewhere plain columns of which no text is cut or folded."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = is_plain(sys.stdout)
    lines = [[str(cell) for cell in row] for row in rows]
    table = Table(title=None if plain else Text(title), title_justify="left", header_style="" if plain else "bold")
    if plain:
        table.box, table.pad_edge = None, False
        typer.echo(title)
    for i, column in enumerate(columns):
        is_number = bool(lines) and all(re.fullmatch(r"[\d.,%+-]+", line[i]) for line in lines)
        table.add_column(Text(column), justify="right" if is_number else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    if not plain:
        Console().print(table)
        return
    console = Console(width=100_000, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


class Progress(Protocol):
    """How far work is."""

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of work of n_total steps; 0: nobody knows how many."""
        ...

    def describe(self, what: str) -> None:
        """Describe how the work under way goes."""
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count steps done; `note` is how they went, to be said beside their number."""
        ...


class SilentProgress:
    """No progress."""

    def start(self, what: str, n_total: int) -> None:
        """Show nothing."""

    def describe(self, what: str) -> None:
        """Show nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Show nothing."""


class PlainProgress:
    """A line on stderr 5 s after work began, then every 10 s, ever more seldom while no step ends."""

    def __init__(self, unit: str) -> None:
        self._unit, self._ended = unit, threading.Event()
        self.start("", 0)
        self._due = float("inf")
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of work."""
        self._what, self._n_total, self._n_done, self._n_told, self._note = what, n_total, 0, 0, ""
        self._started = time.monotonic()
        self._due, self._silence_s = self._started + BEGUN_S, INTERVAL_S

    def describe(self, what: str) -> None:
        """Describe how the work under way goes, in a line of its own."""
        self._what = what
        print(what, file=sys.stderr, flush=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count steps done."""
        self._n_done, self._note = self._n_done + n, note

    def end(self) -> None:
        """Say nothing more."""
        self._ended.set()
        self._thread.join()

    def tell(self, now: float) -> None:
        """Print a line where one is due."""
        if now < self._due or 0 < self._n_total <= self._n_done:
            return
        self._silence_s = INTERVAL_S if self._n_done > self._n_told else min(2 * self._silence_s, LONGEST_SILENCE_S)
        self._due, self._n_told = now + self._silence_s, self._n_done
        elapsed_s = now - self._started
        rate = self._n_done / elapsed_s
        line = f"{self._what}: {self._n_done}{f'/{self._n_total}' if self._n_total else ''} {self._unit}"
        line += f", {format_rate(rate)}" if rate else f", {elapsed_s:.0f} s"
        if rate and self._n_total:
            line += f", {(self._n_total - self._n_done) / rate:.0f} s left"
        print(f"{line}, {self._note}" if self._note else line, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.tell(time.monotonic())


def format_rate(per_second: float) -> str:
    """Return a rate with its unit: a second, or a minute where it is slow."""
    return f"{60 * per_second:.1f}/min" if 0 < per_second < 0.1 else f"{per_second:.1f}/s"


@contextmanager
def show_progress(unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr while the block runs; nothing when quiet."""
    if quiet:
        yield SilentProgress()
    elif is_plain(sys.stderr):
        plain = PlainProgress(unit)
        try:
            yield plain
        finally:
            plain.end()
    else:
        with _draw_bar() as bar:
            yield bar


@contextmanager
def _draw_bar() -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    class Bar:
        """A bar with rate and time left."""

        def __init__(self) -> None:
            self._what, self._task = "", bar.add_task("", total=None, visible=False, rate="")

        def start(self, what: str, n_total: int) -> None:
            self._what = what
            bar.reset(self._task, description=what, total=n_total or None, visible=True)

        def describe(self, what: str) -> None:
            self._what = what
            bar.update(self._task, description=what)

        def advance(self, n: int = 1, note: str = "") -> None:
            task = bar.tasks[0]
            rate = (task.completed + n) / task.elapsed if task.elapsed else 0.0
            bar.update(
                self._task,
                advance=n,
                rate=format_rate(rate),
                description=f"{self._what}, {note}" if note else self._what,
            )

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield Bar()


def make_notifier(*, quiet: bool) -> Callable[[str], None]:
    """Make what tells the user something beside the answer: a line on stderr, nothing when quiet."""
    return (lambda message: None) if quiet else (lambda message: typer.echo(message, err=True))
