"""Runs of all stages on the small data set, and a report of a grid of made-up scores."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from echoshift.pipeline.cards import read_card
from echoshift.pipeline.manifest import read_manifest
from echoshift.train.runs import RESULTS, RunRecord, append_run
from echoshift.train.settings import resolve_settings

SMALL = ("frame.short_side=36", "frame.crop=32", "clip.n_frames=4", "clip.n_clips=2")
N_RIGHT = {("plain", 0): 1, ("plain", 1): 2, ("gated", 0): 4, ("gated", 1): 3}
ALIGNMENT = (
    "features.of=stage1",
    "alignment.network.width=8",
    "iterations.n_batch=4",
    "iterations.n_checkpoints=2",
    "iterations.checkpoint_every=2",
)


def align(tiny: Any, tiny_shift: ModuleType, *settings: str) -> None:
    settings = (*ALIGNMENT, *settings)
    code, _, err = tiny_shift.run(*tiny.list_arguments("align", "tiny", "--shift", "s-t", settings=settings))
    assert code == 0, err


@pytest.fixture(scope="package")
def compared(finished: Any, tiny_shift: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run two methods of alignment on what Stage 1 left; nobody changes what they leave."""
    runs = tmp_path_factory.mktemp("compared") / "runs"
    shutil.copytree(finished.runs, runs)
    tiny = finished.with_runs(runs)
    for method in ("source_only", "rna"):
        steps = ("iterations.n_steps=20", "iterations.lr_drop_step=10")
        align(tiny, tiny_shift, *steps, f"alignment.method={method}")
    return tiny


@pytest.fixture(scope="package")
def all_stages(finished: Any, tiny_shift: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run Stage 2 and alignment on what Stage 1 left; nobody changes what they leave."""
    runs = tmp_path_factory.mktemp("all_stages") / "runs"
    shutil.copytree(finished.runs, runs)
    tiny = finished.with_runs(runs)
    code, _, err = tiny.stage2()
    assert code == 0, err
    align(tiny, tiny_shift, "iterations.n_steps=6", "iterations.lr_drop_step=3")
    return tiny


@pytest.fixture(scope="session")
def tiny_records() -> ModuleType:
    """Return tiny_records.py (importlib mode puts no test folder on the path)."""
    path = Path(__file__).with_name("tiny_records.py")
    spec = importlib.util.spec_from_file_location("tiny_records", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_records"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, slots=True)
class Reported:
    """A page, with what it was made of."""

    tiny: Any
    cache: Path
    path: Path
    printed: str
    records: tuple[RunRecord, ...]


@pytest.fixture(scope="session")
def reported(
    finished: Any, tiny_shift: ModuleType, tiny_records: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Reported:
    """Add a grid's records, and features from before adaptation, to a finished Stage 1, and make the report."""
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(finished.runs, root / "runs")
    shutil.copytree(finished.root / "cache", root / "cache")
    tiny = finished.with_runs(root / "runs")
    card = read_card(tiny.root / "tiny.toml")
    manifest = read_manifest(tiny.root / "tiny.csv", card)
    grid = root / "two.toml"
    planned = tiny_records.plan_grid(
        grid,
        card,
        lambda stage, overrides: resolve_settings(stage, card, "paper", None, list(overrides)).describe(),
    )
    records = []
    for run in planned:
        record = tiny_records.make_record(run, card.classes, manifest.sha256, N_RIGHT[run.row, run.seed])
        append_run(tiny.runs / "tiny" / RESULTS, record)
        records.append(record)
    places = ["--media", tiny.media, "--cache", root / "cache", "--manifests", tiny.root]
    small = [part for setting in SMALL for part in ("--set", setting)]
    code, _, err = tiny_shift.run("extract", "tiny", *places, "--encoders", "slowfast_demo", *small)
    assert code == 0, err
    places += ["--runs", tiny.runs, "--reports", root / "reports"]
    code, out, err = tiny_shift.run("report", "tiny", *places, "--grid", grid)
    assert code == 0, err
    return Reported(tiny, root / "cache", root / "reports" / "tiny" / "index.html", out, tuple(records))
