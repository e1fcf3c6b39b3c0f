"""Plans a run of alignment: which segments have features, and what each network trains."""

from __future__ import annotations

from collections.abc import Callable

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.opening import open_store
from echoshift.train.alignment.alignment_runs import AlignmentRequest, AlignmentRun, split_by_setting
from echoshift.train.planned_training import PlannedTraining
from echoshift.train.prediction_table import read_prediction_table
from echoshift.train.splits import (
    TEST,
    keep_segments,
    label_target_train,
    list_segment_ids,
    select_labelled,
    split_for_shift,
)
from echoshift.train.stage2.stage1_outputs import StreamInputs
from echoshift.train.steps import StepRunner


def plan_alignment(request: AlignmentRequest, notify: Callable[[str], None] = lambda message: None) -> PlannedTraining:
    """Look which segments have features, and plans a run's steps; those without are left out.

    Raises RunError where nothing is left of a part that training needs.
    """
    setting = request.config.alignment.setting
    splits = split_for_shift(request.manifest, request.card, request.shift)
    wanted = list_segment_ids(splits)
    tests = [segment.segment_id for segment in request.manifest if segment.split == TEST]
    kept, has_audio = {*wanted, *tests}, dict.fromkeys({*wanted, *tests}, True)
    for inputs in request.inputs.values():
        there = _find_done(inputs)
        kept &= set(there)
        has_audio.update({segment_id: heard for segment_id, heard in there.items() if segment_id in has_audio})
    left_out = tuple(segment_id for segment_id in wanted if segment_id not in kept)
    splits = keep_segments(splits, kept)
    own_ids = [segment.segment_id for segment in splits.target_train]
    own = splits.source_train
    if setting == "supervised":
        own = select_labelled(label_target_train(request.manifest, request.card, request.shift, own_ids), kept)
    source, target = split_by_setting(request.config.alignment, splits, own)
    for what, part in (("train segment", source.segments), ("test segment of the target", splits.target_test)):
        if not part:
            raise RunError(f"{request.title}: no {what} has features; extract {request.card.name}")
    if setting == "uda" and not target:
        raise RunError(f"{request.title}: the target has no train segment with features; extract them")
    if left_out:
        notify(f"{request.title}: {len(left_out)} segments without features left out: {left_out[0]} …")
    tested = tuple(segment_id for segment_id in tests if segment_id in kept)
    return PlannedTraining(
        stage="alignment",
        card=request.card,
        manifest=request.manifest,
        shift=request.shift,
        seed=request.seed,
        row=request.row,
        described=request.described,
        rules=request.config.scoring.rules,
        runs_dir=request.runs_dir,
        fingerprints={name: inputs.features.stem for name, inputs in request.inputs.items()},
        splits=splits,
        left_out=left_out,
        has_audio=has_audio,
        networks=tuple(AlignmentRun(request, name, source, target, tested) for name in request.inputs),
        runner=StepRunner(request.runs_dir / "steps", request.rerun, notify),
    )


def _find_done(inputs: StreamInputs) -> dict[str, bool]:
    """Find the segments of which a network has all it reads, and whether each has sound."""
    store = open_store(inputs.features)
    done = {s for s, state in zip(store.segment_ids, store.read_array("state"), strict=True) if state == DONE}
    if inputs.table is not None:
        table = read_prediction_table(inputs.table)
        heard = dict(zip(table.segment_ids, table.has_audio.tolist(), strict=True))
    else:
        assert inputs.sound is not None, "a network reads sound from a table or from a store"
        sound = open_store(inputs.sound)
        states, has_audio = sound.read_array("state"), sound.read_array("has_audio")
        rows = zip(sound.segment_ids, states, has_audio, strict=True)
        heard = {segment_id: bool(audible) for segment_id, state, audible in rows if state == DONE}
    return {segment_id: is_heard for segment_id, is_heard in heard.items() if segment_id in done}
