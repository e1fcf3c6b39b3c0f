"""Where Stage 2's presets lie, and what the datasets need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.train.preset_files import PresetFiles
from echoshift.train.stage2.config import Stage2Config

FILES = PresetFiles("Stage 2", Stage2Config, Path(__file__).resolve().parent, frozenset({"flow"}))


def resolve_config(
    card: DatasetCard,
    preset: str = "paper",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    foreign: frozenset[str] = frozenset(),
    sees_flow: bool = False,
) -> Stage2Config:
    """Make the configuration for a dataset (`PresetFiles.resolve`), with the table `flow` where a stream sees flow."""
    tables = ["flow"] if sees_flow else []
    return FILES.resolve(card, preset, file, overrides, foreign=foreign, tables=tables)
