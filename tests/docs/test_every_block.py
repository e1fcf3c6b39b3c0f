"""Every command of README.md, CONTRIBUTING.md and docs/ exists with its options, and each block is listed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from distributed.cli import dask_scheduler, dask_worker
from torch.distributed import run as torchrun

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
ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "data" / "manifests"
STAGES = {"stage1": "stage1", "stage2": "stage2", "align": "alignment"}
_EAGER = {"--help", "--install-completion", "--show-completion"}  # which do something while they are parsed
_EXTRAS = re.compile(r"\.\[(\w+)\]")
# Programs that aren't ours: git and its like, and what EPIC's authors give out. Nothing is known here of their options.
_FOREIGN = {"git", "cd", "ln", "bash"}
PLUGINS = (("docs/adding-an-encoder.md", "frame_averages.py"), ("docs/adding-a-method.md", "coral.py"))


class CommandParser:
    """Checks commands; `checkout` has a Makefile."""

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout
        self._command: Any = typer.main.get_command(app)
        makefile = (checkout / "Makefile").read_text(encoding="utf-8")
        self._variables = set(re.findall(r"^(\w+) \?=", makefile, re.M))
        self._targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))

    def check(self, words: list[str]) -> None:
        """Check a command; raises AssertionError or a usage error."""
        program, *rest = words
        if program in _FOREIGN or words[:2] == ["python", "epic_downloader.py"]:
            return
        if program == ECHOSHIFT:
            self._check_echoshift(rest)
        elif program == "make":
            self._check_make(rest)
        elif program == "sbatch":
            self.check(shlex.split(rest[rest.index("--wrap") + 1]))
        elif program == ".venv/bin/torchrun":
            at = rest.index(ECHOSHIFT)
            torchrun.get_args_parser().parse_args([*rest[:at], "script"])
            self.check(rest[at:])
        elif program == "dask":
            command = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[rest[0]]
            command.make_context(rest[0], rest[1:])
        else:
            assert program == ".venv/bin/python", f"nobody here knows {program}"
            self._check_pip(rest)

    def _check_echoshift(self, words: list[str]) -> None:
        eager = [word for word in words if word in _EAGER]
        command, context = self._command, None
        path: list[str] = []
        if eager:
            for word in words:
                command = command.commands[word] if not word.startswith("-") else command
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert set(eager) <= known and len(words) - len(eager) <= 2, f"no {eager}"
            return
        while True:
            context = command.make_context(path[-1] if path else "echoshift", words, parent=context)
            if not hasattr(command, "commands"):
                break
            name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
            path.append(name)
        assert not context.args, f"left over: {context.args}"
        check_meaning(path, context.params)

    def _check_make(self, words: list[str]) -> None:
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
            env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.replace("\\\n", " ").splitlines()
        ours = [line for line in lines if line.startswith(ECHOSHIFT)]
        assert ours or set(targets) <= {"setup", "test", "weights"}, done.stdout
        for line in ours:
            self.check(shlex.split(line))

    def _check_pip(self, words: list[str]) -> None:
        assert words[:3] == ["-m", "pip", "install"], words
        what = words[-1]
        if match := _EXTRAS.fullmatch(what):
            assert f"\n{match.group(1)} = [" in (self._checkout / "pyproject.toml").read_text(encoding="utf-8")
        else:
            assert what.startswith("./"), what


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


@pytest.fixture(scope="module")
def parser(
    doc_checkout: ModuleType,
    blocks: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """Return a parser that knows the encoder and the method that the pages add."""
    root = tmp_path_factory.mktemp("checkout")
    checkout = doc_checkout.make_checkout(root)
    with pytest.MonkeyPatch.context() as patch:
        for page, file in PLUGINS:
            pyproject = blocks.find_file(page, "pyproject.toml")
            doc_checkout.write_distribution(checkout.site, pyproject, [(file, blocks.find_file(page, file))])
        patch.syspath_prepend(checkout.site)
        yield CommandParser(root)


def test_each_command_exists_with_its_options(shell_block: Any, parser: Any, blocks: ModuleType) -> None:
    commands = blocks.split_commands(shell_block.text)
    assert commands
    for words in commands:
        parser.check(words)


def test_each_block_of_shell_is_listed_once(blocks: ModuleType, lists: ModuleType) -> None:
    there = [block.name for block in blocks.read_all_blocks("sh")]
    run = {*lists.CHEAP, *lists.ON_THE_DEMO}
    parsed = {name for name in there for listed in lists.PARSED if listed in (name, name.partition("#")[0])}
    unused = set(lists.PARSED) - parsed - {name.partition("#")[0] for name in parsed}
    assert len(there) == len(set(there))
    assert not run & parsed and not unused
    assert set(there) == run | parsed, "list new blocks in tests/docs/block_lists.py, and take out those that are gone"
    known = {"sh", "python", "toml", "csv", ""}
    assert {block.language for page in blocks.list_pages() for block in blocks.read_blocks(page)} <= known


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make extract DATASET=epic ENCODER=i3d_rgb", "the Makefile has no {'ENCODER'}"),
        ("make extrct DATASET=epic", "make has no {'extrct'}"),
        ("make extract DATASET=epic ENCODERS=i3d_rbg", "there is no encoder 'i3d_rbg'"),
        (".venv/bin/echoshift extract epic --encodrs i3d_rgb", "--encodrs"),
        (".venv/bin/echoshift store verfy x.zarr", "verfy"),
        ("make ablate GRID=a-table9 DATASET=epic", "a-table9"),
        ("make align METHOD=rnaa DATASET=epic", "unknown method 'rnaa'"),
        ("make stage1 DATASET=demo SHIFT=studio-attic", "attic"),
        ('make stage2 DATASET=demo ARGS="--set schedule.n_epoch=1"', "n_epoch"),
        ("rm -rf cache", "nobody here knows rm"),
    ],
)
def test_a_wrong_command_is_found(command: str, fault: str, parser: Any, blocks: ModuleType) -> None:
    [words] = blocks.split_commands(command)
    with pytest.raises(Exception, match=re.escape(fault)):
        parser.check(words)


def test_links_lead_somewhere(blocks: ModuleType) -> None:
    links = []
    for page in blocks.list_pages():
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                links.append((page, target))
    assert len(links) > 30
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []
