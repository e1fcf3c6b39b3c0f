"""Checks that figures are written in one step, the same every time, with text as text, and what charts say."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from echoshift.pipeline.errors import RunError
from echoshift.train.look.figures import (
    Plot,
    draw_histogram,
    draw_losses,
    make_figure,
    plot_style,
    render_figure,
    render_inline,
    write_figure,
)


def draw() -> Figure:
    with plot_style():
        figure = make_figure(3, 2)
        axis = figure.subplots()
        axis.plot([1, 3, 2])
        axis.set_title("Größe, 100 %")
    return figure


def test_the_same_figure_gives_the_same_bytes_with_text_as_text() -> None:
    before = dict(matplotlib.rcParams)
    svg = render_figure(draw(), "svg")
    assert svg == render_figure(draw(), "svg")
    assert render_figure(draw(), "png") == render_figure(draw(), "png")
    words = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]
    assert "Größe, 100 %" in words
    assert dict(matplotlib.rcParams) == before


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.PNG"
    write_figure(draw(), path)
    assert path.read_bytes() == render_figure(draw(), "png")
    assert [found.name for found in path.parent.iterdir()] == ["x.PNG"]
    with pytest.raises(RunError, match=r"x\.jpg: a figure is written as \.png or \.svg"):
        write_figure(draw(), tmp_path / "x.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="can't write the figure"):
        write_figure(draw(), tmp_path / "file" / "x.png")


SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" xmlns:xlink="x" ', 1))


def test_two_inline_figures_share_no_id_and_refer_to_their_own() -> None:
    plot = draw_losses("Losses", [{"a": [2.0, 1.0]}])
    svgs = [render_inline(plot, name) for name in ("one", "two")]
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in svgs]
    assert ids[0] and not set(ids[0]) & set(ids[1]) and len(set(ids[0])) == len(ids[0])
    for found, svg in zip(ids, svgs, strict=True):
        referred = {*re.findall(r"url\(#([^)]+)\)", svg), *re.findall(r'href="#([^"]+)"', svg)}
        assert referred and referred <= set(found)


def test_inline_figures_take_the_ink_of_the_page() -> None:
    with plot_style():
        figure = make_figure(2, 2)
        figure.subplots().plot([0, 1], color="black")
    svg = render_inline(Plot(figure, {}, 'says "so"'), "other")
    assert "#000000" not in svg and "stroke: currentColor" in svg
    assert parse(svg).get("aria-label") == 'says "so"' and parse(svg).get("role") == "img"
    assert "<path" in svg and "<text" in svg and "<image" not in svg


def test_losses_are_drawn_and_told() -> None:
    runs = [{"source": [4.0, None, 1.0]}, {"source": [2.0, None, 0.5]}]
    plot = draw_losses("Losses of <x>", runs)
    assert plot.description == "Losses of <x>, mean of 2 seeds: source from 3 to 0.75."
    lines = [line.get_xydata().tolist() for line in plot.figure.axes[0].lines]
    assert lines == [[[1, 4], [3, 1]], [[1, 2], [3, 0.5]], [[1, 3], [3, 0.75]]]
    element = parse(render_inline(plot, "losses"))
    assert element.get("viewBox") and element.get("width") is None
    assert {"epoch", "loss"} <= {text.text for text in element.iter(f"{SVG}text")}


@pytest.mark.parametrize("is_logarithmic", [False, True])
def test_a_histogram_counts_every_value_once(is_logarithmic: bool) -> None:
    values = {"a": np.array([1.0, 2.0, 4.0, 0.5, 3.0]), "b": np.array([8.0, 2.0])}
    plot = draw_histogram("Durations", values, "seconds", "segments", is_logarithmic=is_logarithmic)
    edges = plot.numbers["edges"]
    assert edges[0] <= 0.5 and edges[-1] >= 8.0
    for name, of in values.items():
        assert plot.numbers["counts"][name].tolist() == np.histogram(of, edges)[0].tolist()
        assert plot.numbers["counts"][name].sum() == len(of)
    assert plot.description.endswith("counted: a 5, median 2; b 2, median 5.")
