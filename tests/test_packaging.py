"""Checks that echoshift is one import name, and that its wheel holds all that commands need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(cwd: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_it_is_imported_beside_modules_that_are_called_like_its_rooms(tmp_path: Path) -> None:
    for name in ("train", "extract", "pipeline"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is not echoshift')\n")
    code = (
        "import sys, echoshift.pipeline.cards, echoshift.extract.clips, echoshift.train.runs, echoshift.cli.app;"
        "print({'train', 'extract', 'pipeline'} & set(sys.modules))"
    )
    assert run(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(ROOT / "src")) == "set()\n"


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    run(ROOT, sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), ".")
    [wheel] = tmp_path.glob("echoshift-*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    run(tmp_path, sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    empty.mkdir()
    main = "from echoshift.cli.app import main; main()"

    def call(*words: str) -> str:
        return run(empty, sys.executable, "-c", main, *words, PYTHONPATH=str(site))

    assert "epic" in call("list", "datasets") and "a-table2" in call("list", "grids")
    assert "released" in call("list", "presets") and "slowfast_r50" in call("list", "encoders")
    assert str(site) in run(
        empty, sys.executable, "-c", "import echoshift; print(echoshift.__file__)", PYTHONPATH=str(site)
    )
    call("demo", "generate")
    assert (empty / "data" / "manifests" / "demo.csv").is_file()
    call("extract", "demo", "--encoders", "resnet_demo", "--device", "cpu", "--quiet")
    assert list((empty / "cache" / "demo").glob("resnet_demo-*.zarr"))
