"""Gives the tests the simulated GPU, and the small data and methods that the tests of training have."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

TRAIN = Path(__file__).parents[1] / "train"


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _load(name: str) -> ModuleType:
    """Loads a module of tests/train (importlib mode puts no test folder on the path)."""
    spec = importlib.util.spec_from_file_location(name, TRAIN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # which slotted dataclasses ask for
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """Gives toy_method.py."""
    return _load("toy_method")


@pytest.fixture(scope="session")
def alignment() -> ModuleType:
    """Gives alignment_batches.py."""
    return _load("alignment_batches")


@pytest.fixture(scope="session")
def tiny_shift() -> ModuleType:
    """Gives tiny_shift.py."""
    return _load("tiny_shift")


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the GPU's runs draw the numbers for dropout that a CPU's runs draw."""
    from train.cached import run_steps

    def fill(generator: run_steps._Generator, numbers: torch.Tensor) -> None:
        drawn = torch.empty(numbers.shape)
        generator._numpy.random(dtype=np.float32, out=drawn.numpy())
        numbers.copy_(drawn)

    monkeypatch.setattr(run_steps._Generator, "fill", fill)
