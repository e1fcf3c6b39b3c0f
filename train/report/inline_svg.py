"""Turns a matplotlib figure into SVG that lies inside a page: its text stays text, its colours follow the page's."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that charts of this package are drawn in stand for colours of the page; each is one no figure has by chance.
INK, QUIET, SURFACE = "#010203", "#010204", "#010205"
SERIES = ("#0101f1", "#0101f2", "#0101f3", "#0101f4", "#0101f5", "#0101f6", "#0101f7", "#0101f8")
_VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--line)",
    SURFACE: "var(--surface)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, start=1)},
}


@contextmanager
def page_style() -> Iterator[None]:
    """Draw in the page's colours and fonts while the block runs, and leave text as text."""
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "echoshift",
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": QUIET,
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": QUIET,
            "grid.linewidth": 0.6,
            "xtick.color": QUIET,
            "ytick.color": QUIET,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "axes.prop_cycle": cycler(color=SERIES),
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "legend.frameon": False,
            "savefig.facecolor": "none",
        }
    ):
        yield


def inline_figure(figure: Figure, name: str, alternative: str) -> str:
    """Return a figure as one `<svg>` element with a text alternative; `name` is unique in the page.

    Sizes are left to the page's style: the element has a view box and grows to the width it is given. Ids are prefixed
    with the name, because figures number their parts alike.
    """
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "echoshift"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return adapt_svg(text.getvalue(), name, alternative)


def adapt_svg(svg: str, name: str, alternative: str) -> str:
    """Make matplotlib's SVG document an element of a page (`inline_figure`)."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'href="#{name}-\2"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    # Figures from elsewhere are drawn in black on white; both follow the page.
    body = re.sub(r"(fill|stroke): #000000", r"\1: var(--ink)", body)
    body = re.sub(r"(fill|stroke): #ffffff", r"\1: var(--surface)", body)
    body = body.replace("font-family: 'DejaVu Sans'", "font-family: inherit").replace("'DejaVu Sans', ", "")
    # Text without a fill of its own is black in SVG.
    body = re.sub(r"<text style=\"(?![^\"]*fill)", '<text style="fill: var(--ink); ', body)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None, "matplotlib writes a view box"
    label = html.escape(alternative, quote=True)
    return f'<svg class="figure" {box[0]} role="img" aria-label="{label}">{rest.strip()}'
