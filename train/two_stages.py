"""Ties Stage 2 to the Stage 1 that it reads: which runs of Stage 1 it needs, and where they left what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cards import Shift
from train.data_places import DataPlaces
from train.runs import RESULTS, RunRecord, hash_config, read_runs
from train.stage1.config import Stage1Config
from train.stage2.stage1_outputs import find_stage1_outputs, has_stage1_outputs, name_files

if TYPE_CHECKING:
    from train.stage2.requests import Stage2Request
    from train.stage_settings import RunSettings


@dataclass(frozen=True, slots=True)
class NeededStage1:
    """Is one run of Stage 1 that a run of Stage 2 reads."""

    config: Stage1Config
    shift: Shift
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Tells runs apart: hash of the configuration, shift, seed."""
        return hash_config(self.config.describe()), self.shift.name, self.seed


def list_needed(
    settings: RunSettings, shift: Shift, seed: int, runs_dir: Path, records: Sequence[RunRecord] | None = None
) -> list[NeededStage1]:
    """Lists the runs of Stage 1 that a run of Stage 2 lacks; `records` are those of the results file, if read."""
    known = read_runs(runs_dir / RESULTS) if records is None else records
    needed = {}
    for stream in settings.streams:
        if stream.stage1 is not None:
            run = NeededStage1(stream.stage1, shift, seed)
            if not has_stage1_outputs(runs_dir, known, *run.key):
                needed[run.key] = run
    return list(needed.values())


def make_stage2_request(
    places: DataPlaces,
    settings: RunSettings,
    shift: Shift,
    seed: int,
    runs_dir: Path,
    *,
    row: str = "",
    rerun: frozenset[str] = frozenset(),
) -> Stage2Request:
    """Makes the request of a run whose Stage 1 is done; raises RunError naming what is missing."""
    from train.stage2.requests import Stage2Request, StreamRequest

    assert settings.stage2 is not None, "settings of Stage 2"
    records = read_runs(runs_dir / RESULTS)
    streams = []
    for stream in settings.streams:
        if stream.stage1 is None:
            inputs = name_files(stream.stream, shift.name, seed)
        else:
            config_hash = hash_config(stream.stage1.describe())
            inputs = find_stage1_outputs(runs_dir, records, config_hash, shift.name, seed)
        streams.append(StreamRequest(stream.stream.name, stream.stage2, inputs))
    return Stage2Request(
        card=places.card,
        manifest=places.manifest,
        shift=shift,
        seed=seed,
        config=settings.stage2,
        target_labels=settings.target_labels,
        streams=tuple(streams),
        described=settings.describe(),
        runs_dir=runs_dir,
        row=row,
        rerun=rerun,
    )
