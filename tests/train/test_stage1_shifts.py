"""Checks what several shifts of a data set share, and that processes started together do the work of one."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any

import pytest
import tiny_shift

from echoshift.pipeline.cards import Shift
from echoshift.train.runs import RESULTS, read_runs

QUICK = ("training.n_epochs=1", "visual.test_preset=zhang-stage1-val", "training.validate_every=0")


@pytest.fixture
def tiny(tmp_path):
    made = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    segments = made.make()
    again = [replace(s, segment_id=s.segment_id.replace("t-", "u-"), domain="u") for s in segments if s.domain == "t"]
    made.write_card(
        domains=("s", "t", "u"),
        shifts=(
            Shift(source=("s",), target="t"),
            Shift(source=("s",), target="u"),
            Shift(source=("s", "u"), target="t"),
        ),
    )
    made.write_manifest([*segments, *again])
    return made


def count_steps(tiny: Any) -> dict[str, int]:
    names = [name.rpartition("-")[0] for name in tiny.list_records()]
    return {name: names.count(name) for name in names}


def test_shifts_from_one_source_share_what_listens_to_the_source(tiny):
    code, out, err = tiny.stage1("--shift", "s-t s-u", "--no-export", settings=QUICK)
    assert code == 0, err
    assert count_steps(tiny) == {
        "audio_classifier": 1, "clusters": 1, "audio_predictions": 2, "absent_labels": 2, "encoder": 2,
        "predictions": 2, "scores": 2,
    }  # fmt: skip
    assert [record.shift for record in read_runs(tiny.runs / "tiny" / RESULTS)] == ["s-t", "s-u"]
    for shift in ("s-t", "s-u"):
        assert sum(line.startswith(f"{shift} ") for line in out.splitlines()) == 1


@pytest.mark.slow
def test_several_sources_train_as_one_at_the_common_rate(tiny):
    settings = [*QUICK, "training.lr=2e-3", "training.lr_by_source.s=5e-3", "balance.kind=none", "absent.weight=0"]
    code, _, err = tiny.stage1("--shift", "s+u-t", "--no-export", settings=settings)
    assert code == 0, err
    outcome = json.loads((tiny.find_step("encoder") / "record.json").read_text())["outcome"]
    assert outcome["lr"] == 2e-3


def test_no_shift_at_all_is_an_error(tiny):
    code, _, err = tiny.stage1("--shift", " ")
    assert code == 2
    assert "no shift named" in err


@pytest.mark.slow
def test_processes_that_train_together_leave_what_one_finds_done(tiny, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    running = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        running.append(tiny.start(settings=QUICK))
    try:
        assert [process.wait(timeout=200) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert len(read_runs(tiny.runs / "tiny" / RESULTS)) == 1
    before = tiny.list_records()
    assert count_steps(tiny) == dict.fromkeys(count_steps(tiny), 1) | {"predictions": 2}
    code, _, err = tiny.stage1(settings=QUICK)
    assert code == 0, err
    assert tiny.list_records() == before
