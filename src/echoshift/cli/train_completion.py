"""Completes in the shell what names grids, presets, shifts and settings of training; imports no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from echoshift.cli.completion import Offers, complete_encoders, keep_begun, offer_settings, offer_values
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.cli.setting_keys import SettingKey

_HERE = Path(__file__).parent.parent / "train"
STAGES = ("stage1", "stage2", "alignment")
_STAGE_OF_COMMAND = {"stage1": ("stage1",), "stage2": ("stage2", "stage1"), "align": ("alignment", "stage1")}
PRESET_FOLDERS = {stage: _HERE / stage / "presets" for stage in STAGES}


def complete_grid(incomplete: str) -> Offers:
    """Offer the grids that come with echoshift, with their titles."""
    return keep_begun(list_grid_titles(), incomplete)


def complete_preset(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the presets of the command's stage, or of all stages."""
    stages = _STAGE_OF_COMMAND.get(ctx.info_name or "", STAGES)
    return keep_begun(
        ((name, ", ".join(of)) for name, of in list_preset_stages().items() if {*of} & {*stages}), incomplete
    )


def complete_shifts(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer shifts for the last word of a list separated by blanks: of the named dataset, or of all cards."""
    begun, blank, last = incomplete.rpartition(" ")
    manifests = Path(ctx.params.get("manifests") or MANIFESTS_DIR)
    dataset = str(ctx.params.get("dataset") or "")
    cards = [manifests / f"{dataset}.toml"] if dataset else sorted(manifests.glob("*.toml"))
    offered = keep_begun(((name, card.stem) for card in cards for name in read_shifts(card)), last)
    return [(f"{begun}{blank}{name}", help_) for name, help_ in offered if name not in begun.split()]


def complete_setting(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the keys of `--set` of the command's stage, and what a key may be once `=` is there."""
    name, equals, value = incomplete.partition("=")
    if equals and name in ("visual.encoder", "sound.encoder"):
        return offer_values(name, complete_encoders(value), value)
    if equals and name == "alignment.method":
        from echoshift.train.alignment.method import list_methods

        return offer_values(name, ((method, "") for method in list_methods()), value)
    stages = _STAGE_OF_COMMAND.get(ctx.info_name or "", STAGES)
    return offer_settings([key for stage in stages for key in list_stage_settings(stage)], incomplete)


def list_grid_titles() -> list[tuple[str, str]]:
    """List the grids that come with echoshift, with their titles."""
    return sorted((path.stem, str(_read_toml(path).get("title", ""))) for path in (_HERE / "grids").glob("*.toml"))


def list_preset_stages() -> dict[str, list[str]]:
    """List the presets of training, each with the stages that have it."""
    found: dict[str, list[str]] = {}
    for stage, folder in PRESET_FOLDERS.items():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, []).append(stage)
    return dict(sorted(found.items()))


def list_stage_settings(stage: str) -> list[SettingKey]:
    """List the settings of a stage: every field of its configuration."""
    from echoshift.cli.setting_keys import list_setting_keys

    if stage == "stage1":
        from echoshift.train.stage1.config import Stage1Config

        return list_setting_keys(Stage1Config)
    if stage == "stage2":
        from echoshift.train.stage2.config import Stage2Config

        return list_setting_keys(Stage2Config)
    from echoshift.train.alignment.config import AlignmentStageConfig

    return list_setting_keys(AlignmentStageConfig)


def read_shifts(card: Path) -> list[str]:
    """Read the names of a card's shifts without checking the card; SOURCE+SOURCE-TARGET."""
    return [f"{'+'.join(shift['source'])}-{shift['target']}" for shift in _read_toml(card).get("shifts", ())]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}
