"""Checks what is drawn on a terminal and what is plain: elsewhere, under NO_COLOR, and when nothing is to be shown."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import pytest

from echoshift.cli import terminal

TABLE = """
from echoshift.cli.terminal import print_table, show_progress
print_table("title", ("name", "n"), [["[bold]x[/bold]", 3], ["y", 12]])
with show_progress("rows") as progress:
    progress.start("reading", 2)
    progress.advance(2, "loss 0.5")
"""
PLAIN = ["title", "name             n", "[bold]x[/bold]   3", "y               12"]


def run_on_terminal(code: str, **environment: str) -> str:
    """Run Python with stdout and stderr on a pseudo-terminal; return what appears there."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    env |= {"TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            written += piece
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def test_a_terminal_gets_a_frame_and_a_bar() -> None:
    text = run_on_terminal(TABLE)
    assert "\x1b[" in text
    assert "┃" in text
    assert "reading" in text
    assert "2/2" in text
    assert "reading, loss 0.5" in text, "a note stands behind the title, not in its place"
    assert "[bold]x[/bold]" in text, "text is no markup"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_none_gets_plain_text(environment: dict[str, str]) -> None:
    text = run_on_terminal(TABLE, **environment)
    assert "\x1b" not in text
    assert text.splitlines() == PLAIN


def test_plain_progress_is_a_line_now_and_then_and_ever_more_seldom_while_no_step_ends(capsys, monkeypatch):
    now = 0
    monkeypatch.setattr(time, "monotonic", lambda: float(now))
    progress = terminal.PlainProgress("steps")
    progress.end()  # its thread: `tell` is called here

    def wait_until(then_s: int) -> list[str]:
        nonlocal now
        while now < then_s:
            now += 1
            progress.tell(float(now))
        return capsys.readouterr().err.splitlines()

    assert wait_until(100) == [], "nothing has begun"
    now = 0
    progress.start("looking", 7)
    assert wait_until(4) == [], "what is refused at once says no more than why"
    now = 0
    progress.start("encoder", 3)
    assert wait_until(200) == [f"encoder: 0/3 steps, {s} s" for s in (5, 25, 65, 145)]
    progress.advance(1, "loss 0.50")
    assert wait_until(306) == ["encoder: 1/3 steps, 0.2/min, 610 s left, loss 0.50"]
    progress.describe("encoder, epoch 1")
    progress.advance(2)
    assert wait_until(9999) == ["encoder, epoch 1"], "all steps are done"
    now = 0
    progress.start("measuring", 0)
    progress.advance(5)
    assert wait_until(6) == ["measuring: 5 steps, 1.0/s"], "without a known end none is foretold"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.show_progress("rows", quiet=True) as progress:
        progress.start("reading", 1)
        progress.describe("still reading")
        progress.advance()
    terminal.make_notifier(quiet=True)("a notice")
    assert capsys.readouterr() == ("", "")
    terminal.make_notifier(quiet=False)("a notice")
    assert capsys.readouterr() == ("", "a notice\n")
