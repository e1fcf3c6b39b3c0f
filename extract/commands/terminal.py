"""Prints tables, progress and notices: drawn on a terminal, plain lines elsewhere, nothing where quiet is wanted.

Answers go to stdout, everything else to stderr. Plain is what isn't a terminal, calls itself dumb, or says NO_COLOR.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Protocol, TextIO

import typer

PLAIN_INTERVAL_S = 10.0
SILENCE_S, LONGEST_SILENCE_S = 30.0, 600.0

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices: result and errors only.")]


class Progress(Protocol):
    """Shows how far work is."""

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of work of n_total steps."""
        ...

    def describe(self, what: str) -> None:
        """Says how the work under way goes."""
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts steps done; `note` is how they went, to be said beside their number and not in a line of its own."""
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
    """Writes a line on stderr when work begins, every ten seconds, and at once what is described."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._what, self._n_total, self._n_done, self._n_lines = "", 0, 0, 0
        self._started = self._last_line = time.monotonic()

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of work of n_total steps, and says so."""
        self._what, self._n_total, self._n_done = what, n_total, 0
        self._started = self._last_line = time.monotonic()
        self._say(f"{what}: {self._count_done()}" if n_total else what)

    def describe(self, what: str) -> None:
        """Says how the work under way goes, in a line of its own."""
        self._what = what
        self._last_line = time.monotonic()
        self._say(what)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts steps done; how many there are may be unknown, and then no end is foretold."""
        self._n_done += n
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_S:
            return
        self._last_line = now
        rate = self._n_done / (now - self._started)
        line = f"{self._what}: {self._count_done()}, {rate:.1f}/s"
        left_s = max(0.0, (self._n_total - self._n_done) / rate) if rate else 0.0
        line = f"{line}, {left_s:.0f} s left" if self._n_total else line
        self._say(f"{line}, {note}" if note else line)

    def break_silence(self, ended: threading.Event, silence_s: float = SILENCE_S) -> None:
        """Says that work goes on wherever a whole wait of silence_s brought no line; each such wait doubles the next.

        Returns when `ended` is set; it is for a thread of its own, because a step that takes long says nothing.
        """
        wait_s, n_lines = silence_s, self._n_lines
        while not ended.wait(wait_s):
            is_silent = n_lines == self._n_lines and 0 < self._n_total > self._n_done
            wait_s = min(2 * wait_s, max(silence_s, LONGEST_SILENCE_S)) if is_silent else silence_s
            if is_silent:
                passed_s = time.monotonic() - self._started
                print(f"{self._what}: still at {self._count_done()}, {passed_s:.0f} s", file=sys.stderr, flush=True)
            n_lines = self._n_lines

    def _count_done(self) -> str:
        of = f"/{self._n_total}" if self._n_total else ""
        return f"{self._n_done}{of} {self._unit}"

    def _say(self, line: str) -> None:
        self._n_lines += 1
        print(line, file=sys.stderr, flush=True)


class SilentProgress:
    """Shows nothing."""

    def start(self, what: str, n_total: int) -> None:
        """Shows nothing."""

    def describe(self, what: str) -> None:
        """Shows nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Shows nothing."""


@contextmanager
def show_progress(unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Shows progress on stderr while the block runs; nothing when quiet."""
    if quiet:
        yield SilentProgress()
    elif is_plain(sys.stderr):
        plain, ended = PlainProgress(unit), threading.Event()
        threading.Thread(target=plain.break_silence, args=(ended,), name="progress", daemon=True).start()
        try:
            yield plain
        finally:
            ended.set()
    else:
        from extract.commands.progress_bars import draw_bar

        with draw_bar() as progress:
            yield progress


def make_notifier(*, quiet: bool) -> Callable[[str], None]:
    """Makes what tells the user something beside the answer: a line on stderr, nothing when quiet."""
    return (lambda message: None) if quiet else (lambda message: typer.echo(message, err=True))
