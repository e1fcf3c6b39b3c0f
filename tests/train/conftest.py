"""Gives the tests of training a small data set of two domains, and a small encoder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_shift
import torch

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.manifest import read_manifest
from echoshift.train.splits import DataPlaces


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread: networks as small as these lose more by waiting for one another than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", name="tiny_shift")
def _tiny_shift() -> ModuleType:
    return tiny_shift


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run Stage 1 once; nobody changes what it left."""
    root = tmp_path_factory.mktemp("stage1")
    tiny = tiny_shift.TinyShift(root, root / "runs")
    tiny.make()
    code, out, err = tiny.stage1()
    assert code == 0, err
    (root / "printed.txt").write_text(out)
    return tiny


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Any:
    """Return the same data and cache, with a copy of the runs of this test's own."""
    shutil.copytree(finished.runs, tmp_path / "runs")
    return finished.with_runs(tmp_path / "runs")


@pytest.fixture
def open_tiny() -> Any:
    """Return what opens a tiny data set's places."""

    def open_places(tiny: Any) -> DataPlaces:
        card = read_dataset_card("tiny", tiny.root)
        manifest = read_manifest(tiny.root / "tiny.csv", card)
        return DataPlaces(card, manifest, tiny.media, tiny.root / "cache", "cpu")

    return open_places
