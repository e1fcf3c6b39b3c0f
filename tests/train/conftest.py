"""Gives the tests of training a small data set of two domains, and a small encoder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Computes with one thread: networks as small as these lose more by waiting for one another than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_beside(name: str) -> ModuleType:
    """Loads a module that lies beside this file (importlib mode puts no test folder on the path)."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which slotted dataclasses ask for
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_shift() -> ModuleType:
    """Gives tiny_shift.py."""
    return load_beside("tiny_shift")


@pytest.fixture(scope="session")
def tiny_encoder() -> ModuleType:
    """Gives tiny_encoder.py."""
    return load_beside("tiny_encoder")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """Gives toy_method.py."""
    return load_beside("toy_method")
