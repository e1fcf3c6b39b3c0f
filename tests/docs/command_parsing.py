"""Checks a command of the pages without running it: every option and argument, and what the names in it mean."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from echoshift.cli.app import app
from echoshift.cli.options import list_names
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.weights.load import WeightsRecord
from echoshift.pipeline.cards import read_dataset_card
from echoshift.train.grids import read_grid
from echoshift.train.settings import resolve_settings
from echoshift.train.splits import find_shift

ECHOSHIFT = ".venv/bin/echoshift"
MANIFESTS = Path(__file__).resolve().parents[2] / "data" / "manifests"
STAGES = {"stage1": "stage1", "stage2": "stage2", "align": "alignment"}
_EAGER = {"--help", "--install-completion", "--show-completion"}  # which do something while they are parsed
_EXTRAS = re.compile(r"\.\[(\w+)\]")
# Programs that aren't ours: git and its like, and what EPIC's authors give out. Nothing is known here of their options.
_FOREIGN = {"git", "cd", "ln", "bash"}


class CommandParser:
    """Checks commands; `checkout` has a Makefile."""

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout
        self._command: Any = typer.main.get_command(app)
        makefile = (checkout / "Makefile").read_text(encoding="utf-8")
        self._variables = set(re.findall(r"^(\w+) \?=", makefile, re.M))
        self._targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))

    def check(self, words: list[str]) -> int:
        """Check a command, and return how many of echoshift's it comes to; raises AssertionError or a usage error."""
        checks: Mapping[str, Callable[[list[str]], int]] = {
            ECHOSHIFT: self._check_echoshift,
            "make": self._check_make,
            "sbatch": self._check_sbatch,
            "dask": _check_dask,
            ".venv/bin/torchrun": self._check_torchrun,
            ".venv/bin/python": self._check_pip,
            "python": _check_downloader,
        }
        if words[0] in _FOREIGN:
            return 0
        assert words[0] in checks, f"nobody here knows {words[0]}"
        return checks[words[0]](words[1:])

    def _check_echoshift(self, words: list[str]) -> int:
        eager = [word for word in words if word in _EAGER]
        command, context = self._command, None
        path: list[str] = []
        if eager:
            for word in words:
                command = command.commands[word] if not word.startswith("-") else command
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert set(eager) <= known and len(words) - len(eager) <= 2, f"no {eager}"
            return 1
        while True:
            context = command.make_context(path[-1] if path else "echoshift", words, parent=context)
            if not hasattr(command, "commands"):
                break
            name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
            path.append(name)
        assert not context.args, f"left over: {context.args}"
        check_meaning(path, context.params)
        return 1

    def _check_make(self, words: list[str]) -> int:
        variables = dict(word.split("=", 1) for word in words if "=" in word)
        targets = [word for word in words if "=" not in word]
        missing = set(targets) - self._targets
        assert targets and not missing, f"make has no {missing}"
        assert set(variables) <= self._variables, f"the Makefile has no {set(variables) - self._variables}"
        done = subprocess.run(
            ["make", "-n", *words],
            cwd=self._checkout,
            capture_output=True,
            text=True,
            timeout=60,
            env=_clean_environment(),
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.replace("\\\n", " ").splitlines()
        ours = [line for line in lines if line.startswith(ECHOSHIFT)]
        assert ours or set(targets) <= {"setup", "test", "weights"}, done.stdout
        return sum(self.check(shlex.split(line)) for line in ours)

    def _check_sbatch(self, words: list[str]) -> int:
        wrapped = words[words.index("--wrap") + 1]
        return self.check(shlex.split(wrapped))

    def _check_torchrun(self, words: list[str]) -> int:
        from torch.distributed.run import get_args_parser

        at = words.index(ECHOSHIFT)
        get_args_parser().parse_args([*words[:at], "script"])
        return self.check(words[at:])

    def _check_pip(self, words: list[str]) -> int:
        assert words[:3] == ["-m", "pip", "install"], words
        what = words[-1]
        if match := _EXTRAS.fullmatch(what):
            assert f"\n{match.group(1)} = [" in (self._checkout / "pyproject.toml").read_text(encoding="utf-8")
        else:
            assert what.startswith("./"), what
        return 0


def check_meaning(path: list[str], params: Mapping[str, Any]) -> None:
    """Check that encoders, recipes, grids, shifts and settings are ones that there are; raises what a run would."""
    dataset = params.get("dataset")
    own = dataset in ("mine", None, "")
    if not own and dataset:
        card = read_dataset_card(dataset, MANIFESTS)
    if path[-1] in ("extract", "plan"):
        for encoder in list_names(params["encoders"] or []) or ([] if own else card.encoders):
            entry = find_encoder(encoder)
            preset, overrides = params["preset"], [*(params["set_"] or [])]
            outputs = [name for option in params["outputs"] or [] if "=" not in option for name in option.split(",")]
            weights = WeightsRecord("random:0", "0" * 64, "", None)
            made = make_feature_spec(
                encoder, weights, StoreOptions(), outputs=outputs, preset=preset, overrides=overrides
            )
            assert made.revision == entry.revision
    if path[-1] in ("ablate", "table"):
        if not params["grid"].endswith(".toml"):
            stage = read_grid(params["grid"]).stage
            resolve_settings(stage, card, params["preset"], None, params["set_"] or [])
        for shift in params["shifts"].split():
            find_shift(card, shift)
    if path[-1] in STAGES and not own:
        resolve_settings(STAGES[path[-1]], card, params["preset"], None, params["set_"] or [])
        if params["shift"] != "all":
            find_shift(card, params["shift"])


def _check_dask(words: list[str]) -> int:
    """Check `dask scheduler` and `dask worker` against distributed's own command lines."""
    from distributed.cli import dask_scheduler, dask_worker

    command = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[0]]
    command.make_context(words[0], words[1:])
    return 0


def _check_downloader(words: list[str]) -> int:
    assert words[0] == "epic_downloader.py", words
    return 0


def _clean_environment() -> dict[str, str]:
    """Return the environment without what an outer make hands down."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
