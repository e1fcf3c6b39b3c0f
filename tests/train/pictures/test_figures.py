"""Checks that pictures are written in one step, the same every time, with text as text, and that nothing leaks."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from echoshift.pipeline.errors import RunError
from echoshift.train.pictures.figures import house_style, make_figure, render_png, render_svg, write_figure


def draw() -> Figure:
    with house_style():
        figure = make_figure(3, 2)
        axis = figure.subplots()
        axis.plot([1, 3, 2])
        axis.set_title("Größe, 100 %")
    return figure


def test_the_same_figure_gives_the_same_bytes_with_text_as_text() -> None:
    before = dict(matplotlib.rcParams)
    svg = render_svg(draw())
    assert svg == render_svg(draw())
    assert render_png(draw()) == render_png(draw())
    words = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]
    assert "Größe, 100 %" in words
    assert dict(matplotlib.rcParams) == before


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.PNG"
    write_figure(draw(), path)
    assert path.read_bytes() == render_png(draw())
    assert [found.name for found in path.parent.iterdir()] == ["x.PNG"]
    with pytest.raises(RunError, match=r"x\.jpg: a picture is written as \.png or \.svg"):
        write_figure(draw(), tmp_path / "x.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="can't write the picture"):
        write_figure(draw(), tmp_path / "file" / "x.png")
