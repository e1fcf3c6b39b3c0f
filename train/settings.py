"""Settings of every stage: defaults, preset, what a dataset needs, the user's file, `--set` overrides, a stream's own.

The parts of all stages (`visual`, `recogniser`, …) have names of their own, so that one file, and one list of
overrides, holds the settings of all of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import EchoshiftError, RunError, suggest
from echoshift.train.alignment.config import AlignmentStageConfig
from echoshift.train.grids import Stage
from echoshift.train.stage1.config import Stage1Config, TargetLabelsConfig
from echoshift.train.stage2.config import Stage2Config, StreamConfig

Settings = dict[str, Any]
Config = TypeVar("Config", bound=BaseModel)
StageConfig = Stage1Config | Stage2Config | AlignmentStageConfig

KINDS: Mapping[Stage, type[StageConfig]] = {
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "alignment": AlignmentStageConfig,
}
_TITLES: Mapping[Stage, str] = {"stage1": "Stage 1", "stage2": "Stage 2", "alignment": "alignment"}
_FLOW = "flow"  # the table of a dataset's file for what sees flow
_DEFAULT_PRESET = "paper"  # of a stage that hasn't the one asked for
_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """One network of Stage 2 or of alignment: its own configuration, and that of the Stage 1 below it.

    Stage 1's configuration names the encoders; `reads_stage1` says whether what Stage 1 made is read, or the cache.
    """

    stream: StreamConfig
    config: Stage2Config | AlignmentStageConfig
    stage1: Stage1Config
    reads_stage1: bool

    def describe_stage1(self) -> dict[str, Any] | None:
        """Return as JSON what of Stage 1 decides: all of it where it is read, the encoders where the cache is."""
        if self.reads_stage1:
            return self.stage1.describe()
        if self.stream.features:
            return None
        return {"visual": self.stage1.visual.encoder, "sound": self.stage1.sound.encoder}


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
            {self.stage: stream.config.describe(), "stage1": stream.describe_stage1()} for stream in self.streams
        ]
        described = {self.stage: self.config.describe(), "streams": streams}
        if self.stage == "stage2":
            described["target_labels"] = self.target_labels.model_dump(mode="json")
        return described


def resolve_settings(
    stage: Stage,
    card: DatasetCard,
    preset: str = _DEFAULT_PRESET,
    file: Path | None = None,
    overrides: Sequence[str] = (),
) -> RunSettings:
    """Make the settings of a run; what comes later wins: defaults, preset, dataset, file, overrides, a stream's own.

    Each stage takes what is its own. A stage that hasn't the preset (Stage 1 has no `quick`) stays at `paper`. Raises
    RunError naming place and key.
    """

    def resolve_stage1(*more: str) -> Stage1Config:
        own = [*take_overrides("stage1", overrides), *more]
        return resolve_config(Stage1Config, card, preset, file, own)

    if stage == "stage1":
        return RunSettings(stage, resolve_stage1())
    kind: type[Stage2Config | AlignmentStageConfig] = Stage2Config if stage == "stage2" else AlignmentStageConfig

    def resolve_own(*more: str, sees_flow: bool = False) -> Stage2Config | AlignmentStageConfig:
        own = [*take_overrides(stage, overrides), *more]
        return resolve_config(kind, card, preset, file, own, sees_flow=sees_flow)

    config = resolve_own()
    if isinstance(config, Stage2Config):
        named, from_stage1 = config.streams, True
        more = ["evaluation.sound=missing"] if config.test.sound == "missing" else []
    else:
        named, from_stage1, more = config.networks, config.features.of == "stage1", []
    streams = []
    for stream in named:
        try:
            stage1 = resolve_stage1(*stream.stage1, *more)
            own = resolve_own(*stream.stage2, sees_flow=find_encoder(stage1.visual.encoder).modality == _FLOW)
        except EchoshiftError as error:
            error.add_note(f"in stream {stream.name!r}")
            raise
        streams.append(StreamSettings(stream, own, stage1, from_stage1 and not stream.features))
    return RunSettings(stage, resolve_stage1(), config, tuple(streams))


def resolve_config(
    kind: type[Config],
    card: DatasetCard,
    preset: str = _DEFAULT_PRESET,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    sees_flow: bool = False,
) -> Config:
    """Make the configuration of one stage for a dataset; what comes later wins.

    1. the fields' defaults; 2. the preset; 3. what the dataset needs: the tables `any`, the preset's name, and, where
    flow is seen, `flow` and PRESET-flow; 4. the user's TOML file, without the other stages' parts; 5. overrides
    `key=value`. Networks of Stage 1 that nothing names are the card's first that sees and the first that hears. Raises
    RunError naming place and key.
    """
    stage = next(stage for stage, of in KINDS.items() if issubclass(kind, of))
    preset = _choose_preset(stage, preset)
    tables = _read_dataset_tables(stage, card)
    user: Settings = {}
    if file is not None:
        foreign = _list_foreign(stage)
        user = {part: values for part, values in read_settings(file).items() if part not in foreign}
    for override in overrides:
        user = _lay_over(user, parse_override(override))
    if stage == "stage1":
        encoder = _get_encoder(user) or _get_encoder(tables.get("any", {}))
        sees_flow = bool(encoder) and find_encoder(encoder).modality == _FLOW
    settings = read_settings(_FOLDER / stage / "presets" / f"{preset}.toml")
    for name in ("any", preset, *((_FLOW, f"{preset}-{_FLOW}") if sees_flow else ())):
        settings = _lay_over(settings, tables.get(name, {}))
    settings = _lay_over(settings, user)
    place = f"configuration of {_TITLES[stage]} ({file or preset})"
    if stage == "stage1":
        settings = _name_encoders(settings, card, place)
    return make_config(kind, settings, place)


def list_presets(stage: Stage) -> list[str]:
    """List the presets of a stage."""
    return sorted(path.stem for path in (_FOLDER / stage / "presets").glob("*.toml"))


def take_overrides(stage: Stage, overrides: Sequence[str]) -> list[str]:
    """Take those overrides that aren't another stage's; an unknown part stays, for the stage to say so."""
    foreign = _list_foreign(stage)
    return [override for override in overrides if not set(parse_override(override)) <= foreign]


def read_settings(path: Path) -> Settings:
    """Read a TOML file; raises RunError naming it where it is missing or isn't TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise RunError(f"no configuration file {path}; write one, or leave out --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} isn't valid TOML: {error}") from error


