"""Makes the configuration of a run of any stage out of presets, a dataset's needs, a file and overrides.

The parts of all stages (`visual`, `recogniser`, …) have names of their own, so that one file, and one list of
overrides, holds the settings of all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.encoders.registry import find_encoder
from pipeline.cards import DatasetCard
from pipeline.errors import EchoshiftError, RunError
from train.grids import Stage
from train.overrides import parse_override
from train.stage1.config import Stage1Config, TargetLabelsConfig
from train.stage1.config_files import list_presets as list_stage1_presets
from train.stage1.config_files import resolve_config as resolve_stage1
from train.stage2.config import Stage2Config, StreamConfig
from train.stage2.config_files import list_presets as list_stage2_presets
from train.stage2.config_files import resolve_config as resolve_stage2

PARTS: Mapping[Stage, frozenset[str]] = {
    "stage1": frozenset(Stage1Config.model_fields),
    "stage2": frozenset(Stage2Config.model_fields),
}
_OTHERWISE = "paper"  # Stage 1's preset, where the one asked for is Stage 2's alone


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Is one stream of Stage 2: its own configuration, and that of the Stage 1 that it reads.

    `stage1` is None where the stream's files were made elsewhere.
    """

    stream: StreamConfig
    stage2: Stage2Config
    stage1: Stage1Config | None


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Is everything that decides a run's result but data, shift and seed.

    Attributes:
        stage1: of a run of Stage 1; of a run of Stage 2 what its streams have in common.
        stage2, streams: of a run of Stage 2.
    """

    stage: Stage
    stage1: Stage1Config
    stage2: Stage2Config | None = None
    streams: tuple[StreamSettings, ...] = ()

    @property
    def target_labels(self) -> TargetLabelsConfig:
        """Says which of the target's train segments have labels."""
        return self.stage1.target_labels

    def describe(self) -> dict[str, Any]:
        """Gives it as JSON; how fast a result comes isn't in it."""
        if self.stage2 is None:
            return self.stage1.describe()
        streams = [
            {
                "stage2": settings.stage2.describe(),
                "stage1": None if settings.stage1 is None else settings.stage1.describe(),
            }
            for settings in self.streams
        ]
        return {
            "stage2": self.stage2.describe(),
            "target_labels": self.target_labels.model_dump(mode="json"),
            "streams": streams,
        }


def resolve_settings(
    stage: Stage, card: DatasetCard, preset: str = "paper", file: Path | None = None, overrides: Sequence[str] = ()
) -> RunSettings:
    """Makes the settings of a run; what comes later wins: defaults, preset, dataset, file, overrides, a stream's own.

    Each stage takes what is its own. A preset that Stage 2 alone has (`quick`) leaves Stage 1 at `paper`. Raises
    RunError naming place and key.
    """
    if preset not in (known := sorted({*list_stage1_presets(), *list_stage2_presets()})):
        near = difflib.get_close_matches(preset, known, n=1)
        raise RunError(f"there is no preset {preset!r}; did you mean {near[0]}?" if near else f"presets: {known}")
    stage1_preset = preset if preset in list_stage1_presets() else _OTHERWISE
    for_stage1 = take_overrides("stage1", overrides)
    stage1 = resolve_stage1(card, stage1_preset, file, for_stage1, foreign=PARTS["stage2"])
    if stage == "stage1":
        return RunSettings(stage, stage1)
    for_stage2 = take_overrides("stage2", overrides)
    stage2 = resolve_stage2(card, preset, file, for_stage2, foreign=PARTS["stage1"])
    streams = []
    for stream in stage2.streams:
        try:
            of_stage1 = list(stream.stage1)
            if stage2.test.sound == "missing":
                of_stage1.append("evaluation.sound=missing")
            encoder = resolve_stage1(card, stage1_preset, file, [*for_stage1, *of_stage1], foreign=PARTS["stage2"])
            sees_flow = find_encoder(encoder.visual.encoder).modality == "flow"
            own = resolve_stage2(
                card, preset, file, [*for_stage2, *stream.stage2], foreign=PARTS["stage1"], sees_flow=sees_flow
            )
        except EchoshiftError as error:
            error.add_note(f"in stream {stream.name!r}")
            raise
        streams.append(StreamSettings(stream, own, None if stream.features else encoder))
    return RunSettings(stage, stage1, stage2, tuple(streams))


def take_overrides(stage: Stage, overrides: Sequence[str]) -> list[str]:
    """Takes those overrides that aren't another stage's; an unknown part stays, for the stage to say so."""
    foreign = frozenset().union(*(parts for name, parts in PARTS.items() if name != stage))
    return [override for override in overrides if not set(parse_override(override)) <= foreign]
