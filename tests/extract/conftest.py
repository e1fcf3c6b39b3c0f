"""Gives the tests of the readers their maker of media files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def media_factory():
    """Loads media_factory.py, which lies beside this file (importlib mode puts no test folder on the path)."""
    path = Path(__file__).with_name("media_factory.py")
    spec = importlib.util.spec_from_file_location("media_factory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
