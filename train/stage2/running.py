"""Runs Stage 2: trains the recogniser of each stream, scores the target, writes the records (METHODS section 6)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.devices import describe_device
from pipeline.errors import RunError
from pipeline.tensor_files import check_tensors, read_tensors, write_tensors
from train.cached.predicting import predict_rows
from train.cached.training import TrainedRun, TrainingJob, train_jobs
from train.prediction_table import PredictionTable, read_prediction_table
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
from train.splits import ShiftSplits, keep_segments, list_segment_ids, split_for_shift
from train.stage2.requests import Stage2Request
from train.stage2.stream_runs import StreamRun
from train.steps import Step, StepResult, StepRunner, hash_json
from train.watching import EpochWatcher

CHECKPOINT, EPOCHS, PREDICTIONS = "recogniser.safetensors", "epochs.npz", "predictions.npz"
TARGET_TEST, SOURCE_VAL = "target_test", "source_val"


@dataclass(frozen=True, slots=True)
class Stage2Outcome:
    """Is what a run came to: one record a selection rule, and the checkpoints by stream."""

    records: tuple[RunRecord, ...]
    checkpoints: Mapping[str, Path]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannedStage2:
    """Is a run whose tables are read and whose steps are planned; nothing is trained yet."""

    request: Stage2Request
    splits: ShiftSplits
    left_out: tuple[str, ...]
    streams: tuple[StreamRun, ...]
    runner: StepRunner
    has_audio: Mapping[str, bool]

    def list_pending(self) -> list[tuple[Step, StreamRun]]:
        """Lists the trainings that aren't done."""
        steps = [(stream.plan_step(), stream) for stream in self.streams]
        return [(step, stream) for step, stream in steps if not self.runner.is_done(step)]


def plan_stage2(request: Stage2Request, notify: Callable[[str], None] = lambda message: None) -> PlannedStage2:
    """Reads the tables of a run's streams and plans its steps.

    Segments that a stream hasn't, because they failed to be extracted, are left out. Raises RunError where nothing is
    left of a part that training needs.
    """
    labels = request.target_labels
    splits = split_for_shift(
        request.manifest,
        request.card,
        request.shift,
        use_tags=labels.use_tags,
        labelled_fraction=labels.labelled_fraction,
        pairs=labels.pairs,
    )
    wanted = list_segment_ids(splits)
    tables: list[PredictionTable | None] = []
    kept, has_audio = set(wanted), dict.fromkeys(wanted, True)
    for stream in request.streams:
        table = None if stream.inputs.table is None else read_prediction_table(stream.inputs.table)
        tables.append(table)
        if table is not None:
            _check_classes(table, request, str(stream.inputs.table))
            kept &= set(table.segment_ids)
            has_audio.update(zip(table.segment_ids, table.has_audio.tolist(), strict=True))
    left_out = tuple(segment_id for segment_id in wanted if segment_id not in kept)
    splits = keep_segments(splits, kept)
    if not len(splits.source_train) or not splits.target_test:
        raise RunError(
            f"{request.title}: no segment of {'the source' if not len(splits.source_train) else 'the target test'} "
            f"is in the tables of all streams; run Stage 1 on this manifest"
        )
    if left_out:
        notify(f"{request.title}: {len(left_out)} segments without features left out: {left_out[0]} …")
    streams = tuple(
        StreamRun(request, stream, splits, table) for stream, table in zip(request.streams, tables, strict=True)
    )
    runner = StepRunner(request.runs_dir / "steps", request.rerun, notify)
    return PlannedStage2(request, splits, left_out, streams, runner, has_audio)


