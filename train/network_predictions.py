"""Predicts with the networks of a run: after each snapshot, and by the weights that a selection rule chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.tensor_files import check_tensors, read_tensors
from echoshift.train.cached.feature_bank import Rows
from echoshift.train.cached.predicting import predict_rows
from echoshift.train.cached.training import TrainedRun
from echoshift.train.planned_training import MethodRun, PlannedTraining
from echoshift.train.scores import compute_scores
from echoshift.train.scoring import TestSplit
from echoshift.train.selection_rules import SelectionRule
from echoshift.train.steps import Step, StepResult, hash_json

CHECKPOINT, EPOCHS, PREDICTIONS = "trained.safetensors", "epochs.npz", "predictions.npz"
TARGET_TEST, SOURCE_VAL = "target_test", "source_val"


def predict_network(
    planned: PlannedTraining,
    network: MethodRun,
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
            raise RunError(f"{network.title}: {training.folder} kept no predictions for the rule {rule}; run it anew")
        elif rule == "last":
            probabilities = epochs[-1]
        elif rule == "mean_last":
            probabilities = epochs
        else:
            best, chosen = _choose_epoch(planned, network, training.folder / EPOCHS, rule, split)
            probabilities = epochs[best]
        write_arrays(folder / PREDICTIONS, {"probabilities": probabilities})
        return {"n_segments": len(split.segment_ids), **chosen}

    return planned.runner.run(Step("predicted", 1, settings, inputs), make)


def _load(network: MethodRun, path: Path) -> nn.Module:
    method = network.build()
    tensors, expected = read_tensors(path), method.state_dict()
    check_tensors(tensors, expected, str(path))
    method.load_state_dict(tensors)
    return method.eval()


def _choose_epoch(
    planned: PlannedTraining, network: MethodRun, path: Path, rule: SelectionRule, split: TestSplit
) -> tuple[int, dict[str, Any]]:
    """Choose the first of the best epochs: on the source's validation split, or (oracle) on what is scored."""
    on_source = rule == "source_val"
    labelled = planned.splits.source_val if on_source else split.test
    ids = [segment.segment_id for segment in labelled.segments]
    seen = _read_epochs(path, SOURCE_VAL if on_source else TARGET_TEST, ids)
    if seen is None:
        raise RunError(f"{network.title}: the source has no test split to validate on; use the rule last")
    has_audio = np.array([planned.has_audio[segment_id] for segment_id in ids], dtype=bool)
    classes = planned.card.classes
    scores = [compute_scores(p, labelled.labels, has_audio, classes).main.value or 0.0 for p in seen]
    best = int(np.argmax(scores))
    return best, {"epoch": best, "score": scores[best]}


def predict_snapshots(network: MethodRun, run: TrainedRun, device: torch.device) -> dict[str, np.ndarray]:
    """Predict with each of the weights that a run kept, now that it is trained; float32 [snapshots, n, K] by name."""
    method = network.build().to(device).eval()
    found: dict[str, list[np.ndarray]] = {}
    for state in (*run.snapshots, run.state):
        method.load_state_dict(state)
        for name, (rows, index, domain) in network.list_predicted().items():
            found.setdefault(name, []).append(
                predict_rows(
                    method, rows, index, domain, device, one_clip=network.one_clip, over_clips=network.over_clips
                )
            )
    return {name: np.stack(parts) for name, parts in found.items()}


def list_ids(rows: Rows, index: np.ndarray) -> np.ndarray:
    """List the ids of rows of features."""
    return np.array([rows.segment_ids[row] for row in index.tolist()])


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


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as .npz in one step."""
    fresh = path.with_name(f"{path.name}.partial.npz")
    np.savez(fresh, **arrays)  # type: ignore[arg-type]  # its stubs take names for options
    fresh.replace(path)
