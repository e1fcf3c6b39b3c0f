"""Runs Stage 1 for one shift and seed: its steps, the scores on the target, the record (METHODS section 5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from echoshift.pipeline.devices import describe_device
from echoshift.pipeline.specs import fingerprint
from echoshift.train.ranks import Ranks
from echoshift.train.runs import (
    RESULTS,
    RunRecord,
    append_run,
    describe_code_version,
    hash_config,
    keep_latest,
    read_runs,
)
from echoshift.train.scores import Scores, make_scores, open_test_split, plan_scores_step
from echoshift.train.stage1.audio_classifier import AudioPredictions
from echoshift.train.stage1.encoder_steps import CHECKPOINT, export_store, predict
from echoshift.train.stage1.exporting import VisualPredictions
from echoshift.train.stage1.prediction_table import write_prediction_table
from echoshift.train.stage1.run_context import RunContext, Stage1Request, describe_data, open_context
from echoshift.train.stage1.run_inputs import list_segments, list_train_segments
from echoshift.train.stage1.sound_steps import PREDICTIONS, predict_sound
from echoshift.train.steps import Step
from echoshift.train.watching import EpochWatcher

TABLE = "table.parquet"
STEPS = (
    "audio_classifier",
    "audio_predictions",
    "clusters",
    "absent_labels",
    "encoder",
    "predictions",
    "features",
    "table",
    "scores",
)


@dataclass(frozen=True, slots=True)
class Stage1Outcome:
    """What a run came to; `table` and `features` are there where they were asked for."""

    record: RunRecord
    checkpoint: Path
    table: Path | None
    features: tuple[Path, ...]
    left_out: tuple[str, ...]


def run_stage1(
    request: Stage1Request,
    watcher: EpochWatcher,
    notify: Callable[[str], None] = lambda message: None,
    ranks: Ranks | None = None,
) -> Stage1Outcome:
    """Run whatever isn't done yet, and append the run to the results.

    Of the target's labels none is read but, for the scores, those of its test split. Raises RunError, and what
    extraction raises.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    context = open_context(request, watcher, notify, ranks or Ranks())
    if context.ranks.is_first:
        for line in describe_data(context):
            notify(line)
    with context.visual:
        scores = _score(context)
        table, features = _export(context) if request.export else (None, ())
    config = request.config.describe()
    record = RunRecord(
        dataset=context.card.name,
        stage="stage1",
        shift=request.shift.name,
        seed=request.seed,
        row=request.row,
        config=config,
        config_hash=hash_config(config),
        steps={name: result.key for name, result in context.results.items()},
        fingerprints={
            request.config.sound.encoder: context.inputs.sound_name,
            request.config.visual.encoder: fingerprint(context.inputs.train.spec),
        },
        manifest_sha256=request.places.manifest.sha256,
        code_version=describe_code_version(),
        selection="last",
        scores=scores,
        started=started,
        ended=datetime.now(UTC),
        duration_s=round(time.perf_counter() - clock, 3),
        device=describe_device(context.device),
    )
    if context.ranks.is_first:
        results = request.runs_dir / RESULTS
        known = keep_latest(read_runs(results)).get(record.key)
        if known is None or _tell_apart(known) != _tell_apart(record):
            append_run(results, record)
    checkpoint = context.results["encoder"].folder / CHECKPOINT
    return Stage1Outcome(record, checkpoint, table, features, context.inputs.left_out)


def _tell_apart(record: RunRecord) -> tuple[object, ...]:
    """Return what makes two records of the same configuration, shift and seed results of their own."""
    return record.steps, record.row, record.manifest_sha256


def _score(context: RunContext) -> Scores:
    """Score the target's test split under the rule `last`: the only place that reads its labels."""
    request, splits = context.request, context.splits
    split = open_test_split(
        request.places.manifest,
        context.card,
        request.shift,
        [segment.segment_id for segment in splits.target_test],
        splits.source_train,
    )
    without_sound = context.config.evaluation.sound == "missing"
    preset = context.config.visual.test_preset
    predictions = predict(context, preset, splits.target_test, without_sound=without_sound)
    inputs = {"predictions": predictions.key, "sound": context.inputs.name_sound(split.test.segments)}
    make = make_scores(
        split,
        lambda: VisualPredictions.read(predictions.folder / PREDICTIONS).select(split.segment_ids),
        context.inputs.sound.has_audio(split.segment_ids),
    )
    return Scores.model_validate(dict(context.run(plan_scores_step(split, inputs), make).outcome))


def _export(context: RunContext) -> tuple[Path, tuple[Path, ...]]:
    """Write adapted features of every split, and the table that Stage 2 begins with."""
    export, visual, splits = context.config.export, context.config.visual, context.splits
    segments = list_segments(splits)
    features = export_store(context, "features", visual.test_preset, segments)
    stores = [features.folder / str(features.outcome["store"])]
    if export.train_preset:
        of_train = export_store(context, "train_features", export.train_preset, list_train_segments(splits))
        stores.append(of_train.folder / str(of_train.outcome["store"]))
    if context.config.evaluation.sound == "missing" and context.config.attention.enabled:
        silent = export_store(
            context, "features_without_sound", visual.test_preset, splits.target_test, without_sound=True
        )
        stores.append(silent.folder / str(silent.outcome["store"]))
    labels = features
    if export.label_preset != visual.test_preset and splits.target_train:
        labels = predict(context, export.label_preset, splits.target_train, name="label_predictions")
    audio = predict_sound(context)
    step = Step(
        "table",
        2,
        {"classes": list(context.card.classes), "task": context.card.task},
        {"features": features.key, "labels": labels.key, "audio": audio.key},
    )

    def make(folder: Path) -> Mapping[str, Any]:
        pseudo_labelled = [] if context.multi_label else [segment.segment_id for segment in splits.target_train]
        write_prediction_table(
            folder / TABLE,
            segments,
            context.card.classes,
            AudioPredictions.read(audio.folder / PREDICTIONS),
            VisualPredictions.read(features.folder / PREDICTIONS),
            VisualPredictions.read(labels.folder / PREDICTIONS),
            pseudo_labelled,
        )
        return {"n_segments": len(segments), "n_pseudo_labels": len(pseudo_labelled)}

    return context.run(step, make).folder / TABLE, tuple(stores)
