"""Runs methods on cached features: trains each network of a run, scores the target, writes the records.

What is common to Stage 2 and to norm alignment; neither is known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echoshift.pipeline.devices import describe_device
from echoshift.pipeline.tensor_files import write_tensors
from echoshift.train.cached.training import TrainedRun, TrainingJob, train_jobs
from echoshift.train.network_predictions import (
    CHECKPOINT,
    EPOCHS,
    PREDICTIONS,
    list_ids,
    predict_network,
    predict_snapshots,
    write_arrays,
)
from echoshift.train.planned_training import MethodRun, PlannedTraining
from echoshift.train.runs import (
    RESULTS,
    RunRecord,
    append_run,
    describe_code_version,
    hash_config,
    keep_latest,
    read_runs,
)
from echoshift.train.scores import Scores
from echoshift.train.scoring import TestSplit, make_scores, open_test_split, plan_scores_step
from echoshift.train.steps import StepResult, hash_json
from echoshift.train.watching import EpochWatcher

WARNINGS = "warnings"  # in the outcome of a training, where there are any


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a run came to: one record a selection rule, and the checkpoints by network."""

    records: tuple[RunRecord, ...]
    checkpoints: Mapping[str, Path]
    left_out: tuple[str, ...]


def run_training(
    planned: PlannedTraining,
    watcher: EpochWatcher,
    device: torch.device,
    trained: Mapping[str, TrainedRun] | None = None,
) -> TrainingOutcome:
    """Run whatever of a planned run isn't done yet, and append it to the results, one record a selection rule.

    `trained` are, by the key of their step, runs that were trained together already. What is wrong with a network is
    said in a line and kept in the records, also where it was trained before. Of the target's labels none is read but,
    for the scores, those of its test split.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    trained = trained or {}
    trainings: dict[str, StepResult] = {}
    warnings: list[str] = []
    for network in planned.networks:
        step = network.plan_step()
        make = _make_training(network, watcher, device, trained.get(step.key))
        trainings[network.name] = planned.runner.run(step, make)
        found: Sequence[str] = trainings[network.name].outcome.get(WARNINGS, ())
        for warning in found:
            planned.runner.notify(f"{network.title}: {warning}")
        warnings.extend(found)
    split = open_test_split(
        planned.manifest,
        planned.card,
        planned.shift,
        [segment.segment_id for segment in planned.splits.target_test],
        planned.splits.source_train,
    )
    records = []
    for rule in planned.rules:
        predicted = {
            network.name: predict_network(planned, network, trainings[network.name], rule, split, device)
            for network in planned.networks
        }
        scored = _score(planned, predicted, split)
        steps = {f"trained_{name}": result.key for name, result in trainings.items()}
        steps |= {f"predictions_{name}": result.key for name, result in predicted.items()}
        records.append(
            RunRecord(
                dataset=planned.card.name,
                stage=planned.stage,
                shift=planned.shift.name,
                seed=planned.seed,
                row=planned.row,
                config=dict(planned.described),
                config_hash=hash_config(planned.described),
                steps={**steps, "scores": scored.key},
                fingerprints=dict(planned.fingerprints),
                manifest_sha256=planned.manifest.sha256,
                code_version=describe_code_version(),
                selection=rule,
                scores=Scores.model_validate(dict(scored.outcome)),
                started=started,
                ended=datetime.now(UTC),
                duration_s=round(time.perf_counter() - clock, 3),
                device=describe_device(device),
                warnings=tuple(warnings),
            )
        )
    _append(planned.runs_dir / RESULTS, records)
    checkpoints = {name: result.folder / CHECKPOINT for name, result in trainings.items()}
    return TrainingOutcome(tuple(records), checkpoints, planned.left_out)


def train_together(
    planned: Sequence[PlannedTraining], watcher: EpochWatcher, device: torch.device, stack: int
) -> dict[str, TrainedRun]:
    """Train what several runs lack in stacks of at most `stack` runs of equal shape; return it by key of step."""
    pending: dict[str, MethodRun] = {}
    for run in planned:
        pending.update({step.key: network for step, network in run.list_pending()})
    jobs: list[TrainingJob] = [network.plan_job() for network in pending.values()]
    return dict(zip(pending, train_jobs(jobs, device, watcher, stack=stack), strict=True))


def _make_training(
    network: MethodRun, watcher: EpochWatcher, device: torch.device, trained: TrainedRun | None
) -> Callable[[Path], Mapping[str, Any]]:
    def make(folder: Path) -> Mapping[str, Any]:
        job = network.plan_job()
        run = trained
        if run is None:
            [run] = train_jobs([job], device, watcher)
        write_tensors(folder / CHECKPOINT, run.state, network.describe())
        predictions = predict_snapshots(network, run, device) if job.keeps_states else run.predictions
        if predictions:
            ids = {f"{name} ids": list_ids(rows, index) for name, (rows, index, _) in network.list_predicted().items()}
            write_arrays(folder / EPOCHS, {**predictions, **ids})
        outcome = {"n_steps": job.schedule.n_steps, "losses": run.losses.tolist(), "loss_names": list(run.loss_names)}
        warnings = network.examine(run)
        return {**outcome, WARNINGS: list(warnings)} if warnings else outcome

    return make


def _score(planned: PlannedTraining, predicted: Mapping[str, StepResult], split: TestSplit) -> StepResult:
    """Score the mean of the streams' probabilities (METHODS 6)."""
    has_audio = np.array([planned.has_audio[segment_id] for segment_id in split.segment_ids], dtype=bool)
    inputs = {f"predictions of {name}": result.key for name, result in predicted.items()}

    def predict() -> np.ndarray:
        parts = []
        for result in predicted.values():
            with np.load(result.folder / PREDICTIONS, allow_pickle=False) as arrays:
                parts.append(arrays["probabilities"])
        return np.mean(parts, axis=0)

    step = plan_scores_step(split, {**inputs, "sound": hash_json(has_audio.tolist())})
    return planned.runner.run(step, make_scores(split, predict, has_audio))


def _append(results: Path, records: Sequence[RunRecord]) -> None:
    """Append the records that aren't there yet."""
    known = keep_latest(read_runs(results))
    for record in records:
        before = known.get(record.key)
        if before is None or (before.steps, before.row, before.manifest_sha256) != (
            record.steps,
            record.row,
            record.manifest_sha256,
        ):
            append_run(results, record)