def parse_override(text: str) -> Settings:
    """Turn `training.lr=1e-3` into {"training": {"lr": 0.001}}; values as in TOML, anything else is text."""
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise RunError(f"override {text!r} isn't key=value, such as training.lr=1e-3")
    parsed: Any = _parse_value(value.strip())
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Lay settings over others, table by table; nothing is changed in place."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        is_table = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_settings(under, value) if is_table else value  # type: ignore[arg-type]
    return merged


def make_config(kind: type[Config], settings: Mapping[str, Any], place: str) -> Config:
    """Make a configuration; raises RunError naming the place and each key at fault, with the nearest that exists."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        faults = [_describe_fault(kind, fault["type"], fault["loc"], fault["msg"]) for fault in error.errors()]
        raise RunError(f"{place}: {'; '.join(faults)}") from error


def _describe_fault(kind: type[BaseModel], fault: str, place: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, place)) or "configuration"
    if fault != "extra_forbidden":
        return f"{key}: {message.removeprefix('Value error, ')}"
    model: Any = kind
    for name in place[:-1]:
        model = getattr(model.model_fields.get(name), "annotation", None)
        if model is None or not hasattr(model, "model_fields"):
            return f"{key}: no such key"
    return f"{key}: no such key; {suggest(str(place[-1]), model.model_fields, listed_by='echoshift list settings')}"


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _choose_preset(stage: Stage, name: str) -> str:
    known = sorted({preset for each in KINDS for preset in list_presets(each)})
    if name not in known:
        raise RunError(f"unknown preset {name!r}; {suggest(name, known, listed_by='echoshift list presets')}")
    return name if name in list_presets(stage) else _DEFAULT_PRESET


def _list_foreign(stage: Stage) -> frozenset[str]:
    """List the parts of the other stages."""
    return frozenset(part for name, kind in KINDS.items() if name != stage for part in kind.model_fields)


def _read_dataset_tables(stage: Stage, card: DatasetCard) -> Settings:
    """Read what a dataset needs, a table for all presets (`any`), one a preset, and those of flow."""
    path = _FOLDER / stage / "datasets" / f"{card.name}.toml"
    if not path.is_file():
        return {}
    tables, presets = read_settings(path), list_presets(stage)
    known = ("any", *presets) if stage == "alignment" else ("any", _FLOW, *presets, *(f"{p}-{_FLOW}" for p in presets))
    for name in tables:
        if name not in known:
            raise RunError(f"{path}: unknown table {name!r}; {suggest(name, known)}")
    return tables


def _lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Merge settings; a training.lr drops the lr_by_source below it, over which it could not win otherwise."""
    training, under = above.get("training"), below.get("training")
    if isinstance(training, Mapping) and "lr" in training and isinstance(under, Mapping):
        below = {**below, "training": {name: value for name, value in under.items() if name != "lr_by_source"}}
    return merge_settings(below, above)


def _get_encoder(settings: Mapping[str, Any]) -> str:
    visual = settings.get("visual", {})  # which may be no table; the configuration's check says so
    return str(visual.get("encoder", "")) if isinstance(visual, Mapping) else ""


def _name_encoders(settings: Settings, card: DatasetCard, place: str) -> Settings:
    """Name the networks of Stage 1 that nothing names, and check that one sees and the other hears."""
    for part, hears, example in (("visual", False, "i3d_rgb"), ("sound", True, "resnet18_audio")):
        named = settings.get(part, {})
        if not isinstance(named, Mapping):
            raise RunError(f"{place}: {part} is a table")
        if "encoder" not in named:
            of_part = [name for name in card.encoders if _hears(name) == hears]
            if not of_part:
                raise RunError(
                    f"the card of {card.name} names no encoder for {part}; say which: {part}.encoder={example}"
                )
            settings = {**settings, part: {**named, "encoder": of_part[0]}}
        elif isinstance(named["encoder"], str) and _hears(named["encoder"]) != hears:
            fault = "sees, it doesn't hear" if hears else "hears, it doesn't see"
            raise RunError(f"{place}: {part}.encoder: {named['encoder']} {fault}")
    return settings


def _hears(encoder: str) -> bool:
    return find_encoder(encoder).modality == "audio"
