"""Reads what the steps of finished runs of Stage 1 left: losses, interaction clusters, absent activities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest
from echoshift.train.runs import RunRecord
from echoshift.train.splits import find_shift, keep_segments, label_target_train, split_for_shift
from echoshift.train.steps import RECORD

STAGE1 = "stage1"


@dataclass(frozen=True, slots=True)
class LossCurve:
    """A loss by epoch; `values` of epochs without one are None."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class ClusteredClass:
    """How a class's sounds were grouped: sizes of its clusters, the largest first, and segments without sound."""

    name: str
    n_samples: int
    sizes: tuple[int, ...]
    n_silent: int
    note: str


@dataclass(frozen=True, slots=True)
class AbsentClass:
    """How often a class was marked absent, and how often rightly: the segment's labels lack it.

    `n_lacking` of all segments lack it: the share that marks at random would have right.
    """

    name: str
    n_marks: int
    n_right: int
    n_lacking: int


@dataclass(frozen=True, slots=True)
class AbsentFacts:
    """What was marked absent in the target's train split, held against its labels: analysis, no training reads it.

    `fault` says why `classes` is empty, "" where it isn't.
    """

    n_segments: int
    classes: tuple[AbsentClass, ...]
    fault: str = ""

    @property
    def accuracy(self) -> float | None:
        """The share of marks that are right; None where there is no mark."""
        n_marks = sum(found.n_marks for found in self.classes)
        return sum(found.n_right for found in self.classes) / n_marks if n_marks else None


@dataclass(frozen=True, slots=True)
class Stage1Facts:
    """One run of Stage 1; what the run had no use for is empty or None, `lost` names steps whose folder is gone."""

    row: str
    shift: str
    seed: int
    config_hash: str
    losses: tuple[LossCurve, ...]
    validation: LossCurve | None
    audio_losses: LossCurve | None
    clusters: tuple[ClusteredClass, ...]
    clusters_key: str
    absent: AbsentFacts | None
    absent_key: str
    duration_s: float
    lost: tuple[str, ...]

    @property
    def variant(self) -> tuple[str, str]:
        """What seeds of the same runs have in common: configuration and shift."""
        return self.config_hash, self.shift


def read_stage1_facts(
    records: Iterable[RunRecord], runs_dir: Path, manifest: Manifest, card: DatasetCard
) -> list[Stage1Facts]:
    """Read the facts of each run of Stage 1 among the records, in their order; train and compute nothing anew."""
    return [_read_facts(record, runs_dir, manifest, card) for record in records if record.stage == STAGE1]


def _read_facts(record: RunRecord, runs_dir: Path, manifest: Manifest, card: DatasetCard) -> Stage1Facts:
    found: dict[str, Mapping[str, Any]] = {}
    lost = []
    for name in ("encoder", "audio_classifier", "clusters", "absent_labels"):
        if name in record.steps:
            outcome = _read_outcome(runs_dir, name, record.steps[name])
            if outcome is None:
                lost.append(name)
            else:
                found[name] = outcome
    epochs = found.get("encoder", {}).get("epochs", [])
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch["losses"]))
    validation = LossCurve("source validation", tuple(epoch["source_validation"] for epoch in epochs))
    audio = found.get("audio_classifier", {}).get("losses", ())
    return Stage1Facts(
        row=record.row,
        shift=record.shift,
        seed=record.seed,
        config_hash=record.config_hash,
        losses=tuple(LossCurve(name, tuple(epoch["losses"].get(name) for epoch in epochs)) for name in names),
        validation=validation if any(value is not None for value in validation.values) else None,
        audio_losses=LossCurve("audio classifier", tuple(audio)) if audio else None,
        clusters=tuple(
            ClusteredClass(c["name"], c["n_samples"], tuple(c["sizes"]), c["n_silent"], c["note"])
            for c in found.get("clusters", {}).get("classes", [])
        ),
        clusters_key=record.steps.get("clusters", ""),
        absent=_read_absent(record, runs_dir, manifest, card) if "absent_labels" in found else None,
        absent_key=record.steps.get("absent_labels", ""),
        duration_s=record.duration_s,
        lost=tuple(lost),
    )


def _read_outcome(runs_dir: Path, name: str, key: str) -> Mapping[str, Any] | None:
    """Read what a step's record says of its outcome; None where the folder is gone."""
    path = runs_dir / "steps" / f"{name}-{key}" / RECORD
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))["outcome"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} isn't a step's record: {error}; delete the folder and run again") from error
    return dict(outcome)


def _read_absent(record: RunRecord, runs_dir: Path, manifest: Manifest, card: DatasetCard) -> AbsentFacts:
    steps = runs_dir / "steps"
    if record.shift not in [shift.name for shift in card.shifts]:
        return AbsentFacts(0, (), "the card has this shift no more, so its marks can't be held against labels")
    try:
        marks = np.load(steps / f"absent_labels-{record.steps['absent_labels']}" / "absent.npy", allow_pickle=False)
        ids = _list_marked(record, steps, manifest, card)
    except FileNotFoundError as error:
        return AbsentFacts(0, (), f"{error.filename} is gone, so the marks can't be read")
    if len(ids) != len(marks) or record.manifest_sha256 != manifest.sha256:
        return AbsentFacts(len(marks), (), "the run is of another manifest, so its marks can't be held against labels")
    labels = label_target_train(manifest, card, find_shift(card, record.shift), ids).labels
    return AbsentFacts(len(marks), count_right_marks(marks, labels, card.classes))


def count_right_marks(marks: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> tuple[AbsentClass, ...]:
    """Count, class by class, the marks and those that are right.

    `marks` bool [n, K]; `labels` int64 [n] or 0 and 1 [n, K]. A mark is right where the segment lacks the class.
    """
    has = labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(len(classes))[None]
    right = marks & ~has
    return tuple(
        AbsentClass(name, int(marks[:, k].sum()), int(right[:, k].sum()), int((~has[:, k]).sum()))
        for k, name in enumerate(classes)
    )


def _list_marked(record: RunRecord, steps: Path, manifest: Manifest, card: DatasetCard) -> list[str]:
    """List the segments that the marks are of: the target's unlabelled train split as far as the run had features."""
    chosen = record.config.get("target_labels", {})
    splits = split_for_shift(
        manifest,
        card,
        find_shift(card, record.shift),
        use_tags=chosen.get("use_tags", False),
        labelled_fraction=chosen.get("labelled_fraction"),
        pairs=chosen.get("pairs", "all"),
    )
    path = steps / f"audio_predictions-{record.steps['audio_predictions']}" / "predictions.npz"
    with np.load(path, allow_pickle=False) as arrays:
        kept = set(arrays["segment_ids"].tolist())
    return [segment.segment_id for segment in keep_segments(splits, kept).target_train]