def run_stage2(
    planned: PlannedStage2,
    watcher: EpochWatcher,
    device: torch.device,
    trained: Mapping[str, TrainedRun] | None = None,
) -> Stage2Outcome:
    """Runs whatever of a planned run isn't done yet, and appends it to the results, one record a selection rule.

    `trained` are, by the key of their step, runs that were trained together already. Of the target's labels none is
    read but, for the scores, those of its test split.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    request, trained = planned.request, trained or {}
    trainings = {}
    for stream in planned.streams:
        step = stream.plan_step()
        make = _make_training(stream, watcher, device, trained.get(step.key))
        trainings[stream.stream.name] = planned.runner.run(step, make)
    split = open_test_split(
        request.manifest,
        request.card,
        request.shift,
        [segment.segment_id for segment in planned.splits.target_test],
        planned.splits.source_train,
    )
    records = []
    for rule in request.config.selection.rules:
        predicted = {
            stream.stream.name: _predict(planned, stream, trainings[stream.stream.name], rule, split, device)
            for stream in planned.streams
        }
        scored = _score(planned, predicted, split)
        steps = {f"recogniser_{name}": result.key for name, result in trainings.items()}
        steps |= {f"predictions_{name}": result.key for name, result in predicted.items()}
        records.append(
            RunRecord(
                dataset=request.card.name,
                stage="stage2",
                shift=request.shift.name,
                seed=request.seed,
                row=request.row,
                config=dict(request.described),
                config_hash=hash_config(request.described),
                steps={**steps, "scores": scored.key},
                fingerprints={stream.name: stream.inputs.features.stem for stream in request.streams},
                manifest_sha256=request.manifest.sha256,
                code_version=describe_code_version(),
                selection=rule,
                scores=Scores.model_validate(dict(scored.outcome)),
                started=started,
                ended=datetime.now(UTC),
                duration_s=round(time.perf_counter() - clock, 3),
                device=describe_device(device),
            )
        )
    _append(request.runs_dir / RESULTS, records)
    checkpoints = {name: result.folder / CHECKPOINT for name, result in trainings.items()}
    return Stage2Outcome(tuple(records), checkpoints, planned.left_out)


def train_together(
    planned: Sequence[PlannedStage2], watcher: EpochWatcher, device: torch.device, stack: int
) -> dict[str, TrainedRun]:
    """Trains what several runs lack in stacks of at most `stack` runs of equal shape; gives it by key of step."""
    pending: dict[str, StreamRun] = {}
    for run in planned:
        pending.update({step.key: stream for step, stream in run.list_pending()})
    jobs: list[TrainingJob] = [stream.plan_job() for stream in pending.values()]
    return dict(zip(pending, train_jobs(jobs, device, watcher, stack=stack), strict=True))


def _make_training(
    stream: StreamRun, watcher: EpochWatcher, device: torch.device, trained: TrainedRun | None
) -> Callable[[Path], Mapping[str, Any]]:
    def make(folder: Path) -> Mapping[str, Any]:
        job = stream.plan_job()
        run = trained
        if run is None:
            [run] = train_jobs([job], device, watcher)
        header = {
            "echoshift": "audio-infused recogniser",
            "classes": json.dumps(list(stream.request.card.classes)),
            "config": json.dumps(stream.config.describe(), sort_keys=True),
            "stream": stream.stream.inputs.key,
        }
        write_tensors(folder / CHECKPOINT, run.state, header)
        if stream.tracks_epochs:
            _write_arrays(folder / EPOCHS, run.predictions)
        return {"n_steps": job.schedule.n_steps, "losses": run.losses.tolist(), "loss_names": list(run.loss_names)}

    return make


def _predict(
    planned: PlannedStage2,
    stream: StreamRun,
    training: StepResult,
    rule: SelectionRule,
    split: TestSplit,
    device: torch.device,
) -> StepResult:
    """Predicts the target's test segments by the weights that a rule chooses."""
    inputs = {"recogniser": training.key, "test": hash_json(split.segment_ids)}
    settings: dict[str, Any] = {"rule": rule, "sound": planned.request.config.test.sound}
    if planned.request.config.test.sound == "missing":
        inputs["without sound"] = stream.stream.inputs.without_sound_key
    if rule == "target_oracle":
        inputs["target labels (oracle)"] = hash_json(split.test.labels.tolist())

    def make(folder: Path) -> Mapping[str, Any]:
        if rule == "last":
            rows, index, domain = stream.list_predicted()[TARGET_TEST]
            method = _load_recogniser(stream, training.folder / CHECKPOINT).to(device)
            recogniser = stream.config.recogniser
            probabilities = predict_rows(
                method,
                rows,
                index,
                domain,
                device,
                one_clip=recogniser.clips == "each",
                over_clips=recogniser.over_clips,
            )
            chosen: dict[str, Any] = {}
        else:
            probabilities, chosen = _choose_epoch(planned, stream, training.folder / EPOCHS, rule, split)
        _write_arrays(folder / PREDICTIONS, {"probabilities": probabilities})
        return {"n_segments": len(probabilities), **chosen}

    return planned.runner.run(Step("recogniser_predictions", 1, settings, inputs), make)


def _load_recogniser(stream: StreamRun, path: Path) -> nn.Module:
    method = stream.build()
    tensors, expected = read_tensors(path), method.state_dict()
    check_tensors(tensors, expected, str(path))
    method.load_state_dict(tensors)
    return method.eval()


def _choose_epoch(
    planned: PlannedStage2, stream: StreamRun, path: Path, rule: SelectionRule, split: TestSplit
) -> tuple[np.ndarray, dict[str, Any]]:
    """Chooses the first of the best epochs: on the source's validation split, or (oracle) on what is scored."""
    with np.load(path, allow_pickle=False) as arrays:
        epochs = arrays[TARGET_TEST]
        if rule == "source_val" and SOURCE_VAL not in arrays:
            raise RunError(f"{stream.title}: the source has no test split to validate on; use the rule last")
        seen = arrays[SOURCE_VAL] if rule == "source_val" else epochs
    labelled = planned.splits.source_val if rule == "source_val" else split.test
    has_audio = np.array([planned.has_audio[s.segment_id] for s in labelled.segments], dtype=bool)
    classes = planned.request.card.classes
    scores = [compute_scores(p, labelled.labels, has_audio, classes).main.value or 0.0 for p in seen]
    best = int(np.argmax(scores))
    return epochs[best], {"epoch": best, "score": scores[best]}


def _score(planned: PlannedStage2, predicted: Mapping[str, StepResult], split: TestSplit) -> StepResult:
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


def _check_classes(table: PredictionTable, request: Stage2Request, place: str) -> None:
    if table.classes != request.card.classes:
        raise RunError(
            f"{place} has the classes {', '.join(table.classes)}, the card of {request.card.name} has "
            f"{', '.join(request.card.classes)}; run Stage 1 with this card"
        )


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
