"""Runs what trains on cached features, Stage 2 and alignment: trains each network, predicts, scores, writes records."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.devices import describe_device
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest
from echoshift.pipeline.tensor_files import check_tensors, read_tensors, write_tensors
from echoshift.train.features import FeatureRows, StreamInputs, open_stream
from echoshift.train.loop import Domain, TrainedRun, TrainingJob, predict_rows, train_run
from echoshift.train.runs import (
    RESULTS,
    RunRecord,
    append_run,
    describe_code_version,
    hash_config,
    keep_latest,
    read_runs,
)
from echoshift.train.scores import Scores, TestSplit, compute_scores, make_scores, open_test_split, plan_scores_step
from echoshift.train.splits import DataPlaces, LabelledSegments, ShiftSplits
from echoshift.train.stage2.config import SelectionRule
from echoshift.train.stage2.inputs import find_inputs
from echoshift.train.steps import Step, StepResult, StepRunner, hash_json
from echoshift.train.watching import EpochWatcher

if TYPE_CHECKING:
    from echoshift.train.settings import RunSettings

CHECKPOINT, EPOCHS, PREDICTIONS = "trained.safetensors", "epochs.npz", "predictions.npz"
TARGET_TEST, SOURCE_VAL = "target_test", "source_val"
WARNINGS = "warnings"  # in the outcome of a training, where there are any

Predicted = Mapping[str, tuple[FeatureRows, np.ndarray, Domain]]


@dataclass(frozen=True, slots=True)
class MethodRequest:
    """One run that is asked for.

    Attributes:
        inputs: by network, the files that it reads.
        runs_dir: where steps and results lie, `runs/DATASET`.
        row: the grid's row that asks for it.
        rerun: names of steps that are done again.
        described: the settings as JSON, as records keep them.
    """

    card: DatasetCard
    manifest: Manifest
    shift: Shift
    seed: int
    settings: RunSettings
    inputs: Mapping[str, StreamInputs]
    runs_dir: Path
    described: dict[str, Any]
    row: str = ""
    rerun: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """Name the run in a line of progress."""
        row = f", {self.row}" if self.row else ""
        return f"{self.shift.name}, seed {self.seed}{row}"

    @property
    def is_multi_label(self) -> bool:
        """Whether a segment may have any number of classes."""
        return self.card.task == "multi-label"


@dataclass(frozen=True)
class NetworkRun(ABC):
    """One network of a run, planned: what is trained, and what is predicted with it.

    Features are read when they are asked for.

    Attributes:
        one_clip: each clip is predicted by itself.
        over_clips: how predictions of clips are combined then.
        predicts_snapshots: the weights of each snapshot are predicted with, when the training is over.
    """

    request: MethodRequest
    name: str
    one_clip: bool
    over_clips: Literal["mean", "max"]
    predicts_snapshots: bool

    @property
    def inputs(self) -> StreamInputs:
        """The files that it reads."""
        return self.request.inputs[self.name]

    @property
    def title(self) -> str:
        """Name it in a line of progress."""
        several = f" {self.name}" if len(self.request.inputs) > 1 else ""
        return f"{self.request.title}{several}"

    @abstractmethod
    def plan_step(self) -> Step:
        """Plan the training; what decides it is in the key."""

    @abstractmethod
    def plan_job(self) -> TrainingJob:
        """Make the job that the loop trains."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the method with the weights that the seed decides."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Return the facts that a checkpoint's header holds."""

    @abstractmethod
    def list_predicted(self) -> Predicted:
        """List what is predicted: `target_test`, and, where there is one, `source_val`."""

    def name_test(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return settings and inputs that decide what test segments are predicted from, beside the weights."""
        return {}, {}

    def examine(self, run: TrainedRun) -> tuple[str, ...]:
        """Describe, a line each, what is wrong with a network that was trained to its end."""
        return ()

    def predict(self, method: nn.Module, device: torch.device) -> dict[str, np.ndarray]:
        """Predict everything listed, with a method in eval mode; return probabilities, float32 [n, K] each."""
        return {
            name: predict_rows(method, rows, index, domain, device, one_clip=self.one_clip, over_clips=self.over_clips)
            for name, (rows, index, domain) in self.list_predicted().items()
        }


@lru_cache(maxsize=4)
def open_rows(
    inputs: StreamInputs, segment_ids: tuple[str, ...], max_memory_mb: int, *, of_training: bool = False
) -> FeatureRows:
    """Read features, or return those that a run before has read (`open_stream`)."""
    return open_stream(inputs, segment_ids, max_memory_mb * 2**20, of_training=of_training)


def hash_source(source: LabelledSegments) -> str:
    """Compute what names labelled segments in a step's key."""
    return hash_json([[(s.segment_id, s.domain) for s in source.segments], source.labels.tolist()])


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """A run whose steps are planned; nothing is trained yet.

    Attributes:
        rules: each gives a result of its own.
        splits: without the segments that have no features, which are `left_out`.
        has_audio: by segment.
        networks: whose probabilities are averaged.
    """

    request: MethodRequest
    rules: tuple[SelectionRule, ...]
    splits: ShiftSplits
    left_out: tuple[str, ...]
    has_audio: Mapping[str, bool]
    networks: tuple[NetworkRun, ...]
    runner: StepRunner


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a run came to: one record a selection rule, and the checkpoints by network."""

    records: tuple[RunRecord, ...]
    checkpoints: Mapping[str, Path]
    left_out: tuple[str, ...]


def plan_network_run(
    places: DataPlaces,
    settings: RunSettings,
    shift: Shift,
    seed: int,
    runs_dir: Path,
    *,
    row: str = "",
    rerun: frozenset[str] = frozenset(),
    notify: Callable[[str], None] = lambda message: None,
) -> PlannedTraining:
    """Plan a run of Stage 2 or of alignment whose features are there; raises RunError naming what is missing."""
    inputs = find_inputs(places, settings, shift, seed, runs_dir)
    request = MethodRequest(
        places.card, places.manifest, shift, seed, settings, inputs, runs_dir, settings.describe(), row, rerun
    )
    if settings.stage == "stage2":
        from echoshift.train.stage2.run import plan_stage2

        return plan_stage2(request, notify)
    from echoshift.train.alignment.run import plan_alignment

    return plan_alignment(request, notify)


def run_training(planned: PlannedTraining, watcher: EpochWatcher, device: torch.device) -> TrainingOutcome:
    """Run whatever of a planned run isn't done yet, and append it to the results, one record a selection rule.

    What is wrong with a network is said in a line and kept in the records, also where it was trained before. Of the
    target's labels none is read but, for the scores, those of its test split.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    request, runner = planned.request, planned.runner
    trainings: dict[str, StepResult] = {}
    warnings: list[str] = []
    for network in planned.networks:
        trainings[network.name] = runner.run(network.plan_step(), _make_training(network, watcher, device))
        found: Sequence[str] = trainings[network.name].outcome.get(WARNINGS, ())
        for warning in found:
            runner.notify(f"{network.title}: {warning}")
        warnings.extend(found)
    tested = [segment.segment_id for segment in planned.splits.target_test]
    split = open_test_split(request.manifest, request.card, request.shift, tested, planned.splits.source_train)
    records = []
    for rule in planned.rules:
        predicted = {
            network.name: _predict_by_rule(planned, network, trainings[network.name], rule, split, device)
            for network in planned.networks
        }
        scored = _score(planned, predicted, split)
        steps = {f"trained_{name}": result.key for name, result in trainings.items()}
        steps |= {f"predictions_{name}": result.key for name, result in predicted.items()}
        records.append(
            RunRecord(
                dataset=request.card.name,
                stage=request.settings.stage,
                shift=request.shift.name,
                seed=request.seed,
                row=request.row,
                config=request.described,
                config_hash=hash_config(request.described),
                steps={**steps, "scores": scored.key},
                fingerprints={name: inputs.features.stem for name, inputs in request.inputs.items()},
                manifest_sha256=request.manifest.sha256,
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
    _append(request.runs_dir / RESULTS, records)
    checkpoints = {name: result.folder / CHECKPOINT for name, result in trainings.items()}
    return TrainingOutcome(tuple(records), checkpoints, planned.left_out)


def _make_training(
    network: NetworkRun, watcher: EpochWatcher, device: torch.device
) -> Callable[[Path], Mapping[str, Any]]:
    def make(folder: Path) -> Mapping[str, Any]:
        job = network.plan_job()
        run = train_run(job, device, watcher)
        write_tensors(folder / CHECKPOINT, run.state, network.describe())
        if network.predicts_snapshots:
            _write_arrays(folder / EPOCHS, _predict_snapshots(network, run, device))
        outcome = {"n_steps": job.schedule.n_steps, "losses": run.losses.tolist(), "loss_names": list(run.loss_names)}
        warnings = network.examine(run)
        return {**outcome, WARNINGS: list(warnings)} if warnings else outcome

    return make


def _predict_snapshots(network: NetworkRun, run: TrainedRun, device: torch.device) -> dict[str, np.ndarray]:
    """Predict with each of the weights that a run kept, float32 [snapshots, n, K], and list the segments' ids."""
    method = network.build().to(device).eval()
    each = []
    for state in (*run.snapshots, run.state):
        method.load_state_dict(state)
        each.append(network.predict(method, device))
    arrays = {name: np.stack([predicted[name] for predicted in each]) for name in each[0]}
    for name, (rows, index, _) in network.list_predicted().items():
        arrays[f"{name} ids"] = np.array([rows.segment_ids[row] for row in index.tolist()])
    return arrays


def _predict_by_rule(
    planned: PlannedTraining,
    network: NetworkRun,
    training: StepResult,
    rule: SelectionRule,
    split: TestSplit,
    device: torch.device,
) -> StepResult:
    """Predict the target's test segments by the weights that a rule chooses."""
    settings, inputs = network.name_test()
    settings = {"rule": rule, **settings}
    inputs = {"trained": training.key, "test": hash_json(split.segment_ids), **inputs}
    if rule == "target_oracle":
        inputs["target labels (oracle)"] = hash_json(split.test.labels.tolist())

    def make(folder: Path) -> Mapping[str, Any]:
        epochs = _read_epochs(training.folder / EPOCHS, TARGET_TEST, split.segment_ids)
        chosen: dict[str, Any] = {}
        if rule == "last" and epochs is None:
            rows, index, domain = network.list_predicted()[TARGET_TEST]
            method = _load(network, training.folder / CHECKPOINT).to(device)
            probabilities = predict_rows(
                method, rows, index, domain, device, one_clip=network.one_clip, over_clips=network.over_clips
            )
        elif epochs is None:
            raise RunError(f"{network.title}: {training.folder} kept no predictions for the rule {rule}; run it again")
        elif rule == "last":
            probabilities = epochs[-1]
        elif rule == "mean_last":
            probabilities = epochs
        else:
            best, chosen = _choose_epoch(planned, network, training.folder / EPOCHS, rule, split)
            probabilities = epochs[best]
        _write_arrays(folder / PREDICTIONS, {"probabilities": probabilities})
        return {"n_segments": len(split.segment_ids), **chosen}

    return planned.runner.run(Step("predicted", 1, settings, inputs), make)


def _load(network: NetworkRun, path: Path) -> nn.Module:
    method = network.build()
    tensors, expected = read_tensors(path), method.state_dict()
    check_tensors(tensors, expected, str(path))
    method.load_state_dict(tensors)
    return method.eval()


def _choose_epoch(
    planned: PlannedTraining, network: NetworkRun, path: Path, rule: SelectionRule, split: TestSplit
) -> tuple[int, dict[str, Any]]:
    """Choose the first of the best epochs: on the source's validation split, or (oracle) on what is scored."""
    on_source = rule == "source_val"
    labelled = planned.splits.source_val if on_source else split.test
    ids = [segment.segment_id for segment in labelled.segments]
    seen = _read_epochs(path, SOURCE_VAL if on_source else TARGET_TEST, ids)
    if seen is None:
        raise RunError(f"{network.title}: the source has no test split to validate on; use the rule last")
    has_audio = np.array([planned.has_audio[segment_id] for segment_id in ids], dtype=bool)
    classes = planned.request.card.classes
    scores = [compute_scores(p, labelled.labels, has_audio, classes).main.value or 0.0 for p in seen]
    best = int(np.argmax(scores))
    return best, {"epoch": best, "score": scores[best]}


def _read_epochs(path: Path, name: str, segment_ids: Sequence[str]) -> np.ndarray | None:
    """Read what each snapshot predicts of segments, float32 [snapshots, n, K]; None if nothing is kept."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        if name not in arrays:
            return None
        row_of = {segment_id: row for row, segment_id in enumerate(arrays[f"{name} ids"].tolist())}
        kept: np.ndarray = arrays[name][:, [row_of[segment_id] for segment_id in segment_ids]]
        return kept


def _score(planned: PlannedTraining, predicted: Mapping[str, StepResult], split: TestSplit) -> StepResult:
    """Score the mean of the networks' probabilities (METHODS 6)."""
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


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as .npz in one step."""
    fresh = path.with_name(f"{path.name}.partial.npz")
    np.savez(fresh, **arrays)  # type: ignore[arg-type]  # its stubs take names for options
    fresh.replace(path)
