"""Makes records of runs that never ran, for a grid of two rows: what the page shows is compared with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.pipeline.cards import DatasetCard
from echoshift.train.grids import PlannedRun, plan_runs, read_grid
from echoshift.train.runs import RunRecord
from echoshift.train.scores import compute_scores

GRID = """
title = "Two rows"
stage = "stage1"
baseline = "plain"
seeds = [0, 1]

[[rows]]
name = "plain"
overrides = ["attention.enabled=false", "absent.weight=0", "balance.kind=none"]

[[rows]]
name = "gated"
overrides = ["attention.enabled=true", "balance.kind=none"]
"""
WHEN = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)


def plan_grid(path: Path, card: DatasetCard, resolve: Callable[..., Mapping[str, Any]]) -> list[PlannedRun]:
    """Write the grid's file and plans its runs of the shift s-t."""
    path.write_text(GRID)
    return plan_runs(read_grid(path), card, resolve, shifts=["s-t"])


def make_record(run: PlannedRun, classes: Sequence[str], manifest_sha256: str, n_right: int) -> RunRecord:
    """Make a record of 4 test segments of the first two classes in turn, the first `n_right` of them right.

    The wrong ones are taken for the last class; the last segment is silent. The folders of its steps are gone.
    """
    labels = np.arange(4) % 2
    predicted = np.where(np.arange(4) < n_right, labels, len(classes) - 1)
    probabilities = np.eye(len(classes))[predicted]
    scores = compute_scores(probabilities, labels, np.array([True, True, True, False]), classes)
    return RunRecord(
        dataset="tiny",
        stage=run.stage,
        shift=run.shift,
        seed=run.seed,
        row=run.row,
        config=dict(run.config),
        config_hash=run.config_hash,
        steps={"encoder": "0123456789ab", "predictions": "0123456789ab"},
        manifest_sha256=manifest_sha256,
        code_version="0.1.0+test",
        selection="last",
        scores=scores,
        started=WHEN,
        ended=WHEN,
        duration_s=60.0,
        device="cpu",
    )
