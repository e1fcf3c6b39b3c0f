"""Blocks of the pages run: the cheap ones and those of Python by default, the others on the finished demo (slow)."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.open import list_stores, open_store

FINISHED_DEMO = "ECHOSHIFT_FINISHED_DEMO"


@pytest.fixture(scope="module")
def little_demo(tiny_dataset: ModuleType, doc_checkout: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkout whose demo is two videos, one of them silent, with sound features."""
    root = tmp_path_factory.mktemp("checkout")
    doc_checkout.make_checkout(root)
    segments = []
    for number, sound in ((0, "noise"), (1, "none")):
        video = f"studio-train-0{number}"
        tiny_dataset.write_video(root / "data" / "demo" / "studio" / f"{video}.mp4", seed=number, sound=sound)
        for i in range(2):
            segments.append(Segment(f"{video}-0{i}", video, i, i + 1, ("circle",), "studio", "train"))
    write_manifest(root / "data" / "manifests" / "demo.csv", segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("ECHOSHIFT_MANIFESTS", str(root / "data" / "manifests"))
        words = [".venv/bin/echoshift", "extract", "demo", "--encoders", "resnet_demo", "--device", "cpu"]
        code, out = doc_checkout.run_here(words)
    assert code == 0, out
    return root


def write_files(blocks: ModuleType, name: str, folder: Path) -> None:
    """Write what the page of a block tells its reader to write, a distribution into a folder of its name."""
    files = [block for block in blocks.read_blocks(blocks.ROOT / name.partition("#")[0]) if block.file]
    for block in files:
        if block.file == "pyproject.toml":
            folder = folder / tomllib.loads(block.text)["project"]["name"]
            folder.mkdir()
    for block in files:
        (folder / block.file).write_text(block.text)


def test_cheap_commands_run(
    cheap_block: Any, little_demo: Path, doc_checkout: ModuleType, blocks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(little_demo)
    monkeypatch.setenv("ECHOSHIFT_MANIFESTS", str(little_demo / "data" / "manifests"))
    write_files(blocks, cheap_block.name, little_demo)
    for words in blocks.split_commands(cheap_block.text):
        code, out = doc_checkout.run_here(words)
        assert code == 0, f"{' '.join(words)}\n{out}"
        assert out.strip()


def test_blocks_of_python_run(
    python_block: Any, little_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(little_demo)
    exec(compile(python_block.text, python_block.name, "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "resnet_demo" in printed and re.search(r"\(\d+, 1, 128\)", printed), printed


def test_the_import_of_ones_own_csv_is_what_was_written(
    little_demo: Path, doc_checkout: ModuleType, blocks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = blocks.find_file("docs/own-data.md", "segments.csv")
    (tmp_path / "segments.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    words = [".venv/bin/echoshift", "manifest", "import", "csv", "segments.csv", "--dataset", "mine"]
    code, out = doc_checkout.run_here([*words, "--manifests", str(tmp_path)])
    assert code == 0 and "4 segments" in out, out
    header, *rows = (tmp_path / "mine.csv").read_text().splitlines()
    assert header.startswith(text.splitlines()[0])
    assert {row.split(",")[0] for row in rows} == {"a-0", "a-1", "b-0", "b-1"}
    assert '"pour"' in (tmp_path / "mine.toml").read_text()


@pytest.fixture(scope="module")
def finished_demo(doc_checkout: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run `make demo` in a checkout, or copy a finished one that the environment names."""
    checkout = doc_checkout.make_checkout(tmp_path_factory.mktemp("demo"))
    if finished := os.environ.get(FINISHED_DEMO):
        checkout.copy_from(Path(finished))
    else:
        checkout.run("make demo DEVICE=cpu")
    return checkout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_run_on_the_demo(demo_block: Any, finished_demo: Any, blocks: ModuleType) -> None:
    write_files(blocks, demo_block.name, finished_demo.root)
    assert finished_demo.run(demo_block.text).strip()
    if "adding-an-encoder" in demo_block.name:
        stores = [open_store(path) for path in list_stores(finished_demo.root / "cache")]
        [store] = [store for store in stores if store.spec.encoder == "frame_averages"]
        assert store.attributes["encoder_source"].startswith("frame-averages 1.0 (frame_averages:ENTRY)")
        assert (store.read_array("state") == 1).sum() == 540
