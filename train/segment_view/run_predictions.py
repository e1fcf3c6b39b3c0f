"""Reads what finished runs predicted, segment by segment, from what they stored; nothing is predicted anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest
from echoshift.train.predictions import PredictionTable, read_prediction_table
from echoshift.train.runs import RunRecord
from echoshift.train.scores import read_hits
from echoshift.train.splits import TEST, find_shift
from echoshift.train.steps import RECORD, hash_json

_TABLE, _PREDICTIONS = "table.parquet", "predictions.npz"


@dataclass(frozen=True, slots=True, eq=False)
class StoredPredictions:
    """What one network, or the mean of a run's networks, says of n segments.

    Attributes:
        probabilities: float32 [n, K].
        pseudo_labels: int64 [n], -1 where there is none; None where the run makes none.
        is_heard: bool [n], of who hears alone: rows where it is False mean nothing.
    """

    speaker: Literal["sound", "pictures", "recogniser", "alignment"]
    row_of: Mapping[str, int]
    probabilities: np.ndarray
    pseudo_labels: np.ndarray | None = None
    is_heard: np.ndarray | None = None


class PredictionReader:
    """Reads the stored predictions of the runs of one dataset, each file once."""

    def __init__(self, runs_dir: Path, card: DatasetCard, manifest: Manifest) -> None:
        self._steps = runs_dir / "steps"
        self._card, self._manifest = card, manifest
        self._read_table = lru_cache(maxsize=None)(read_prediction_table)

    def read(self, record: RunRecord) -> tuple[StoredPredictions, ...]:
        """Read a run's; raises RunError where its steps were deleted or don't say whose predictions they are."""
        if record.stage == "stage1":
            return tuple(self._read_stage1(record))
        return (self._read_networks(record),)

    def _read_stage1(self, record: RunRecord) -> Iterator[StoredPredictions]:
        key = record.steps.get("table")
        path = None if key is None else self._steps / f"table-{key}" / _TABLE
        if path is not None and path.is_file():
            table: PredictionTable = self._read_table(path)
            row_of = _number(table.segment_ids)
            yield StoredPredictions("sound", row_of, table.audio_probabilities, is_heard=table.has_audio)
            yield StoredPredictions("pictures", row_of, table.visual_probabilities, table.pseudo_labels)
            return
        heard = self._find(record, "audio_predictions")
        if heard is not None:
            arrays = _read_arrays(heard)
            ids = arrays["segment_ids"].tolist()
            yield StoredPredictions("sound", _number(ids), arrays["probabilities"], is_heard=arrays["has_audio"])
        seen = self._find(record, "predictions")
        if seen is None:
            raise RunError(f"{describe_run(record)}: its predictions are no longer in {self._steps}")
        arrays = _read_arrays(seen)
        yield StoredPredictions("pictures", _number(arrays["segment_ids"].tolist()), arrays["probabilities"])

    def _read_networks(self, record: RunRecord) -> StoredPredictions:
        parts, ids = [], None
        for name in (name for name in record.steps if name.startswith("predictions_")):
            path = self._find(record, name)
            if path is None:
                raise RunError(f"{describe_run(record)}: its predictions are no longer in {self._steps}")
            found = _read_arrays(path)["probabilities"]
            parts.append(np.asarray(found if found.ndim == 2 else found.mean(axis=0)))
            ids = ids or self._identify(record, path.parent)
        if not parts or ids is None:
            raise RunError(f"{describe_run(record)}: it doesn't say of which segments its predictions are; run it anew")
        speaker: Literal["recogniser", "alignment"] = "recogniser" if record.stage == "stage2" else "alignment"
        mean = np.asarray(np.mean(parts, axis=0, dtype=np.float64))
        return StoredPredictions(speaker, _number(ids), mean.astype(np.float32))

    def _find(self, record: RunRecord, name: str) -> Path | None:
        """Find the predictions of a step by its key, whatever the step is called."""
        key = record.steps.get(name)
        folders = [] if key is None else sorted(self._steps.glob(f"*-{key}"))
        return next((folder / _PREDICTIONS for folder in folders if (folder / _PREDICTIONS).is_file()), None)

    def _identify(self, record: RunRecord, folder: Path) -> list[str] | None:
        """Find the ids of a run's test segments, in order: those whose hash the step of predictions was named by."""
        try:
            wanted = json.loads((folder / RECORD).read_text(encoding="utf-8"))["inputs"]["test"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{folder / RECORD} isn't a step's record; delete the folder and run again") from error
        hits = read_hits(self._steps / f"scores-{record.steps.get('scores', '')}")
        target = find_shift(self._card, record.shift).target
        of_manifest = [s.segment_id for s in self._manifest if s.domain == target and s.split == TEST]
        for ids in ([] if hits is None else hits[0], of_manifest):
            if hash_json(ids) == wanted:
                return ids
        return None


def describe_run(record: RunRecord) -> str:
    """Name a run for people: stage, method (unless Stage 1's own), shift, seed, row, and the rule unless `last`."""
    method = find_method(record) or find_objective(record)
    stage = f"{record.stage} {method}" if method else record.stage
    row = f", {record.row}" if record.row else ""
    rule = "" if record.selection == "last" else f", rule {record.selection}"
    return f"{stage} {record.shift}, seed {record.seed}{row}{rule}"


def find_method(record: RunRecord) -> str:
    """Return the method of a run of alignment, "" of another stage's."""
    alignment = record.config.get("alignment", {}) if record.stage == "alignment" else {}
    return str(alignment.get("alignment", {}).get("method", ""))


def find_objective(record: RunRecord) -> str:
    """Return the method by which a run of Stage 1 was trained end to end, "" where it is Stage 1's own."""
    objective = record.config.get("objective", {}) if record.stage == "stage1" else {}
    return str(objective.get("method", "")) if objective.get("enabled") else ""


def _number(segment_ids: Sequence[str]) -> dict[str, int]:
    return {segment_id: row for row, segment_id in enumerate(segment_ids)}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
