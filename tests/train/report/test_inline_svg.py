"""Checks that a figure becomes an element of a page: text as text, ids of its own, the page's colours."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from echoshift.train.report.charts import draw_histogram, draw_losses
from echoshift.train.report.inline_svg import inline_figure

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1))


def test_two_figures_share_no_id_and_refer_to_their_own() -> None:
    svgs = [draw_losses(name, "Losses", [{"a": [2.0, 1.0]}], "loss") for name in ("one", "two")]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in svgs]
    assert ids[0] and not ids[0] & ids[1]
    for found, svg in zip(ids, svgs, strict=True):
        referred = {*re.findall(r"url\(#([^)]+)\)", svg), *re.findall(r'href="#([^"]+)"', svg)}
        assert referred and referred <= found


def test_losses_are_drawn_and_told() -> None:
    runs = [{"source": [4.0, None, 1.0]}, {"source": [2.0, None, 0.5]}]
    element = parse(draw_losses("losses", "Losses of <x>", runs, "loss"))
    assert element.get("role") == "img" and element.get("viewBox") and element.get("width") is None
    assert element.get("aria-label") == "Losses of <x>, mean of 2 seeds: source from 3 to 0.75."
    words = [text.text for text in element.iter(f"{SVG}text")]
    assert "epoch" in words and "loss" in words


def test_a_histogram_says_what_it_counts() -> None:
    svg = draw_histogram("h", "Norms", [0.0, 1.0, 2.0], {"t": [3, 4], "s": [0, 5]}, "norm", y_label="clips")
    assert 'aria-label="Norms: histogram from 0 to 2, norm; counted: t 7; s 5."' in svg
    assert "var(--series-1)" in svg and "var(--series-2)" in svg and "var(--ink)" in svg
    assert not re.search(r"#0101f\d|#01020\d", svg)


def test_a_figure_drawn_elsewhere_follows_the_page_too() -> None:
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([0, 1], color="black")
    axes.set_title("black on white")
    svg = inline_figure(figure, "other", 'says "so"')
    assert "#000000" not in svg and "stroke: var(--ink)" in svg
    assert parse(svg).get("aria-label") == 'says "so"'
    assert "<path" in svg and "<text" in svg and "<image" not in svg
