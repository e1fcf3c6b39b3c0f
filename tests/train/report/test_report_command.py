"""Checks `echoshift report` where little is there, and that it trains, extracts and changes nothing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any


def list_files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(root.rglob("*")) if path.is_file()}


def make(tiny_shift: ModuleType, tiny: Any, reports: Path, *arguments: object, cache: Path | None = None) -> str:
    places = ["--media", tiny.media, "--manifests", tiny.root, "--runs", tiny.runs]
    places += ["--cache", cache or tiny.root / "cache", "--reports", reports, "--segments", 0]
    code, out, err = tiny_shift.run("report", "tiny", *places, *arguments)
    assert code == 0, err
    assert f"{reports / 'tiny' / 'index.html'}: " in out
    return (reports / "tiny" / "index.html").read_text(encoding="utf-8")


def test_what_is_missing_is_said_with_its_command(tiny_shift: ModuleType, finished: Any, tmp_path: Path) -> None:
    tiny = finished.with_runs(tmp_path / "no-runs")
    page = html.unescape(make(tiny_shift, tiny, tmp_path / "reports", cache=tmp_path / "no-cache"))
    for sentence, command in (
        ("Which segments are silent isn't known yet", "make extract DATASET=tiny ENCODERS=resnet18_audio"),
        ("No feature store of this dataset is in the cache yet.", "make extract DATASET=tiny"),
        ("No run of Stage 1 has come to its end yet.", "make stage1 DATASET=tiny"),
        ("No grid has a run yet.", "make ablate GRID=a-table2 DATASET=tiny"),
        ("No run has come to its end yet.", "make stage1 DATASET=tiny"),
    ):
        assert re.search(rf"{re.escape(sentence)}[^<]*<code>{re.escape(command)}</code>", page), sentence


def test_it_changes_nothing_and_needs_nothing_else(tiny_shift: ModuleType, copied: Any, tmp_path: Path) -> None:
    before = list_files(copied.root), list_files(copied.runs)
    page = make(tiny_shift, copied, tmp_path / "reports")
    assert (list_files(copied.root), list_files(copied.runs)) == before
    assert [path.name for path in (tmp_path / "reports" / "tiny").iterdir()] == ["index.html"]
    addresses = re.findall(r'(?:src|href)="([^"]{1,40})', page)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|url\((?!#)", page)


def test_json_says_what_was_written_and_nothing_else(tiny_shift: ModuleType, finished: Any, tmp_path: Path) -> None:
    places = ["--media", finished.media, "--manifests", finished.root, "--runs", finished.runs, "--segments", 0]
    places += ["--cache", finished.root / "cache", "--reports", tmp_path, "--quiet", "--json"]
    code, out, err = tiny_shift.run("report", "tiny", *places)
    assert (code, err) == (0, "")
    path = tmp_path / "tiny" / "index.html"
    answer = json.loads(out)
    assert answer == {"path": str(path), "n_bytes": path.stat().st_size, "n_runs": 1, "n_stores": answer["n_stores"]}
    assert answer["n_stores"] == len(list((finished.root / "cache" / "tiny").glob("*.zarr")))


def test_a_run_of_no_grid_is_listed_all_the_same(tiny_shift: ModuleType, copied: Any, tmp_path: Path) -> None:
    page = html.unescape(make(tiny_shift, copied, tmp_path / "reports"))
    assert "The runs there are belong to no grid with these settings." in page
    assert "1 runs are in no table above" in page


def test_a_segment_that_is_not_there_is_an_error(tiny_shift: ModuleType, finished: Any, tmp_path: Path) -> None:
    places = ["--manifests", finished.root, "--cache", tmp_path, "--runs", finished.runs, "--reports", tmp_path]
    code, _, err = tiny_shift.run("report", "tiny", *places, "--segment", "s-test-9")
    assert code == 2 and "no segment 's-test-9'; did you mean s-test-" in err
    assert not (tmp_path / "tiny").exists()


def test_a_grid_that_is_no_file_is_an_error(tiny_shift: ModuleType, finished: Any, tmp_path: Path) -> None:
    places = ["--manifests", finished.root, "--cache", tmp_path, "--runs", finished.runs, "--reports", tmp_path]
    code, _, err = tiny_shift.run("report", "tiny", *places, "--grid", tmp_path / "none.toml")
    assert code == 2 and "no grid file" in err
    assert not (tmp_path / "tiny").exists()
