"""Results and steps written before the code was rebuilt (2026-12-01, demo data) are read and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echoshift.pipeline.cards import read_dataset_card
from echoshift.train.grids import PlannedRun, plan_runs, read_grid
from echoshift.train.runs import read_runs
from echoshift.train.scores import Scores
from echoshift.train.settings import resolve_settings
from echoshift.train.steps import RECORD, Step, StepRunner
from echoshift.train.tables import make_table

STORED = Path(__file__).parent / "data"
CARD = read_dataset_card("demo")


def plan(grid: str, preset: str) -> list[PlannedRun]:
    return plan_runs(
        read_grid(grid),
        CARD,
        lambda stage, overrides: resolve_settings(stage, CARD, preset, None, overrides).describe(),
        seeds=[0],
        shifts=["studio-workshop"],
    )


@pytest.mark.parametrize(
    ("grid", "preset", "selection", "expected"),
    [
        # Top-1 in percent, as the table of that day printed it.
        ("a-table2", "paper", "last", {"visual encoder": 13.3, "+ balanced": 46.7, "+ z": 46.7}),
        ("b-table2", "quick", "mean_last", {"source only": 41.3}),
    ],
)
def test_stored_runs_count_in_the_table_of_the_same_grid(grid, preset, selection, expected):
    planned = plan(grid, preset)
    table = make_table(read_grid(grid), read_runs(STORED / "results.jsonl"), planned, CARD, selection=selection)
    done = {row.name: row.cells["studio-workshop"].interval for row in table.rows if row.n_done}
    assert {name: round(interval.mean, 1) for name, interval in done.items()} == expected


def test_a_stored_step_is_done_and_its_outcome_is_the_runs_score():
    folder = STORED / "steps" / "scores-294548f62353"
    record = json.loads((folder / RECORD).read_text())
    step = Step(record["step"], record["revision"], record["settings"], record["inputs"])

    def make(folder: Path) -> dict[str, object]:
        raise AssertionError("the step is done")

    done = StepRunner(folder.parent).run(step, make)
    assert (done.folder, done.was_done) == (folder, True)
    [run] = [run for run in read_runs(STORED / "results.jsonl") if run.steps["scores"] == step.key]
    assert Scores.model_validate(done.outcome) == run.scores
