"""Gives the tests of pictures the small data set with Stage 1, source_only and RNA trained on it."""

from __future__ import annotations

import shutil
from types import ModuleType
from typing import Any

import pytest

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
    """Run two methods on what Stage 1 left; nobody changes what they leave."""
    runs = tmp_path_factory.mktemp("compared") / "runs"
    shutil.copytree(finished.runs, runs)
    tiny = finished.with_runs(runs)
    for method in ("source_only", "rna"):
        settings = (*ALIGNMENT, f"alignment.method={method}")
        code, _, err = tiny_shift.run(*tiny.list_arguments("align", "tiny", "--shift", "s-t", settings=settings))
        assert code == 0, err
    return tiny
