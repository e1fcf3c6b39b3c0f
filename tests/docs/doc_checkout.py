"""A folder that looks like a checkout with its .venv, in which the pages' commands can be given as they stand."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, copytree

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SHIM = """#!/bin/sh
exec '{python}' {arguments} "$@"
"""
_RUN_MAIN = "-c 'from echoshift.cli.app import main; main()'"


@dataclass(frozen=True, slots=True)
class DocCheckout:
    """A folder to run commands in; cache, runs, data and manifests are its own, the code is that of this checkout."""

    root: Path

    @property
    def site(self) -> Path:
        """Where `pip install` puts what the pages install."""
        return self.root / "site"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command: this code, the folder's own data, and a pip that asks nobody."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PIP_"))}
        return kept | {
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{self.site}",
            "ECHOSHIFT_MANIFESTS": str(self.root / "data" / "manifests"),
            "OMP_NUM_THREADS": "1",
            "PIP_TARGET": str(self.site),
            "PIP_NO_BUILD_ISOLATION": "0",  # sets what --no-build-isolation sets, and so 0 means none
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
        }

    def copy_from(self, finished: Path) -> None:
        """Take data, cache and run of a checkout in which `make demo` has been run."""
        for name in ("data/demo", "cache", "runs/demo"):
            copytree(finished / name, self.root / name)
        copy(finished / "data/manifests/demo.csv", self.root / "data/manifests")

    def run(self, text: str) -> str:
        """Run shell text; raises AssertionError with the end of what it printed where it fails."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=self.root, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\nexit code {done.returncode}\n{done.stdout[-3000:]}"
        return done.stdout


def make_checkout(root: Path) -> DocCheckout:
    """Make the folder: a Makefile and cards that are copies, and a .venv whose programs are this Python."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        copy(ROOT / name, root / name)
    (root / "data" / "manifests").mkdir(parents=True)
    for card in (ROOT / "data" / "manifests").glob("*.toml"):
        copy(card, root / "data" / "manifests" / card.name)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in (("echoshift", _RUN_MAIN), ("python", "")):
        (programs / name).write_text(_SHIM.format(python=sys.executable, arguments=arguments))
        (programs / name).chmod(0o755)
    (programs.parent / ".installed").touch()
    return DocCheckout(root)


def run_here(words: list[str]) -> tuple[int, str]:
    """Run `.venv/bin/echoshift …` in this process and folder, patterns expanded; return exit code and output."""
    from echoshift.cli.app import main

    assert words[0] == ".venv/bin/echoshift", words
    arguments = [found for word in words[1:] for found in _expand(word)]
    out = io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setattr(sys, "argv", ["echoshift", *arguments])
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int)
    return code, out.getvalue()


def _expand(word: str) -> list[str]:
    """Return the files that a pattern means, as a shell does."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def write_distribution(site: Path, pyproject: str, files: Iterable[tuple[str, str]]) -> None:
    """Put a distribution where Python finds it, as installing it would: its modules, and its entry points by name."""
    described = tomllib.loads(pyproject)
    project = described["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"]
    (info / "METADATA").write_text("".join(lines))
    points = []
    for group, entries in project["entry-points"].items():
        points += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(points) + "\n")
    for name, text in files:
        (site / name).write_text(text)
