"""Puts a configuration of Stage 1 together: defaults, preset, what a dataset needs, the user's file and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.suggestions import suggest
from echoshift.train.overrides import make_config, merge_settings, parse_override, read_settings
from echoshift.train.stage1.config import Stage1Config

_HERE = Path(__file__).resolve().parent
_PRESETS, _DATASETS = _HERE / "presets", _HERE / "datasets"


def resolve_config(
    card: DatasetCard,
    preset: str = "paper",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    foreign: frozenset[str] = frozenset(),
) -> Stage1Config:
    """Make the configuration for a dataset; what comes later wins.

    1. the fields' defaults; 2. the preset, `paper` or `released` (presets/*.toml); 3. what the dataset needs
    (datasets/NAME.toml): the tables `any`, the preset's name, and `flow` where the visual encoder sees flow;
    4. the user's TOML file, without the parts that are `foreign`, another stage's; 5. overrides `key=value`. Networks
    that nothing names are the first of the card that sees and the first that hears. A training.lr drops the
    lr_by_source of what came before, over which it could not win otherwise. Raises RunError naming place and key.
    """
    settings = read_settings(_find_preset(preset))
    user = {} if file is None else read_settings(file)
    user = {part: values for part, values in user.items() if part not in foreign}
    for override in overrides:
        user = _lay_over(user, parse_override(override))
    for table in _read_dataset_tables(card, preset, user):
        settings = _lay_over(settings, table)
    settings = _lay_over(settings, user)
    place = f"configuration of Stage 1 ({file or preset})"
    for part, is_part in (("visual", _sees), ("sound", _hears)):
        named = settings.setdefault(part, {})
        if not isinstance(named, dict):
            raise RunError(f"{place}: {part} is a table")
        if "encoder" not in named:
            named["encoder"] = _choose_encoder(card, part, is_part)
    config = make_config(Stage1Config, settings, place)
    _check_encoders(config, place)
    return config


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    training, under = above.get("training"), below.get("training")
    if isinstance(training, Mapping) and "lr" in training and isinstance(under, Mapping):
        below = {**below, "training": {name: value for name, value in under.items() if name != "lr_by_source"}}
    return merge_settings(below, above)


def list_presets() -> list[str]:
    """List the presets by name."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


def _find_preset(name: str) -> Path:
    path = _PRESETS / f"{name}.toml"
    if name not in list_presets():
        hint = suggest(name, list_presets(), listed_by="echoshift list presets")
        raise RunError(f"there is no preset {name!r} of Stage 1; {hint}")
    return path


def _read_dataset_tables(card: DatasetCard, preset: str, user: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    path = _DATASETS / f"{card.name}.toml"
    if not path.is_file():
        return []
    tables = read_settings(path)
    known = ("any", "flow", *list_presets())
    for name in tables:
        if name not in known:
            raise RunError(f"{path}: unknown table {name!r}; {suggest(name, known)}")
    named = user.get("visual", {})  # which may be no table; the configuration's check says so
    encoder = named.get("encoder") if isinstance(named, dict) else None
    encoder = encoder or tables.get("any", {}).get("visual", {}).get("encoder", "")
    chosen = ["any", preset]
    if encoder and find_encoder(encoder).modality == "flow":
        chosen.append("flow")
    return [tables[name] for name in chosen if name in tables]


def _sees(encoder: str) -> bool:
    return find_encoder(encoder).modality != "audio"


def _hears(encoder: str) -> bool:
    return find_encoder(encoder).modality == "audio"


def _choose_encoder(card: DatasetCard, part: str, is_part: Any) -> str:
    for encoder in card.encoders:
        if is_part(encoder):
            return encoder
    names = "i3d_rgb" if part == "visual" else "resnet18_audio"
    raise RunError(f"the card of {card.name} names no encoder for {part}; say which: {part}.encoder={names}")


def _check_encoders(config: Stage1Config, place: str) -> None:
    if not _sees(config.visual.encoder):
        raise RunError(f"{place}: visual.encoder: {config.visual.encoder} hears, it doesn't see")
    if not _hears(config.sound.encoder):
        raise RunError(f"{place}: sound.encoder: {config.sound.encoder} sees, it doesn't hear")
