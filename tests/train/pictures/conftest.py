"""Gives the tests of pictures the small data set with Stage 1, source_only and RNA trained on it."""

from __future__ import annotations

import shutil
from types import ModuleType
from typing import Any

import pytest

from pipeline.cards import read_dataset_card
from pipeline.manifest_csv import read_manifest
from train.data_places import DataPlaces

ALIGNMENT = (
    "features.of=stage1",
    "alignment.network.width=8",
    "iterations.n_steps=20",
    "iterations.n_batch=4",
    "iterations.lr_drop_step=10",
    "iterations.n_checkpoints=2",
    "iterations.checkpoint_every=2",
)


@pytest.fixture(scope="package")
def compared(finished: Any, tiny_shift: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs two methods on what Stage 1 left; nobody changes what they leave."""
    runs = tmp_path_factory.mktemp("compared") / "runs"
    shutil.copytree(finished.runs, runs)
    tiny = finished.with_runs(runs)
    for method in ("source_only", "rna"):
        settings = (*ALIGNMENT, f"alignment.method={method}")
        code, _, err = tiny_shift.run(*tiny.list_arguments("align", "tiny", "--shift", "s-t", settings=settings))
        assert code == 0, err
    return tiny


@pytest.fixture
def open_tiny() -> Any:
    """Gives what opens a tiny data set's places."""

    def open_places(tiny: Any) -> DataPlaces:
        card = read_dataset_card("tiny", tiny.root)
        manifest = read_manifest(tiny.root / "tiny.csv", card)
        return DataPlaces(card, manifest, tiny.media, tiny.root / "cache", "cpu")

    return open_places
