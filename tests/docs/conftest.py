"""Blocks of the pages as parameters, and what the tests of this folder share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def load_file(path: Path) -> ModuleType:
    """Load a module by its file (importlib mode puts no test folder on the path)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # which slotted dataclasses ask for
    spec.loader.exec_module(module)
    return module


BLOCKS, LISTS = load_file(HERE / "fenced_blocks.py"), load_file(HERE / "block_lists.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test a block: `shell_block` and `python_block` are all of a language, the others are listed."""
    shell = {block.name: block for block in BLOCKS.read_all_blocks("sh")}
    chosen = {
        "shell_block": list(shell.values()),
        "python_block": [block for block in BLOCKS.read_all_blocks("python") if not block.file],
        "cheap_block": [shell[name] for name in LISTS.CHEAP],
        "demo_block": [shell[name] for name in LISTS.ON_THE_DEMO],
    }
    for name, blocks in chosen.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, blocks, ids=[block.name for block in blocks])


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread: what is run here is so small that two wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def blocks() -> ModuleType:
    """Return fenced_blocks.py."""
    return BLOCKS


@pytest.fixture(scope="session")
def lists() -> ModuleType:
    """Return block_lists.py."""
    return LISTS


@pytest.fixture(scope="session")
def doc_checkout() -> ModuleType:
    """Return doc_checkout.py."""
    return load_file(HERE / "doc_checkout.py")


@pytest.fixture(scope="session")
def tiny_dataset() -> ModuleType:
    """Return the small data set of the tests of extraction."""
    return load_file(HERE.parent / "extract" / "tiny_dataset.py")


@pytest.fixture(scope="session")
def tiny_shift() -> ModuleType:
    """Return the small data set of two domains of the tests of training."""
    return load_file(HERE.parent / "train" / "tiny_shift.py")


@pytest.fixture
def tiny(tiny_dataset: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return an empty data set of this test's own."""
    return tiny_dataset.TinyDataset(tmp_path, capsys)
