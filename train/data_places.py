"""Where a dataset lies, and who computes on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.segments import Manifest
from echoshift.pipeline.store.location import Place


@dataclass(frozen=True, slots=True)
class DataPlaces:
    """Where a dataset lies, and who computes on it. `media_root` needn't exist where all that is read is cached."""

    card: DatasetCard
    manifest: Manifest
    media_root: Path
    cache_dir: Place
    device: str = "auto"
