"""Prints tables, progress and notices: drawn on a terminal, plain lines elsewhere, nothing where quiet is wanted.

Answers go to stdout, everything else to stderr. Plain is what isn't a terminal, calls itself dumb, or says NO_COLOR.
"""

from __future__ import annotations

import math
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
BEGUN_S = 5.0  # what is refused or done sooner needs no line to say that it began
SILENCE_S, LONGEST_SILENCE_S = 30.0, 600.0
POLL_S = 1.0

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices: result and errors only.")]


def format_rate(per_second: float) -> str:
    """Return a rate with its unit, of the second, or of the minute where it is slow."""
    return f"{60 * per_second:.1f}/min" if 0 < per_second < 0.1 else f"{per_second:.1f}/s"


class Progress(Protocol):
    """Shows how far work is."""

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of work of n_total steps."""
        ...

    def describe(self, what: str) -> None:
        """Describe how the work under way goes."""
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count steps done; `note` is how they went, to be said beside their number and not in a line of its own."""
        ...


def is_plain(stream: TextIO) -> bool:
    """Return whether a stream gets plain text: no frames, no colours, no bars."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not stream.isatty()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: drawn on a terminal, elsewhere plain columns of which no text is cut or folded."""
    lines = [[str(cell) for cell in row] for row in rows]
    right = [bool(lines) and all(re.fullmatch(r"[\d.,%+-]+", line[i]) for line in lines) for i in range(len(columns))]
    if is_plain(sys.stdout):
        widths = [max(map(len, (column, *(line[i] for line in lines)))) for i, column in enumerate(columns)]
        print(title)
        for line in (list(columns), *lines):
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
            print("  ".join(cells).rstrip())
        return
    from echoshift.cli.drawn_tables import draw_table

    draw_table(title, columns, lines, right)


class PlainProgress:
    """Writes a line on stderr when work has gone on for some seconds, every ten then, and at once what is described."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._what, self._n_total, self._n_done = "", 0, 0
        self._is_told = False  # that this stretch has begun
        self._started = self._last_line = time.monotonic()
        self._due, self._silence_s = math.inf, SILENCE_S  # when a line is due though no step ended

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of work of n_total steps; a line says so when it lasts."""
        self._what, self._n_total, self._n_done, self._is_told = what, n_total, 0, False
        self._started = self._last_line = time.monotonic()
        self._due, self._silence_s = self._started + BEGUN_S, SILENCE_S

    def describe(self, what: str) -> None:
        """Describe how the work under way goes, in a line of its own."""
        self._what = what
        self._say(what, time.monotonic())

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count steps done; how many there are may be unknown, and then no end is foretold."""
        self._n_done += n
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_S:
            return
        rate = self._n_done / (now - self._started)
        line = f"{self._what}: {self._count_done()}, {format_rate(rate)}"
        left_s = max(0.0, (self._n_total - self._n_done) / rate) if rate else 0.0
        line = f"{line}, {left_s:.0f} s left" if self._n_total else line
        self._say(f"{line}, {note}" if note else line, now)

    def tell_silent(self, now: float) -> None:
        """Describe what has begun, BEGUN_S after it did, and where it is when no step ends, ever more seldom."""
        if now < self._due or 0 < self._n_total <= self._n_done:
            return
        if self._is_told:
            line = f"{self._what}: still at {self._count_done()}, {now - self._started:.0f} s"
            silence_s = min(2 * self._silence_s, LONGEST_SILENCE_S)
        else:
            line, silence_s = f"{self._what}: {self._count_done()}", SILENCE_S
        last_line = self._last_line
        self._say(line, now)
        self._last_line, self._due, self._silence_s = last_line, now + silence_s, silence_s

    def watch_silence(self, ended: threading.Event) -> None:
        """Call tell_silent now and then until `ended` is set: in a thread, because a step that lasts tells nothing."""
        while not ended.wait(POLL_S):
            self.tell_silent(time.monotonic())

    def _count_done(self) -> str:
        of = f"/{self._n_total}" if self._n_total else ""
        return f"{self._n_done}{of} {self._unit}"

    def _say(self, line: str, now: float) -> None:
        self._last_line, self._is_told = now, True
        self._due, self._silence_s = now + SILENCE_S, SILENCE_S
        print(line, file=sys.stderr, flush=True)


class SilentProgress:
    """Shows nothing."""

    def start(self, what: str, n_total: int) -> None:
        """Show nothing."""

    def describe(self, what: str) -> None:
        """Show nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Show nothing."""


@contextmanager
def show_progress(unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr while the block runs; nothing when quiet."""
    if quiet:
        yield SilentProgress()
    elif is_plain(sys.stderr):
        plain, ended = PlainProgress(unit), threading.Event()
        thread = threading.Thread(target=plain.watch_silence, args=(ended,), name="progress", daemon=True)
        thread.start()
        try:
            yield plain
        finally:
            ended.set()
            thread.join()
    else:
        from echoshift.cli.progress_bars import draw_bar

        with draw_bar() as progress:
            yield progress


def make_notifier(*, quiet: bool) -> Callable[[str], None]:
    """Make what tells the user something beside the answer: a line on stderr, nothing when quiet."""
    return (lambda message: None) if quiet else (lambda message: typer.echo(message, err=True))
