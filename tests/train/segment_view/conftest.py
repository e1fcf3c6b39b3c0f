"""Gives the tests of what is shown of a segment the small data set with runs of all three stages."""

from __future__ import annotations

import shutil
from types import ModuleType
from typing import Any

import pytest

ALIGNMENT = (
    "features.of=stage1",
    "alignment.network.width=8",
    "iterations.n_steps=6",
    "iterations.n_batch=4",
    "iterations.lr_drop_step=3",
    "iterations.n_checkpoints=2",
    "iterations.checkpoint_every=2",
)


@pytest.fixture(scope="package")
def all_stages(finished: Any, tiny_shift: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run Stage 2 and alignment on what Stage 1 left; nobody changes what they leave."""
    runs = tmp_path_factory.mktemp("all_stages") / "runs"
    shutil.copytree(finished.runs, runs)
    tiny = finished.with_runs(runs)
    code, _, err = tiny.stage2()
    assert code == 0, err
    arguments = tiny.list_arguments("align", tiny_shift.NAME, "--shift", "s-t", settings=ALIGNMENT)
    code, _, err = tiny_shift.run(*arguments)
    assert code == 0, err
    return tiny
