"""Checks that a step is done once, named by all that decides it, and done again where it was cut off."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from echoshift.pipeline.errors import RunError
from echoshift.train.steps import RECORD, Step, StepRunner, hash_json

STEP = Step("encoder", 1, {"lr": 0.1, "seed": 3, "table": {"a": 1, "b": [1, 2]}}, {"sound": "abc", "clips": "def"})


def make_nothing(folder: Path) -> Mapping[str, Any]:
    return {}


@pytest.mark.parametrize(
    "changed",
    [
        replace(STEP, name="features"),
        replace(STEP, revision=2),
        replace(STEP, settings={**STEP.settings, "lr": 0.2}),
        replace(STEP, settings={**STEP.settings, "table": {"a": 1, "b": [2, 1]}}),
        replace(STEP, settings={**STEP.settings, "more": None}),
        replace(STEP, settings={"lr": 0.1, "seed": 3}),
        replace(STEP, inputs={**STEP.inputs, "sound": "abd"}),
        replace(STEP, inputs={"sound": "def", "clips": "abc"}),
        replace(STEP, inputs={**STEP.inputs, "more": ""}),
    ],
)
def test_whatever_decides_a_step_changes_its_key(changed: Step) -> None:
    assert changed.key != STEP.key
    assert len(changed.key) == 12
    int(changed.key, 16)


def test_the_order_of_settings_and_inputs_does_not() -> None:
    turned = replace(
        STEP,
        settings={"table": {"b": [1, 2], "a": 1}, "seed": 3, "lr": 0.1},
        inputs={"clips": "def", "sound": "abc"},
    )
    assert turned.key == STEP.key


def test_a_key_is_what_it_was_when_steps_were_written() -> None:
    """By sha256sum of the canonical JSON; another key would do every step anew."""
    assert hash_json({"b": 1, "a": [True, None, "é"]}) == "17c8c6f7f948"


def test_a_step_is_done_once_and_its_record_says_what_came_of_it(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> Mapping[str, Any]:
        assert not (folder / RECORD).exists()
        calls.append(folder)
        (folder / "made").write_text("x")
        return {"loss": 0.5}

    runner = StepRunner(tmp_path)
    assert not runner.is_done(STEP)
    first, second = runner.run(STEP, make), runner.run(STEP, make)
    assert calls == [tmp_path / f"encoder-{STEP.key}"] == [first.folder]
    assert (first.was_done, second.was_done) == (False, True)
    assert first.outcome == second.outcome == {"loss": 0.5}
    assert runner.is_done(STEP)
    record = json.loads((first.folder / RECORD).read_text())
    assert record["settings"] == STEP.settings
    assert record["inputs"] == STEP.inputs
    assert (record["step"], record["key"], record["revision"]) == ("encoder", STEP.key, 1)
    assert record["versions"]["torch"] == version("torch") and record["n_threads"] == torch.get_num_threads()


def test_a_killed_step_finds_what_it_left(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(folder: Path) -> Mapping[str, Any]:
        (folder / "half").write_text("half")
        raise Killed

    runner = StepRunner(tmp_path)
    with pytest.raises(Killed):
        runner.run(STEP, die)
    assert not runner.is_done(STEP)

    def go_on(folder: Path) -> Mapping[str, Any]:
        return {"found": (folder / "half").read_text()}

    assert runner.run(STEP, go_on).outcome == {"found": "half"}


def test_a_step_that_is_named_is_done_anew_from_an_empty_folder(tmp_path: Path) -> None:
    def make(folder: Path) -> Mapping[str, Any]:
        found = sorted(path.name for path in folder.iterdir())
        (folder / "made").write_text("x")
        return {"found": found}

    other = replace(STEP, name="features")
    for step in (STEP, other):
        StepRunner(tmp_path).run(step, make)
    again = StepRunner(tmp_path, rerun=frozenset({"encoder"}))
    assert again.run(STEP, make).outcome == {"found": []}
    assert not again.run(STEP, make).was_done
    assert again.run(other, make).was_done


def test_a_step_of_another_key_leaves_the_first(tmp_path: Path) -> None:
    runner = StepRunner(tmp_path)
    results = [runner.run(replace(STEP, settings={"lr": lr}), make_nothing) for lr in (1, 2)]
    assert len({result.folder for result in results}) == 2
    assert all((result.folder / RECORD).is_file() for result in results)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"outcome": 3}', "\x00\xff"])
def test_a_damaged_record_says_what_to_do(tmp_path: Path, text: str) -> None:
    runner = StepRunner(tmp_path)
    folder = runner.run(STEP, make_nothing).folder
    (folder / RECORD).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        RunError, match=r"record\.json isn't a step's record.*delete the folder and run again"
    ) as caught:
        runner.run(STEP, make_nothing)
    assert str(folder) in str(caught.value)


def append_while_another_waits(root: str) -> None:
    waiting = Path(root) / "waiting"

    def make(folder: Path) -> Mapping[str, Any]:
        with (Path(root) / "calls").open("a") as file:
            file.write("x")
        deadline = time.monotonic() + 60
        while not waiting.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"n": 1}

    said: list[str] = []

    def notify(message: str) -> None:
        said.append(message)
        waiting.touch()

    result = StepRunner(Path(root) / "steps", notify=notify).run(STEP, make)
    (Path(root) / f"done-{result.was_done}").write_text("\n".join(said))


def test_two_processes_that_want_a_step_do_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_while_another_waits, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    assert (tmp_path / "calls").read_text() == "x"
    assert (tmp_path / "done-False").read_text() == ""
    assert f"another run is at step encoder-{STEP.key}; waiting for it" in (tmp_path / "done-True").read_text()
