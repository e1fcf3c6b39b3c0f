"""Checks `echoshift show`: what is printed, the picture, JSON, and errors in one line."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from echoshift.cli.terminal import make_jsonable
from echoshift.train.look.segment import ViewOptions, read_segment_view
from echoshift.train.look.show import choose_classes, describe_view, draw_counts, draw_loudness, draw_segment


def show(tiny: Any, tiny_shift: ModuleType, *arguments: object) -> tuple[int, str, str]:
    places = ["--media", tiny.media, "--cache", tiny.root / "cache", "--manifests", tiny.root, "--runs", tiny.runs]
    code, out, err = tiny_shift.run("show", *arguments, *places)
    return code, out, err


def test_it_prints_what_there_is(all_stages: Any, tiny_shift: ModuleType) -> None:
    code, out, err = show(all_stages, tiny_shift, "t-test-1")
    assert code == 0, err
    assert "no dataset named: tiny, the one last extracted" in err
    lines = out.splitlines()
    assert lines[0] == "t-test-1: high"
    assert lines[1] == "  tiny, t, test; t-test, 1 s to 2 s (1.00 s)"
    assert lines[2].startswith("  frames: 1.083 s (no. 13), 1.250 s (no. 15), 1.500 s (no. 18)")
    table = [line for line in lines if line.startswith(("stage1 ", "stage2 ", "alignment "))]
    assert len(table) == 5
    for line in table:  # a star marks the label, where it is among the three classes, which are all there are
        assert line.count("*") == 1 and "high*" in line
    assert "tiny is synthetic: nothing here was filmed" in out


def test_json_is_the_view(all_stages: Any, tiny_shift: ModuleType, open_tiny: Any) -> None:
    code, out, err = show(all_stages, tiny_shift, "t-train-2", "tiny", "--json", "--top", 5)
    assert code == 0, err
    view = read_segment_view(open_tiny(all_stages), all_stages.runs / "tiny", "t-train-2")
    found = json.loads(out)
    assert found == json.loads(json.dumps(make_jsonable(describe_view(view))))
    assert found["segment"]["labels"] == ["low"]
    seen = next(p for p in found["predictions"] if p["speaker"] == "frames")
    assert sum(seen["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len(found["gate"]["groups"][0]["values"]) == view.gate.groups[0].values.size  # type: ignore[union-attr]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_written(all_stages: Any, tiny_shift: ModuleType, tmp_path: Path, ending: str) -> None:
    path = tmp_path / "deep" / f"segment.{ending}"
    code, _, err = show(all_stages, tiny_shift, "t-test-0", "tiny", "--to", path)
    assert code == 0 and f"figure: {path}" in err
    if ending == "png":
        image = Image.open(io.BytesIO(path.read_bytes()))
        assert image.format == "PNG" and image.width > 1000
    else:
        words = [text for element in ElementTree.parse(path).iter() for text in (element.text or "",) if text.strip()]
        assert any(word.startswith("t-test-0: low") for word in words)  # text is text, not outlines
        assert any("most open: channels" in word for word in words)


def test_errors_are_one_line(all_stages: Any, tiny_shift: ModuleType, tmp_path: Path) -> None:
    code, out, err = show(all_stages, tiny_shift, "t-test-9", "tiny")
    assert (code, out) == (2, "")
    assert err.startswith("error: tiny has no segment 't-test-9'; did you mean 't-test-")
    code, _, err = show(all_stages, tiny_shift, "t-test-0", "tiny", "--to", tmp_path / "x.gif")
    assert code == 2 and "a figure is written as .png or .svg" in err
    code, _, err = show(all_stages, tiny_shift, "t-test-0", "tiny", "--shift", "a-b")
    assert code == 2 and "no shift 'a-b'" in err


def test_levels_are_drawn_in_decibels() -> None:
    samples = np.repeat([1.0, 0.0, 10**-1.5, 1.0], 10)  # 0 dB, silence, -30 dB, 0 dB
    assert draw_loudness(samples, 4) == "█▁▅█"
    assert draw_counts(np.array([0.1, 0.1, 0.1, 0.1, 0.9]), 4) == "█  ▃"


def test_of_many_classes_the_segments_own_and_the_likely_are_drawn(all_stages: Any, open_tiny: Any) -> None:
    view = read_segment_view(open_tiny(all_stages), all_stages.runs / "tiny", "t-test-0", ViewOptions(with_media=False))
    assert choose_classes(view, view.predictions) == [0, 1, 2]
    p = np.zeros(30)
    p[[29, 17, 3]] = (0.5, 0.3, 0.2)
    many = replace(
        view,
        classes=tuple(f"c{i}" for i in range(30)),
        segment=replace(view.segment, labels=("c25",)),
        predictions=(replace(view.predictions[0], probabilities=p),),
    )
    chosen = choose_classes(many, many.predictions)
    assert chosen == [0, 1, 2, 3, 4, 5, 6, 7, 8, 17, 25, 29]
    assert "12 of 30 classes" in draw_segment(many).axes[-1].get_title(loc="left")
