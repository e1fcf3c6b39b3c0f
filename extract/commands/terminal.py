"""Prints tables, progress and notices: drawn on a terminal, plain lines elsewhere, nothing where quiet is wanted.

Answers go to stdout, everything else to stderr. Plain is what isn't a terminal, calls itself dumb, or says NO_COLOR.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Protocol, TextIO

import typer

PLAIN_INTERVAL_S = 10.0

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices: result and errors only.")]


class Progress(Protocol):
    """Shows how far work is."""

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of work of n_total steps."""
        ...

    def describe(self, what: str) -> None:
        """Says how the work under way goes."""
        ...

    def advance(self, n: int = 1) -> None:
        """Counts steps done."""
        ...


def is_plain(stream: TextIO) -> bool:
    """Says whether a stream gets plain text: no frames, no colours, no bars."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not stream.isatty()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table: drawn on a terminal, elsewhere plain columns of which no text is cut or folded."""
    lines = [[str(cell) for cell in row] for row in rows]
    right = [bool(lines) and all(re.fullmatch(r"[\d.,%+-]+", line[i]) for line in lines) for i in range(len(columns))]
    if is_plain(sys.stdout):
        widths = [max(map(len, (column, *(line[i] for line in lines)))) for i, column in enumerate(columns)]
        print(title)
        for line in (list(columns), *lines):
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
            print("  ".join(cells).rstrip())
        return
    from extract.commands.drawn_tables import draw_table

    draw_table(title, columns, lines, right)


class PlainProgress:
    """Writes a line on stderr every ten seconds, and at once what is described."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._what, self._n_total, self._n_done = "", 0, 0
        self._started = self._last_line = time.monotonic()

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of work of n_total steps."""
        self._what, self._n_total, self._n_done = what, n_total, 0
        self._started = self._last_line = time.monotonic()

    def describe(self, what: str) -> None:
        """Says how the work under way goes, in a line of its own."""
        self._what = what
        self._last_line = time.monotonic()
        print(what, file=sys.stderr, flush=True)

    def advance(self, n: int = 1) -> None:
        """Counts steps done; how many there are may be unknown, and then no end is foretold."""
        self._n_done += n
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_S:
            return
        self._last_line = now
        rate = self._n_done / (now - self._started)
        of = f"/{self._n_total}" if self._n_total else ""
        line = f"{self._what}: {self._n_done}{of} {self._unit}, {rate:.1f}/s"
        left_s = max(0.0, (self._n_total - self._n_done) / rate) if rate else 0.0
        print(f"{line}, {left_s:.0f} s left" if self._n_total else line, file=sys.stderr, flush=True)


class SilentProgress:
    """Shows nothing."""

    def start(self, what: str, n_total: int) -> None:
        """Shows nothing."""

    def describe(self, what: str) -> None:
        """Shows nothing."""

    def advance(self, n: int = 1) -> None:
        """Shows nothing."""


@contextmanager
def show_progress(unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Shows progress on stderr while the block runs; nothing when quiet."""
    if quiet:
        yield SilentProgress()
    elif is_plain(sys.stderr):
        yield PlainProgress(unit)
    else:
        from extract.commands.progress_bars import draw_bar

        with draw_bar() as progress:
            yield progress


def make_notifier(*, quiet: bool) -> Callable[[str], None]:
    """Makes what tells the user something beside the answer: a line on stderr, nothing when quiet."""
    return (lambda message: None) if quiet else (lambda message: typer.echo(message, err=True))
