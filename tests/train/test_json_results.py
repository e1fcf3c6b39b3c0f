"""Checks that the results of training are one JSON document with the numbers of the records, and nothing beside it."""

from __future__ import annotations

import json

import pytest
import tiny_shift

from echoshift.train.runs import RESULTS, read_runs

GRID = """
title = "One row"
stage = "stage1"
seeds = [0]

[[rows]]
name = "full"
"""


def test_stage_1_answers_with_its_whole_record(copied):
    code, out, err = copied.stage1("--json", "--quiet")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    document = json.loads(line)
    record = read_runs(copied.runs / "tiny" / RESULTS)[-1]
    (run,) = document.pop("runs")
    assert document == {
        "stage": "stage1",
        "dataset": "tiny",
        "synthetic": True,
        "metric": "top-1",
        "results": str(copied.runs / "tiny" / RESULTS),
    }
    assert run["score"]["value"] == record.scores.main.value
    assert run["scores"]["per_class"] == [entry.model_dump(mode="json") for entry in record.scores.per_class]
    assert (run["shift"], run["seed"], run["config_hash"]) == ("s-t", 0, record.config_hash)
    assert run["files"]["checkpoint"].endswith(".safetensors")
    assert run["left_out"] == []


def test_without_json_the_progress_is_on_stderr_and_the_numbers_on_stdout(copied):
    code, out, err = copied.stage1("--quiet")
    assert (code, err) == (0, "")
    assert "Stage 1 on tiny, target test, percent" in out


def test_a_table_answers_unrounded(copied, tmp_path):
    (tmp_path / "one.toml").write_text(GRID)
    grid = ["tiny", "--grid", tmp_path / "one.toml", "--shifts", "s-t"]
    code, out, err = tiny_shift.run(*copied.list_arguments("ablate", *grid, "--json", "-q", "--to", tmp_path / "t.csv"))
    assert (code, err) == (0, "")
    table = json.loads(out)
    (record,) = {record.config_hash: record for record in read_runs(copied.runs / "tiny" / RESULTS)}.values()
    value = record.scores.main.value
    assert value is not None
    (row,) = table["rows"]
    assert (table["grid"], table["rule"], table["columns"], table["failed"]) == ("one", "last", ["s-t"], [])
    assert row["cells"]["s-t"]["interval"]["mean"] == pytest.approx(100 * value, rel=1e-15)
    assert (row["n_done"], row["n_planned"]) == (1, 1)
    assert (tmp_path / "t.csv").read_text().startswith("dataset,row,column,value")
