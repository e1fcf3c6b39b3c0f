"""Checks a grid whose rows are of both stages: each Stage 1 once, a kill in the middle, the table."""

from __future__ import annotations

import csv
import io
import shutil
from typing import Any

import numpy as np
import pytest
import tiny_shift

from echoshift.train.runs import RESULTS, RunRecord, read_runs

GRID = """
title = "Both stages"
stage = "stage2"
baseline = "encoder"
seeds = [0, 1]

[[rows]]
name = "encoder"
stage = "stage1"

[[rows]]
name = "z^m"
overrides = [
    "recogniser.class_token=learnable", "recogniser.audio_tokens=true", "recogniser.domain_embedding=none",
]

[[rows]]
name = "z"
overrides = ["recogniser.class_token=h_prime"]
"""


def list_arguments(tiny: Any, *arguments: object) -> list[str]:
    named = ["tiny", "--grid", tiny.root / "both.toml", "--shifts", "s-t", "--form", "csv"]
    settings = ["training.n_epochs=1", *tiny_shift.STAGE2_SETTINGS]
    return tiny.list_arguments("ablate", *named, *arguments, settings=settings)


def read_results(tiny: Any) -> list[RunRecord]:
    return read_runs(tiny.runs / "tiny" / RESULTS)


def tell(record: RunRecord) -> dict[str, Any]:
    """Return what of a record isn't when and how long."""
    return record.model_dump(exclude={"started", "ended", "duration_s"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("both")
    made = tiny_shift.TinyShift(root, root / "runs")
    made.make()
    (root / "both.toml").write_text(GRID)
    code, out, err = tiny_shift.run(*list_arguments(made))
    assert code == 0, err
    assert "0 of 6 runs are done" in err
    (root / "printed.csv").write_text(out)
    return made


def test_each_stage_1_is_run_once_and_the_rows_of_stage_2_stand_on_it(tiny):
    records = read_results(tiny)
    assert [(r.stage, r.row, r.seed) for r in records] == [
        ("stage1", "encoder", 0), ("stage1", "encoder", 1),
        ("stage2", "z^m", 0), ("stage2", "z", 0), ("stage2", "z^m", 1), ("stage2", "z", 1),
    ]  # fmt: skip
    assert len(list(tiny.steps.glob("encoder-*/record.json"))) == 2
    numbers = {(n["row"], n["column"]): n for n in csv.DictReader(io.StringIO((tiny.root / "printed.csv").read_text()))}
    for row in ("encoder", "z^m", "z"):
        tops = [100 * (r.scores.main.value or 0) for r in records if r.row == row]
        assert float(numbers[row, "s-t"]["value"]) == pytest.approx(np.mean(tops), rel=1e-5)
    assert numbers["z", "difference over segments"]["n"] == "4"


@pytest.mark.slow
def test_a_grid_that_was_killed_comes_to_the_same_rows(tiny, tmp_path):
    killed = tiny.with_runs(tmp_path / "runs")
    process = killed.start_command(list_arguments(killed))
    results = killed.runs / "tiny" / RESULTS
    tiny_shift.kill_when(process, lambda: results.is_file() and b'"z^m"' in results.read_bytes())
    code, out, err = tiny_shift.run(*list_arguments(killed))
    assert code == 0, err
    assert "0 of 6 runs are done" not in err and "6 of 6 runs are done" not in err
    assert sorted(map(repr, map(tell, read_results(killed)))) == sorted(map(repr, map(tell, read_results(tiny))))
    assert out == (tiny.root / "printed.csv").read_text()


def test_without_its_steps_a_row_has_no_test_over_segments(tiny, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    shutil.copy(tiny.runs / "tiny" / RESULTS, tmp_path / "runs" / "tiny" / RESULTS)
    bare = tiny.with_runs(tmp_path / "runs")
    arguments = [a for a in list_arguments(bare) if a != "ablate"]
    media = arguments.index("--media")
    del arguments[media : media + 2]
    device = arguments.index("--device")
    del arguments[device : device + 2]
    code, out, err = tiny_shift.run("table", *arguments)
    assert code == 0, err
    assert "z^m" in out and "difference over segments" not in out
