"""Checks results of segments with several labels: average precisions by class, and no confusion matrix."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from echoshift.train.grids import PlannedRun
from echoshift.train.report.breakdowns import MAX_SHOWN_CLASSES, break_down
from echoshift.train.report.grid_section import make_run_section
from echoshift.train.runs import RunRecord, keep_latest
from echoshift.train.scores import compute_scores

N, K = 30, MAX_SHOWN_CLASSES + 5
CLASSES = tuple(f"class {k}" for k in range(K))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (np.random.default_rng(9).random((N, K)) < np.linspace(0.05, 0.9, K)).astype(np.int64)
    return rng.random((N, K)), labels


def make_record(seed: int) -> RunRecord:
    probabilities, labels = draw(seed)
    when = datetime(2026, 3, 4, tzinfo=UTC)
    return RunRecord(
        dataset="many",
        stage="stage1",
        shift="a-b",
        seed=seed,
        row="one",
        config={},
        config_hash="0123456789ab",
        manifest_sha256="1" * 64,
        code_version="0.1.0",
        selection="last",
        scores=compute_scores(probabilities, labels, np.arange(N) > 3, CLASSES),
        started=when,
        ended=when,
        duration_s=1.0,
        device="cpu",
    )


def test_the_classes_with_the_most_segments_are_shown() -> None:
    records = [make_record(0), make_record(1)]
    planned = [PlannedRun("one", "stage1", "a-b", seed, (), {}, "0123456789ab") for seed in (0, 1)]
    (found,) = break_down(planned, keep_latest(records), "last", "1" * 64)
    assert found.confusion is None and found.n_classes == K and len(found.classes) == MAX_SHOWN_CLASSES
    labels = draw(0)[1]
    counts = labels.sum(axis=0)
    assert {bar.n for bar in found.classes} <= set(counts.tolist())
    assert min(bar.n for bar in found.classes) >= sorted(counts.tolist())[K - MAX_SHOWN_CLASSES - 1]
    for bar in found.classes:
        k = CLASSES.index(bar.name)
        each = [100 * average_precision_score(labels[:, k], draw(seed)[0][:, k]) for seed in (0, 1)]
        assert (bar.mean, bar.low, bar.high) == pytest.approx((np.mean(each), min(each), max(each)))


def test_scores_are_called_what_they_are() -> None:
    section = make_run_section([make_record(0)], frozenset(), "many")
    (table,) = section.blocks
    assert table.kind == "table"
    assert table.notes[0] == "Score: mean average precision on the target's test split."
    assert table.rows[0][5].value == pytest.approx(100 * (make_record(0).scores.main.value or 0.0))
