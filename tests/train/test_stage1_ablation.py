"""Checks that a grid is run, here or in workers, told by a table, not run again, and that no failing row stops it."""

from __future__ import annotations

import csv
import io
import shutil
from typing import Any

import pytest
import tiny_shift

from echoshift.train.runs import RESULTS, RunRecord, read_runs

GRID = """
title = "Two rows"
stage = "stage1"
baseline = "plain"
seeds = [0]

[[rows]]
name = "plain"
overrides = ["attention.enabled=false", "absent.weight=0", "balance.kind=none"]

[[rows]]
name = "full"
"""
FAILING = """
[[rows]]
name = "wild"
overrides = ["training.lr=1e30"]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablation")
    made = tiny_shift.TinyShift(root, root / "runs")
    made.make()
    (root / "two.toml").write_text(GRID)
    (root / "three.toml").write_text(GRID + FAILING)
    code, out, err = ablate(made, "two.toml")
    assert code == 0, err
    assert "0 of 2 runs are done" in err
    (root / "printed.csv").write_text(out)
    return made


def ablate(tiny: Any, grid: str, *arguments: object) -> tuple[int, str, str]:
    named = ["tiny", "--grid", tiny.root / grid, "--shifts", "s-t", "--seeds", 1]
    settings = ["training.n_source=2", "visual.test_preset=zhang-stage1-val"]
    found: tuple[int, str, str] = tiny_shift.run(
        *tiny.list_arguments("ablate", *named, "--form", "csv", *arguments, settings=settings)
    )
    return found


def read_results(tiny: Any) -> dict[tuple[str, int], RunRecord]:
    return {(record.row, record.seed): record for record in read_runs(tiny.runs / "tiny" / RESULTS)}


def list_tops(tiny: Any) -> dict[tuple[str, int], float]:
    return {key: record.scores.main.value for key, record in read_results(tiny).items()}


def test_a_grid_is_run_told_and_not_run_again(tiny):
    out = (tiny.root / "printed.csv").read_text()
    results = read_results(tiny)
    assert sorted(results) == [("full", 0), ("plain", 0)]
    assert set(results["plain", 0].steps) == {"encoder", "predictions", "scores"}
    assert not list(tiny.steps.glob("features-*")), "a grid wants scores alone"
    numbers = {(row["row"], row["column"]): row for row in csv.DictReader(io.StringIO(out))}
    tops = list_tops(tiny)
    for name in ("plain", "full"):
        number = numbers[name, "s-t"]
        assert float(number["value"]) == pytest.approx(100 * tops[name, 0], rel=1e-5)
        assert (number["n"], number["n_planned"]) == ("1", "1")
    assert float(numbers["full", "difference to plain"]["value"]) == pytest.approx(
        100 * (tops["full", 0] - tops["plain", 0]), abs=1e-4
    )
    before, lines = tiny.list_records(), (tiny.runs / "tiny" / RESULTS).read_bytes()
    code, again, err = ablate(tiny, "two.toml")
    assert code == 0
    assert "2 of 2 runs are done" in err
    assert again == out
    assert tiny.list_records() == before
    assert (tiny.runs / "tiny" / RESULTS).read_bytes() == lines


def test_a_row_that_fails_ends_with_3_and_the_others_are_done(tiny, tmp_path):
    shutil.copytree(tiny.runs, tmp_path / "runs")
    failing = tiny.with_runs(tmp_path / "runs")
    code, out, err = ablate(failing, "three.toml")
    assert code == 3, err
    assert "2 of 3 runs are done" in err
    assert sorted(read_results(failing)) == [("full", 0), ("plain", 0)]
    assert "failed: wild, s-t, seed 0: the loss is nan in batch" in err
    assert "wild" in out
    assert len(read_runs(failing.runs / "tiny" / RESULTS)) == 2, "a failed run has no result, and is tried again"


@pytest.mark.slow
def test_workers_come_to_the_same_and_survive_a_row_that_fails(tiny, tmp_path):
    apart = tiny.with_runs(tmp_path)
    code, _, err = ablate(apart, "three.toml", "--workers", 2)
    assert code == 3, err
    assert "failed: wild, s-t, seed 0: the loss is nan in batch" in err
    assert list_tops(apart) == pytest.approx(list_tops(tiny))
    steps = [{key: record.steps for key, record in read_results(ran).items()} for ran in (tiny, apart)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--grid", "a-table2-stage"],
            "'a-table2-stage'; did you mean 'a-table2-stage1' or 'a-table2-stage2'?",
        ),
        (["--grid", "a-gamma"], "grid a-gamma is for multi-label datasets; tiny is single-label"),
        (["--shifts", "s-x"], "tiny has no shift 's-x'"),
    ],
)
def test_a_wrong_grid_or_shift_is_an_error(tiny, arguments, words):
    code, _, err = ablate(tiny, "two.toml", *arguments)
    assert code == 2
    assert words in err
