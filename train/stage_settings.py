"""Makes the configuration of a run of any stage out of presets, a dataset's needs, a file and overrides.

The parts of all stages (`visual`, `recogniser`, …) have names of their own, so that one file, and one list of
overrides, holds the settings of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import EchoshiftError, RunError
from echoshift.pipeline.suggestions import suggest
from echoshift.train.alignment.config_files import FILES as ALIGNMENT
from echoshift.train.alignment.stage_config import AlignmentStageConfig
from echoshift.train.grids import Stage
from echoshift.train.overrides import parse_override
from echoshift.train.stage1.config import Stage1Config, TargetLabelsConfig
from echoshift.train.stage1.config_files import list_presets as list_stage1_presets
from echoshift.train.stage1.config_files import resolve_config as resolve_stage1
from echoshift.train.stage2.config import Stage2Config, StreamConfig
from echoshift.train.stage2.config_files import FILES as STAGE2

PARTS: Mapping[Stage, frozenset[str]] = {
    "stage1": frozenset(Stage1Config.model_fields),
    "stage2": frozenset(Stage2Config.model_fields),
    "alignment": frozenset(AlignmentStageConfig.model_fields),
}
_OTHERWISE = "paper"  # the preset of a stage that hasn't the one asked for


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """One network of Stage 2 or of alignment: its own configuration, and that of the Stage 1 that it stands on.

    Stage 1's configuration names the encoders; `reads_stage1` says whether what Stage 1 made is read, or the cache.
    """

    stream: StreamConfig
    config: Stage2Config | AlignmentStageConfig
    stage1: Stage1Config
    reads_stage1: bool


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that decides a run's result but data, shift and seed.

    Attributes:
        stage1: of a run of Stage 1; of others what their streams have in common.
        config, streams: of a run of Stage 2 or of alignment.
    """

    stage: Stage
    stage1: Stage1Config
    config: Stage2Config | AlignmentStageConfig | None = None
    streams: tuple[StreamSettings, ...] = ()

    @property
    def target_labels(self) -> TargetLabelsConfig:
        """Which of the target's train segments have labels."""
        return self.stage1.target_labels

    def describe(self) -> dict[str, Any]:
        """Return it as JSON; how fast a result comes isn't in it."""
        if self.config is None:
            return self.stage1.describe()
        streams = [
            {self.stage: settings.config.describe(), "stage1": _describe_stage1(settings)} for settings in self.streams
        ]
        described = {self.stage: self.config.describe(), "streams": streams}
        if self.stage == "stage2":
            described["target_labels"] = self.target_labels.model_dump(mode="json")
        return described


def resolve_settings(
    stage: Stage, card: DatasetCard, preset: str = "paper", file: Path | None = None, overrides: Sequence[str] = ()
) -> RunSettings:
    """Make the settings of a run; what comes later wins: defaults, preset, dataset, file, overrides, a stream's own.

    Each stage takes what is its own. A stage that hasn't the preset (Stage 1 has no `quick`) stays at `paper`. Raises
    RunError naming place and key.
    """
    presets: Mapping[Stage, list[str]] = {
        "stage1": list_stage1_presets(),
        "stage2": STAGE2.list_presets(),
        "alignment": ALIGNMENT.list_presets(),
    }
    known = sorted({name for names in presets.values() for name in names})
    if preset not in known:
        raise RunError(f"there is no preset {preset!r}; {suggest(preset, known, listed_by='echoshift list presets')}")
    chosen = {name: preset if preset in names else _OTHERWISE for name, names in presets.items()}
    foreign = _list_foreign("stage1")

    def resolve_encoder(*more: str) -> Stage1Config:
        return resolve_stage1(
            card, chosen["stage1"], file, [*take_overrides("stage1", overrides), *more], foreign=foreign
        )

    if stage == "stage1":
        return RunSettings(stage, resolve_encoder())

    def resolve_own(*more: str, sees_flow: bool = False) -> Stage2Config | AlignmentStageConfig:
        own = [*take_overrides(stage, overrides), *more]
        if stage == "alignment":
            return ALIGNMENT.resolve(card, chosen[stage], file, own, foreign=_list_foreign(stage))
        tables = ["flow"] if sees_flow else []
        return STAGE2.resolve(card, chosen[stage], file, own, foreign=_list_foreign(stage), tables=tables)

    config = resolve_own()
    is_stage2 = isinstance(config, Stage2Config)
    streams = []
    for stream in config.streams if isinstance(config, Stage2Config) else config.networks:
        try:
            without_sound = isinstance(config, Stage2Config) and config.test.sound == "missing"
            encoder = resolve_encoder(*stream.stage1, *(["evaluation.sound=missing"] if without_sound else []))
            sees_flow = find_encoder(encoder.visual.encoder).modality == "flow"
            own = resolve_own(*stream.stage2, sees_flow=sees_flow)
        except EchoshiftError as error:
            error.add_note(f"in stream {stream.name!r}")
            raise
        of_stage1 = is_stage2 or (isinstance(config, AlignmentStageConfig) and config.features.of == "stage1")
        streams.append(StreamSettings(stream, own, encoder, of_stage1 and not stream.features))
    return RunSettings(stage, resolve_encoder(), config, tuple(streams))


def take_overrides(stage: Stage, overrides: Sequence[str]) -> list[str]:
    """Take those overrides that aren't another stage's; an unknown part stays, for the stage to say so."""
    foreign = _list_foreign(stage)
    return [override for override in overrides if not set(parse_override(override)) <= foreign]


def _list_foreign(stage: Stage) -> frozenset[str]:
    """List the parts of the other stages."""
    return frozenset().union(*(parts for name, parts in PARTS.items() if name != stage))


def _describe_stage1(settings: StreamSettings) -> dict[str, Any] | None:
    """Return of Stage 1 what decides: all of it where it is read, the encoders where the cache is."""
    if settings.reads_stage1:
        return settings.stage1.describe()
    if settings.stream.features:
        return None
    return {"visual": settings.stage1.visual.encoder, "sound": settings.stage1.sound.encoder}
