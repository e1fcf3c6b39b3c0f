"""Counts the files and functions of echoshift that one row passes on its way: how much a reader has to open.

    python -m benchmarks.walk [--files]

Two ways are profiled (`sys.setprofile`) on generated data: from a manifest row to its stored row (`echoshift extract`
of one segment with one encoder, from its shard's beginning to its commit; once with the network that is loaded for
the first shard of a process, once without), and from features to a score (`echoshift
align`: one network trained, predicted and scored). The whole commands are counted beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import echoshift.extract.run as extraction
import echoshift.train.run_method as methods
from echoshift.cli.app import app
from echoshift.extract.demo.generating import generate_demo
from echoshift.pipeline.manifest import locate_manifest, write_manifest

GOAL = 25


class Walk:
    """Code objects of echoshift that were entered, in all threads, while the profile was on."""

    def __init__(self) -> None:
        self.entered: set[CodeType] = set()

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record while the block runs."""
        before = sys.getprofile()
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(before)
            threading.setprofile(before)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        # Class bodies and modules, which run when they are imported, aren't functions.
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            self.entered.add(frame.f_code)

    @property
    def functions(self) -> set[tuple[str, str]]:
        """The functions of echoshift by file."""
        named = {(os.path.realpath(code.co_filename), code.co_qualname) for code in self.entered}
        return {(path, name) for path, name in named if name_file(path)}

    @property
    def files(self) -> list[str]:
        """The files of echoshift, sorted."""
        return sorted({name_file(path) for path, _ in self.functions})


def name_file(path: str) -> str:
    """Return a file of the checkout by its place in it, "" for any other's."""
    root = Path(__file__).resolve().parents[1]
    if not path.startswith(f"{root}{os.sep}"):
        return ""
    name = Path(path).relative_to(root).as_posix()
    return name if name.startswith(("pipeline/", "extract/", "train/", "src/")) else ""


def walk_command(owner: Any, function: str, *arguments: str) -> tuple[Walk, Walk]:
    """Run a command; return what it entered inside the first call of `owner.function`, and in all."""
    inner, outer = Walk(), Walk()
    called = getattr(owner, function, None)
    if called is None:
        sys.exit(f"{owner.__name__} has no {function}: name in benchmarks/walk.py what took its place")

    def record(*given: Any, **named: Any) -> Any:
        with inner.record():
            return called(*given, **named)

    setattr(owner, function, record)
    try:
        with outer.record(), contextlib.redirect_stdout(io.StringIO()):
            app([*arguments, "--device", "cpu", "--quiet"], standalone_mode=False)
    finally:
        setattr(owner, function, called)
    if not inner.entered:
        sys.exit(f"`echoshift {arguments[0]}` never called {owner.__name__}.{function}")
    outer.entered |= inner.entered
    return inner, outer


def main() -> None:
    """Walk both ways and print the counts."""
    parser = argparse.ArgumentParser(description="Count the files that a row passes.")
    parser.add_argument("--files", action="store_true", help="List the files of each way.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="echoshift-walk-") as folder, contextlib.chdir(folder):
        segments = generate_demo(Path("data/demo"), n_train=6, n_test=6)
        walks = {}
        for name, cache in (("manifest row, network loaded too", "first"), ("manifest row to stored row", "second")):
            write_manifest(Path("one.csv"), segments[:1])
            walks[name] = walk_command(
                extraction, "run_in_process", "extract", "demo", "--encoders", "slowfast_demo", "--cache", cache,
                "--manifest", "one.csv",
            )  # fmt: skip
        write_manifest(locate_manifest("demo"), segments)
        for encoder in ("slowfast_demo", "resnet_demo"):
            with contextlib.redirect_stdout(io.StringIO()):
                app(["extract", "demo", "--encoders", encoder, "--device", "cpu", "--quiet"], standalone_mode=False)
        walks["features to a score"] = walk_command(
            methods, "run_training", "align", "demo", "--shift", "studio-workshop", "--preset", "quick",
            "--set", "iterations.n_steps=20", "--set", "iterations.n_checkpoints=1", "--set", "alignment.method=rna",
        )  # fmt: skip
    print(f"{'way':34}{'files':>7}{'goal':>6}{'functions':>11}{'whole command':>15}")
    for name, (inner, outer) in walks.items():
        print(f"{name:34}{len(inner.files):>7}{GOAL:>6}{len(inner.functions):>11}{len(outer.files):>9} files")
        if options.files:
            print("".join(f"    {file}\n" for file in inner.files), end="")


if __name__ == "__main__":
    main()
