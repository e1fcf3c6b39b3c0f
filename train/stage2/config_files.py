"""Puts a configuration of Stage 2 together: defaults, preset, what a dataset needs, the user's file and overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cards import DatasetCard
from pipeline.errors import RunError
from train.overrides import make_config, merge_settings, parse_override, read_settings
from train.stage2.config import Stage2Config

_HERE = Path(__file__).resolve().parent
_PRESETS, _DATASETS = _HERE / "presets", _HERE / "datasets"


def resolve_config(
    card: DatasetCard,
    preset: str = "paper",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    foreign: frozenset[str] = frozenset(),
    sees_flow: bool = False,
) -> Stage2Config:
    """Makes the configuration for a dataset; what comes later wins.

    1. the fields' defaults; 2. the preset (presets/*.toml); 3. what the dataset needs (datasets/NAME.toml): the tables
    `any`, the preset's name, and `flow` where the stream's encoder sees flow; 4. the user's TOML file, without the
    parts that are `foreign`, another stage's; 5. overrides `key=value`. Raises RunError naming place and key.
    """
    settings = read_settings(_find_preset(preset))
    for table in _read_dataset_tables(card, preset, sees_flow):
        settings = merge_settings(settings, table)
    if file is not None:
        own = {part: values for part, values in read_settings(file).items() if part not in foreign}
        settings = merge_settings(settings, own)
    for override in overrides:
        settings = merge_settings(settings, parse_override(override))
    return make_config(Stage2Config, settings, f"configuration of Stage 2 ({file or preset})")


def list_presets() -> list[str]:
    """Lists the presets by name."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


def _find_preset(name: str) -> Path:
    if name not in list_presets():
        near = difflib.get_close_matches(name, list_presets(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(list_presets())}"
        raise RunError(f"there is no preset {name!r} of Stage 2; {hint}")
    return _PRESETS / f"{name}.toml"


def _read_dataset_tables(card: DatasetCard, preset: str, sees_flow: bool) -> list[Mapping[str, Any]]:
    path = _DATASETS / f"{card.name}.toml"
    if not path.is_file():
        return []
    tables = read_settings(path)
    unknown = set(tables) - {"any", "flow", *list_presets()}
    if unknown:
        raise RunError(f"{path}: unknown table {sorted(unknown)[0]}")
    chosen = ["any", preset, *(["flow"] if sees_flow else [])]
    return [tables[name] for name in chosen if name in tables]
