"""Plans a run of Stage 2: which segments have features, and what each stream trains."""

from __future__ import annotations

from collections.abc import Callable

from echoshift.pipeline.errors import RunError
from echoshift.train.planned_training import PlannedTraining
from echoshift.train.prediction_table import PredictionTable, read_prediction_table
from echoshift.train.splits import keep_segments, list_segment_ids, split_for_shift
from echoshift.train.stage2.requests import Stage2Request
from echoshift.train.stage2.stream_runs import StreamRun
from echoshift.train.steps import StepRunner


def plan_stage2(request: Stage2Request, notify: Callable[[str], None] = lambda message: None) -> PlannedTraining:
    """Read the tables of a run's streams and plans its steps.

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
    return PlannedTraining(
        stage="stage2",
        card=request.card,
        manifest=request.manifest,
        shift=request.shift,
        seed=request.seed,
        row=request.row,
        described=request.described,
        rules=request.config.selection.rules,
        runs_dir=request.runs_dir,
        fingerprints={stream.name: stream.inputs.features.stem for stream in request.streams},
        splits=splits,
        left_out=left_out,
        has_audio=has_audio,
        networks=streams,
        runner=runner,
    )


def _check_classes(table: PredictionTable, request: Stage2Request, place: str) -> None:
    if table.classes != request.card.classes:
        raise RunError(
            f"{place} has the classes {', '.join(table.classes)}, the card of {request.card.name} has "
            f"{', '.join(request.card.classes)}; run Stage 1 with this card"
        )
