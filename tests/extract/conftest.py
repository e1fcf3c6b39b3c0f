"""Gives the tests their maker of media files and a small data set with its command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def load_beside(name: str):
    """Load a module that lies beside this file (importlib mode puts no test folder on the path)."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def media_factory():
    return load_beside("media_factory")


@pytest.fixture(scope="session")
def tiny_dataset():
    return load_beside("tiny_dataset")


@pytest.fixture
def tiny(tiny_dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    return tiny_dataset.TinyDataset(tmp_path, capsys)
