"""Checks the report where little is there, what it shows of features and segments, and that it changes nothing."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.errors import ManifestError, RunError
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.look import report as report_module
from echoshift.train.look.features import open_adapted_store, read_projected_features
from echoshift.train.look.figures import compute_norms, make_shares
from echoshift.train.look.report import choose_predictions, choose_segments, draw_adapted_norms, draw_features
from echoshift.train.look.report_results import ReportRequest
from echoshift.train.look.run_choice import RunChoice, choose_alignment_run
from echoshift.train.look.segment import read_segment_view
from echoshift.train.runs import RESULTS, read_runs

SEGMENTS = tuple(
    Segment(f"{split}-{i}", "v", float(i), i + 1.0, (label,), "a", split)
    for split in ("train", "test")
    for i, label in enumerate(["cut"] * 20 + ["pour"] * 2 + ["wash"])
)


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
    assert code == 2 and "no segment 's-test-9'; did you mean 's-test-" in err
    assert not (tmp_path / "tiny").exists()


def test_a_grid_that_is_no_file_is_an_error(tiny_shift: ModuleType, finished: Any, tmp_path: Path) -> None:
    places = ["--manifests", finished.root, "--cache", tmp_path, "--runs", finished.runs, "--reports", tmp_path]
    code, _, err = tiny_shift.run("report", "tiny", *places, "--grid", tmp_path / "none.toml")
    assert code == 2 and "no grid file" in err
    assert not (tmp_path / "tiny").exists()


def choose(n: int, *named: str, segments: tuple[Segment, ...] = SEGMENTS) -> list[Segment]:
    return choose_segments(Manifest("small", segments, "0" * 64), n, named)


def test_each_class_comes_before_a_second_of_any() -> None:
    assert [(s.split, s.labels[0]) for s in choose(3)] == [
        (split, label) for split in ("train", "test") for label in ("cut", "pour", "wash")
    ]
    five = [s for s in choose(5) if s.split == "train"]
    assert sorted(s.labels[0] for s in five) == ["cut", "cut", "pour", "pour", "wash"]


def test_the_choice_depends_on_no_order_and_grows_with_the_number() -> None:
    ids = {s.segment_id for s in choose(4)}
    assert {s.segment_id for s in choose(4, segments=SEGMENTS[::-1])} == ids
    assert ids < {s.segment_id for s in choose(9)}
    assert len(choose(1000)) == len(SEGMENTS)
    assert [s.segment_id for s in choose(0, "test-7", "train-3")] == ["train-3", "test-7"]
    with pytest.raises(ManifestError, match=r"no segment 'train-33'; did you mean"):
        choose(1, "train-33")


def ask(tiny: Any, places: Any) -> ReportRequest:
    return ReportRequest(places, tiny.runs / "tiny", lambda *_: {}, ("s-t",))


def test_norms_before_and_after_are_those_of_the_stores(
    reported: Any, open_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, runs_dir = open_tiny(reported.tiny), reported.tiny.runs / "tiny"
    request = ask(reported.tiny, type(places)(places.card, places.manifest, places.media_root, reported.cache))
    stores = [open_store(path) for path in list_stores(reported.cache)]
    pooled = next(store for store in stores if [output.name for output in store.spec.outputs] == ["pooled"])
    medians = []
    for store in (pooled, open_adapted_store(runs_dir, read_runs(runs_dir / RESULTS)[0])):
        values = store.read(list(store.segment_ids), "pooled").astype(np.float64)
        medians.append(float(np.median(np.linalg.norm(values.reshape(-1, values.shape[-1]), axis=1))))
    words = draw_adapted_norms(request, RunChoice(shift="s-t")).description
    told = re.search(r"as extracted \d+, median (\S+); adapted \d+, median (\S+)\.$", words)
    assert told is not None and told.groups() == (f"{medians[0]:.3g}", f"{medians[1]:.3g}")
    # CharadesEgo's Stage 1 exports tokens, while `extract` stores pooled features unless told otherwise.
    outputs = [SimpleNamespace(name="tokens_slow"), SimpleNamespace(name="tokens_fast")]
    tokens = SimpleNamespace(spec=SimpleNamespace(outputs=outputs, clip=None))
    monkeypatch.setattr(report_module, "open_adapted_store", lambda runs_dir, record: tokens)
    with pytest.raises(RunError, match="as extracted there is pooled, adapted tokens_slow, tokens_fast"):
        draw_adapted_norms(request, RunChoice(shift="s-t"))


def test_alignment_is_shown_with_its_numbers(compared: Any, open_tiny: Any) -> None:
    runs_dir, places = compared.runs / "tiny", open_tiny(compared)
    features = draw_features(ask(compared, places), read_runs(runs_dir / RESULTS))
    assert "has no pooled features of tiny by slowfast_demo" in features["stage1"][0].caption
    norms, shares = features["alignment"]
    plot = make_shares(places, runs_dir, RunChoice())
    assert shares.caption == plot.description and html.escape(plot.description, quote=True) in shares.svg
    projected = read_projected_features(places, runs_dir, choose_alignment_run(runs_dir, RunChoice()))
    assert norms.caption.endswith(f"ratio {compute_norms(projected).ratio:.2f}.")


def test_of_each_variant_the_first_seed_is_shown(all_stages: Any, open_tiny: Any) -> None:
    view = read_segment_view(open_tiny(all_stages), all_stages.runs / "tiny", "t-test-1")
    assert choose_predictions(view.predictions) == list(view.predictions)
    later = replace(view.predictions[0], seed=view.predictions[0].seed + 1)
    assert choose_predictions([later, *view.predictions]) == list(view.predictions)
    many = [replace(later, row=str(i)) for i in range(9)]
    assert choose_predictions(many) == many[:8]
