"""A run of Stage 1 for one shift and seed: its steps, the scores on the target, the record (METHODS section 5)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from echoshift.pipeline.devices import describe_device, keep_freed_memory, resolve_device
from echoshift.pipeline.specs import fingerprint
from echoshift.train.predictions import Predictions
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
from echoshift.train.splits import count_labels, split_for_shift
from echoshift.train.stage1.encoder import CHECKPOINT
from echoshift.train.stage1.inputs import list_segments, list_train_segments, open_run_inputs
from echoshift.train.stage1.losses import check_n_absent
from echoshift.train.stage1.steps import (
    PREDICTIONS,
    TABLE,
    RunContext,
    Stage1Request,
    export_store,
    predict,
    write_table,
)
from echoshift.train.steps import StepRunner
from echoshift.train.watching import EpochWatcher

N_CLASSES_LISTED = 20
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
    """Outcome of a run; without export no `table` and no `features`."""

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
    context = _open_context(request, watcher, notify, ranks or Ranks())
    inputs = context.inputs
    if context.ranks.is_first:
        for line in describe_data(context):
            notify(line)
    with context.clips:
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
            request.config.sound.encoder: inputs.audio_name,
            request.config.visual.encoder: fingerprint(inputs.train.spec),
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
        if known is None or _identify(known) != _identify(record):
            append_run(results, record)
    checkpoint = context.results["encoder"].folder / CHECKPOINT
    return Stage1Outcome(record, checkpoint, table, features, inputs.left_out)


def _identify(record: RunRecord) -> tuple[object, ...]:
    """Return what makes two records of the same configuration, shift and seed results of their own."""
    return record.steps, record.row, record.manifest_sha256


def _open_context(
    request: Stage1Request, watcher: EpochWatcher, notify: Callable[[str], None], ranks: Ranks
) -> RunContext:
    """Split the manifest, open what the run reads (of several processes the first extracts what is missing)."""
    config, places = request.config, request.places
    splits = split_for_shift(
        places.manifest,
        places.card,
        request.shift,
        use_tags=config.target_labels.use_tags,
        labelled_fraction=config.target_labels.labelled_fraction,
        pairs=config.target_labels.pairs,
    )
    if places.card.task == "single-label" and config.absent.weight and splits.target_train:
        check_n_absent(config.absent.n_absent, len(places.card.classes))  # before anything is extracted
    if not ranks.is_first:
        ranks.wait()
    inputs = open_run_inputs(places, splits, config, watcher, notify)
    if ranks.is_first:
        ranks.wait()
    device = resolve_device(ranks.choose_device(places.device))
    if device.type == "cpu":
        keep_freed_memory()
    return RunContext(
        request=request,
        inputs=inputs,
        clips=inputs.open_training_clips(request.seed, device),
        runner=StepRunner(request.runs_dir / "steps", request.rerun, notify),
        ranks=ranks,
        watcher=watcher,
        device=device,
    )


def describe_data(context: RunContext) -> list[str]:
    """Describe what a run trains on: split by split, with the source's class counts, a line each."""
    splits, shift, classes = context.splits, context.request.shift, context.card.classes
    counts = count_labels(splits.source_train.labels, len(classes))
    by_class = ", ".join(f"{name} {n}" for name, n in zip(classes, counts.tolist(), strict=True))
    if len(classes) > N_CLASSES_LISTED:
        by_class = f"{len(classes)} classes, of each {counts.min()} to {counts.max()}"
    silent = (~context.inputs.audio.has_audio([s.segment_id for s in splits.target_test])).sum()
    lines = [
        f"source {'+'.join(shift.source)}, {len(splits.source_train)} train segments ({by_class}), "
        f"{len(splits.source_val)} for validation",
        f"target {shift.target}, {len(splits.target_train)} unlabelled train segments, "
        f"{len(splits.target_labelled)} labelled, {len(splits.target_test)} test segments, {silent} of them silent",
    ]
    absent = [name for name, n in zip(classes, counts.tolist(), strict=True) if not n]
    if absent:
        more = f" and {len(absent) - N_CLASSES_LISTED} other classes" if len(absent) > N_CLASSES_LISTED else ""
        lines.append(f"the source has no train segment of {', '.join(absent[:N_CLASSES_LISTED])}{more}")
    left_out = context.inputs.left_out
    if left_out:
        lines.append(f"{len(left_out)} segments without features left out: {left_out[0]} …")
    return [f"{shift.name}: {line}" for line in lines]


def _score(context: RunContext) -> Scores:
    """Score the target's test split under the rule `last`: the only place that reads its labels."""
    splits, config, inputs = context.splits, context.config, context.inputs
    ids = [segment.segment_id for segment in splits.target_test]
    split = open_test_split(
        context.request.places.manifest, context.card, context.request.shift, ids, splits.source_train
    )
    without_audio = config.evaluation.sound == "missing"
    predictions = predict(context, config.visual.test_preset, splits.target_test, without_audio=without_audio)
    named = {"predictions": predictions.key, "sound": inputs.name_audio(split.test.segments)}
    make = make_scores(
        split,
        lambda: Predictions.read(predictions.folder / PREDICTIONS).select(split.segment_ids).probabilities,
        inputs.audio.has_audio(split.segment_ids),
    )
    return Scores.model_validate(dict(context.run(plan_scores_step(split, named), make).outcome))


def _export(context: RunContext) -> tuple[Path, tuple[Path, ...]]:
    """Write adapted features of every split, and the table that Stage 2 begins with."""
    config, splits = context.config, context.splits
    export, test_preset = config.export, config.visual.test_preset
    features = export_store(context, "features", test_preset, list_segments(splits))
    written = [features]
    if export.train_preset:
        written.append(export_store(context, "train_features", export.train_preset, list_train_segments(splits)))
    if config.evaluation.sound == "missing" and config.attention.enabled:
        name = "features_without_sound"
        written.append(export_store(context, name, test_preset, splits.target_test, without_audio=True))
    labels = features
    if export.label_preset != test_preset and splits.target_train:
        labels = predict(context, export.label_preset, splits.target_train, name="label_predictions")
    table = write_table(context, features, labels)
    return table.folder / TABLE, tuple(result.folder / str(result.outcome["store"]) for result in written)
