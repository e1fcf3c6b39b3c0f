"""Where the presets of alignment lie, and what the datasets need."""

from __future__ import annotations

from pathlib import Path

from echoshift.train.alignment.stage_config import AlignmentStageConfig
from echoshift.train.preset_files import PresetFiles

FILES = PresetFiles("alignment", AlignmentStageConfig, Path(__file__).resolve().parent)
