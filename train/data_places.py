"""The places of a dataset's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.segments import Manifest
from echoshift.pipeline.store.location import Place


@dataclass(frozen=True, slots=True)
class DataPlaces:
    """A dataset's card, manifest, media and cache, and the device to compute on.

    `media_root` need not exist if everything that is read is cached.
    """

    card: DatasetCard
    manifest: Manifest
    media_root: Path
    cache_dir: Place
    device: str = "auto"
