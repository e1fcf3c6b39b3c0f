"""Checks what is drawn on a terminal and what is plain: elsewhere, under NO_COLOR, and when nothing is to be shown."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
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


def test_a_table_wider_than_the_terminal_is_told_row_by_row_with_no_name_in_pieces() -> None:
    path = "/cache/" + "x" * 60 + ".zarr"
    code = f"from echoshift.cli.terminal import print_table; print_table('t', ('a', 'store'), [[1, {path!r}]])"
    assert "┃" in run_on_terminal(code)
    narrow = run_on_terminal(code, COLUMNS="70")
    assert "┃" not in narrow
    assert path in narrow.replace("\x1b[0m", "").replace("\x1b[2m", "")


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_none_gets_plain_text(environment: dict[str, str]) -> None:
    text = run_on_terminal(TABLE, **environment)
    assert "\x1b" not in text
    assert text.splitlines() == PLAIN


def test_elsewhere_a_table_is_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table("title", ("name", "n"), [["[bold]x[/bold]", 3], ["y", 12]])
    assert capsys.readouterr().out.splitlines() == PLAIN


def test_plain_progress_is_a_line_an_interval_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 4.0, 20.0, 21.0])  # made, begun, then three steps
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with terminal.show_progress("rows") as progress:
        progress.start("reading", 12)
        for _ in range(3):
            progress.advance(2)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "reading: 4/12 rows, 0.2/s, 40 s left\n")


def test_what_goes_with_the_steps_is_part_of_their_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, *(0.5 * i for i in range(1, 51))])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with terminal.show_progress("steps") as progress:
        progress.start("s-t, seed 0: training", 1600)
        for i in range(1, 51):
            progress.advance(32, f"loss {1 / i:.3f}")
    assert capsys.readouterr().err.splitlines() == [
        "s-t, seed 0: training: 640/1600 steps, 64.0/s, 15 s left, loss 0.050",
        "s-t, seed 0: training: 1280/1600 steps, 64.0/s, 5 s left, loss 0.025",
    ]


def test_a_step_that_lasts_is_told_when_it_begins_and_ever_more_seldom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0
    monkeypatch.setattr(time, "monotonic", lambda: float(now))
    progress = terminal.PlainProgress("steps")

    def wait_until(then_s: int) -> list[str]:
        nonlocal now
        while now < then_s:
            now += 1
            progress.tell_silent(float(now))
        return capsys.readouterr().err.splitlines()

    assert wait_until(100) == [], "nothing has begun"
    now = 0
    progress.start("looking", 7)
    assert wait_until(4) == [], "what is refused at once says no more than why"
    now = 0
    progress.start("encoder", 3)
    assert capsys.readouterr().err == ""
    assert wait_until(300) == [
        "encoder: 0/3 steps",
        "encoder: still at 0/3 steps, 35 s",
        "encoder: still at 0/3 steps, 95 s",
        "encoder: still at 0/3 steps, 215 s",
    ]
    progress.advance()
    assert wait_until(340) == ["encoder: 1/3 steps, 0.2/min, 600 s left", "encoder: still at 1/3 steps, 330 s"]
    progress.describe("encoder, epoch 1")
    progress.advance(2)
    assert wait_until(9999) == ["encoder, epoch 1"], "all steps are done"
    now = 0
    progress.start("predictions", 100)
    assert wait_until(6) == ["predictions: 0/100 steps"]
    now = 12
    progress.advance(60)
    assert wait_until(41) == ["predictions: 60/100 steps, 5.0/s, 8 s left"]
    assert wait_until(4242)[:7] == [
        f"predictions: still at 60/100 steps, {s} s" for s in (42, 102, 222, 462, 942, 1542, 2142)
    ]


def test_silence_is_broken_while_the_step_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "POLL_S", 0.01)
    monkeypatch.setattr(terminal, "BEGUN_S", 0.05)
    with terminal.show_progress("steps") as progress:
        progress.start("encoder", 3)
        time.sleep(0.5)
    n_threads = sum(thread.name == "progress" for thread in threading.enumerate())
    assert (capsys.readouterr().err, n_threads) == ("encoder: 0/3 steps\n", 0)


def test_progress_without_a_known_end_foretells_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with terminal.show_progress("videos") as progress:
        progress.start("measuring", 0)
        progress.advance(5)
    assert capsys.readouterr().err == "measuring: 5 videos, 0.5/s\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.show_progress("rows", quiet=True) as progress:
        progress.start("reading", 1)
        progress.describe("still reading")
        progress.advance()
    terminal.make_notifier(quiet=True)("a notice")
    assert capsys.readouterr() == ("", "")
    terminal.make_notifier(quiet=False)("a notice")
    assert capsys.readouterr() == ("", "a notice\n")
