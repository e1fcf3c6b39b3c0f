"""Ties Stage 2 and alignment to what they read: which runs of Stage 1 they need, and where the features lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echoshift.pipeline.cards import Shift
from echoshift.train.data_places import DataPlaces
from echoshift.train.runs import RESULTS, RunRecord, hash_config, read_runs
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage2.stage1_outputs import (
    StreamInputs,
    find_cached,
    find_stage1_outputs,
    has_stage1_outputs,
    name_files,
)

if TYPE_CHECKING:
    from echoshift.train.planned_training import PlannedTraining
    from echoshift.train.stage_settings import RunSettings


@dataclass(frozen=True, slots=True)
class NeededStage1:
    """One run of Stage 1 that a run of Stage 2 reads."""

    config: Stage1Config
    shift: Shift
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Tell runs apart: hash of the configuration, shift, seed."""
        return hash_config(self.config.describe()), self.shift.name, self.seed


def list_needed(
    settings: RunSettings, shift: Shift, seed: int, runs_dir: Path, records: Sequence[RunRecord] | None = None
) -> list[NeededStage1]:
    """List the runs of Stage 1 that a run lacks; `records` are those of the results file, if read."""
    known = read_runs(runs_dir / RESULTS) if records is None else records
    needed = {}
    for stream in settings.streams:
        if stream.reads_stage1:
            run = NeededStage1(stream.stage1, shift, seed)
            if not has_stage1_outputs(runs_dir, known, *run.key):
                needed[run.key] = run
    return list(needed.values())


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
    inputs = _find_inputs(places, settings, shift, seed, runs_dir)
    described = settings.describe()
    if settings.stage == "stage2":
        return _plan_stage2(places, settings, shift, seed, runs_dir, row, rerun, inputs, described, notify)
    from echoshift.train.alignment.alignment_runs import AlignmentRequest
    from echoshift.train.alignment.planning import plan_alignment
    from echoshift.train.alignment.stage_config import AlignmentStageConfig

    assert isinstance(settings.config, AlignmentStageConfig), "settings of alignment"
    configs = {s.stream.name: s.config for s in settings.streams if isinstance(s.config, AlignmentStageConfig)}
    request = AlignmentRequest(
        places.card,
        places.manifest,
        shift,
        seed,
        settings.config,
        inputs,
        configs,
        described,
        runs_dir,
        row,
        rerun,
    )
    return plan_alignment(request, notify)


def _plan_stage2(
    places: DataPlaces,
    settings: RunSettings,
    shift: Shift,
    seed: int,
    runs_dir: Path,
    row: str,
    rerun: frozenset[str],
    inputs: Mapping[str, StreamInputs],
    described: Mapping[str, Any],
    notify: Callable[[str], None],
) -> PlannedTraining:
    from echoshift.train.stage2.config import Stage2Config
    from echoshift.train.stage2.planning import plan_stage2
    from echoshift.train.stage2.requests import Stage2Request, StreamRequest

    assert isinstance(settings.config, Stage2Config), "settings of Stage 2"
    streams = tuple(
        StreamRequest(s.stream.name, s.config, inputs[s.stream.name])
        for s in settings.streams
        if isinstance(s.config, Stage2Config)
    )
    request = Stage2Request(
        places.card,
        places.manifest,
        shift,
        seed,
        settings.config,
        settings.target_labels,
        streams,
        described,
        runs_dir,
        row,
        rerun,
    )
    return plan_stage2(request, notify)


def _find_inputs(
    places: DataPlaces, settings: RunSettings, shift: Shift, seed: int, runs_dir: Path
) -> dict[str, StreamInputs]:
    """Find what each stream reads: files that were named, what Stage 1 left, or the cache."""
    records = read_runs(runs_dir / RESULTS) if any(s.reads_stage1 for s in settings.streams) else []
    found = {}
    for settings_of in settings.streams:
        stream, stage1 = settings_of.stream, settings_of.stage1
        if stream.features:
            inputs = name_files(stream, shift.name, seed)
        elif settings_of.reads_stage1:
            inputs = find_stage1_outputs(runs_dir, records, hash_config(stage1.describe()), shift.name, seed)
        else:
            inputs = find_cached(places.cache_dir, places.card.name, stage1.visual.encoder, stage1.sound.encoder)
        found[stream.name] = inputs
    return found
