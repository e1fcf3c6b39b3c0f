"""Runs methods on cached features: trains each network of a run, scores the target, writes the records.

What is common to Stage 2 and to norm alignment; neither is known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from pipeline.cards import DatasetCard, Shift
from pipeline.devices import describe_device
from pipeline.errors import RunError
from pipeline.segments import Manifest
from pipeline.tensor_files import check_tensors, read_tensors, write_tensors
from train.cached.batches import Domain
from train.cached.feature_bank import Rows
from train.cached.predicting import predict_rows
from train.cached.training import TrainedRun, TrainingJob, train_jobs
from train.grids import Stage
from train.runs import (
    RESULTS,
    RunRecord,
    SelectionRule,
    append_run,
    describe_code_version,
    hash_config,
    keep_latest,
    read_runs,
)
from train.scores import Scores, compute_scores
from train.scoring import TestSplit, make_scores, open_test_split, plan_scores_step
from train.splits import ShiftSplits
from train.steps import Step, StepResult, StepRunner, hash_json
from train.watching import EpochWatcher

CHECKPOINT, EPOCHS, PREDICTIONS = "trained.safetensors", "epochs.npz", "predictions.npz"
TARGET_TEST, SOURCE_VAL = "target_test", "source_val"


class MethodRun(Protocol):
    """Is one network of a run, planned: what is trained, and what is predicted with it."""

    @property
    def name(self) -> str:
        """Names it among the run's networks, such as rgb."""
        ...

    @property
    def title(self) -> str:
        """Names it in lines of progress and in errors."""
        ...

    @property
    def one_clip(self) -> bool:
        """Says whether each clip is predicted by itself."""
        ...

    @property
    def over_clips(self) -> Literal["mean", "max"]:
        """Says how predictions of clips are combined then."""
        ...

    def plan_step(self) -> Step:
        """Plans the training; what decides it is in the key."""
        ...

    def plan_job(self) -> TrainingJob:
        """Makes the job that the loop trains."""
        ...

    def build(self) -> nn.Module:
        """Builds the method with the weights that the seed decides."""
        ...

    def describe(self) -> dict[str, str]:
        """Gives the facts that a checkpoint's header holds."""
        ...

    def name_test(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Gives settings and inputs that decide what test segments are predicted from, beside the weights."""
        ...

    def list_predicted(self) -> Mapping[str, tuple[Rows, np.ndarray, Domain]]:
        """Lists what is predicted: `target_test`, and, where there is one, `source_val`."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """Is a run whose steps are planned; nothing is trained yet.

    Attributes:
        row: the grid's row that asks for it.
        described: the whole configuration as JSON; its hash names the run.
        rules: each gives a result of its own.
        fingerprints: of the stores that it reads, by name.
        splits: without the segments that have no features, which are `left_out`.
        has_audio: by segment.
        networks: whose probabilities are averaged.
    """

    stage: Stage
    card: DatasetCard
    manifest: Manifest
    shift: Shift
    seed: int
    row: str
    described: Mapping[str, Any]
    rules: tuple[SelectionRule, ...]
    runs_dir: Path
    fingerprints: Mapping[str, str]
    splits: ShiftSplits
    left_out: tuple[str, ...]
    has_audio: Mapping[str, bool]
    networks: tuple[MethodRun, ...]
    runner: StepRunner

    def list_pending(self) -> list[tuple[Step, MethodRun]]:
        """Lists the trainings that aren't done."""
        steps = [(network.plan_step(), network) for network in self.networks]
        return [(step, network) for step, network in steps if not self.runner.is_done(step)]


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """Is what a run came to: one record a selection rule, and the checkpoints by network."""

    records: tuple[RunRecord, ...]
    checkpoints: Mapping[str, Path]
    left_out: tuple[str, ...]


def run_training(
    planned: PlannedTraining,
    watcher: EpochWatcher,
    device: torch.device,
    trained: Mapping[str, TrainedRun] | None = None,
) -> TrainingOutcome:
    """Runs whatever of a planned run isn't done yet, and appends it to the results, one record a selection rule.

    `trained` are, by the key of their step, runs that were trained together already. Of the target's labels none is
    read but, for the scores, those of its test split.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    trained = trained or {}
    trainings = {}
    for network in planned.networks:
        step = network.plan_step()
        make = _make_training(network, watcher, device, trained.get(step.key))
        trainings[network.name] = planned.runner.run(step, make)
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
            network.name: _predict(planned, network, trainings[network.name], rule, split, device)
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
            )
        )
    _append(planned.runs_dir / RESULTS, records)
    checkpoints = {name: result.folder / CHECKPOINT for name, result in trainings.items()}
    return TrainingOutcome(tuple(records), checkpoints, planned.left_out)


def train_together(
    planned: Sequence[PlannedTraining], watcher: EpochWatcher, device: torch.device, stack: int
) -> dict[str, TrainedRun]:
    """Trains what several runs lack in stacks of at most `stack` runs of equal shape; gives it by key of step."""
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
        if run.predictions:
            _write_arrays(folder / EPOCHS, run.predictions)
        return {"n_steps": job.schedule.n_steps, "losses": run.losses.tolist(), "loss_names": list(run.loss_names)}

    return make


def _predict(
    planned: PlannedTraining,
    network: MethodRun,
    training: StepResult,
    rule: SelectionRule,
    split: TestSplit,
    device: torch.device,
) -> StepResult:
    """Predicts the target's test segments by the weights that a rule chooses."""
    settings, inputs = network.name_test()
    settings = {"rule": rule, **settings}
    inputs = {"trained": training.key, "test": hash_json(split.segment_ids), **inputs}
    if rule == "target_oracle":
        inputs["target labels (oracle)"] = hash_json(split.test.labels.tolist())

    def make(folder: Path) -> Mapping[str, Any]:
        if rule == "last":
            rows, index, domain = network.list_predicted()[TARGET_TEST]
            method = _load(network, training.folder / CHECKPOINT).to(device)
            probabilities = predict_rows(
                method, rows, index, domain, device, one_clip=network.one_clip, over_clips=network.over_clips
            )
            chosen: dict[str, Any] = {}
        else:
            probabilities, chosen = _choose_epoch(planned, network, training.folder / EPOCHS, rule, split)
        _write_arrays(folder / PREDICTIONS, {"probabilities": probabilities})
        return {"n_segments": len(probabilities), **chosen}

    return planned.runner.run(Step("predicted", 1, settings, inputs), make)


def _load(network: MethodRun, path: Path) -> nn.Module:
    method = network.build()
    tensors, expected = read_tensors(path), method.state_dict()
    check_tensors(tensors, expected, str(path))
    method.load_state_dict(tensors)
    return method.eval()


def _choose_epoch(
    planned: PlannedTraining, network: MethodRun, path: Path, rule: SelectionRule, split: TestSplit
) -> tuple[np.ndarray, dict[str, Any]]:
    """Chooses the first of the best epochs: on the source's validation split, or (oracle) on what is scored."""
    with np.load(path, allow_pickle=False) as arrays:
        epochs = arrays[TARGET_TEST]
        if rule == "source_val" and SOURCE_VAL not in arrays:
            raise RunError(f"{network.title}: the source has no test split to validate on; use the rule last")
        seen = arrays[SOURCE_VAL] if rule == "source_val" else epochs
    labelled = planned.splits.source_val if rule == "source_val" else split.test
    has_audio = np.array([planned.has_audio[s.segment_id] for s in labelled.segments], dtype=bool)
    classes = planned.card.classes
    scores = [compute_scores(p, labelled.labels, has_audio, classes).main.value or 0.0 for p in seen]
    best = int(np.argmax(scores))
    return epochs[best], {"epoch": best, "score": scores[best]}


def _score(planned: PlannedTraining, predicted: Mapping[str, StepResult], split: TestSplit) -> StepResult:
    """Scores the mean of the streams' probabilities (METHODS 6)."""
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


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    fresh = path.with_name(f"{path.name}.partial.npz")
    np.savez(fresh, **arrays)  # type: ignore[arg-type]  # its stubs take names for options
    fresh.replace(path)


def _append(results: Path, records: Sequence[RunRecord]) -> None:
    """Appends the records that aren't there yet."""
    known = keep_latest(read_runs(results))
    for record in records:
        before = known.get(record.key)
        if before is None or (before.steps, before.row, before.manifest_sha256) != (
            record.steps,
            record.row,
            record.manifest_sha256,
        ):
            append_run(results, record)
