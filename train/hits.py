"""Averages over seeds which test segments runs have right, for tests over segments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from echoshift.train.grids import PlannedRun
from echoshift.train.runs import RunRecord, keep_latest
from echoshift.train.scoring import read_hits
from echoshift.train.selection_rules import SelectionRule


def average_hits(
    planned: Sequence[PlannedRun],
    records: Iterable[RunRecord],
    runs_dir: Path,
    *,
    selection: SelectionRule = "last",
    manifest_sha256: str | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Return, by row and shift, each test segment's share of seeds in which it is right, float64 [n].

    Only for rows whose runs are all done and whose steps still say it, all for the same segments; a row of another kind
    (multi-label, runs deleted) is left out, and has no test over segments.
    """
    latest = keep_latest(records)
    hits: dict[str, dict[str, np.ndarray]] = {}
    for row in dict.fromkeys(run.row for run in planned):
        found: dict[str, list[tuple[list[str], np.ndarray]]] = {}
        for run in (run for run in planned if run.row == row):
            record = latest.get((run.stage, run.config_hash, run.shift, run.seed, selection))
            if record is None or "scores" not in record.steps or manifest_sha256 not in (None, record.manifest_sha256):
                break
            of_run = read_hits(runs_dir / "steps" / f"scores-{record.steps['scores']}")
            if of_run is None:
                break
            found.setdefault(run.shift, []).append(of_run)
        else:
            means = _average(found)
            if means is not None:
                hits[row] = means
    return hits


def _average(found: Mapping[str, list[tuple[list[str], np.ndarray]]]) -> dict[str, np.ndarray] | None:
    means = {}
    for shift, runs in found.items():
        if any(ids != runs[0][0] for ids, _ in runs):
            return None
        means[shift] = np.mean([is_right for _, is_right in runs], axis=0)
    return means
