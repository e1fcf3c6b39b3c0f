"""Makes matplotlib figures in one style, without a display, and writes them as PNG or SVG with text as text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echoshift.pipeline.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people who see fewer colours tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F", "#5B5B5B")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
VISUAL_COLOUR, AUDIO_COLOUR, TRUE_COLOUR, QUIET_COLOUR = "#0072B2", "#E69F00", "#009E73", "#8A8A8A"
_DPI = 130
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "echoshift",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.dpi": _DPI,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A figure with what it says.

    Attributes:
        numbers: by name, what is drawn; JSON, but for NumPy's arrays.
        description: in words, for who can't see it.
    """

    figure: Figure
    numbers: Mapping[str, Any]
    description: str


@contextmanager
def house_style() -> Iterator[None]:
    """Draw what is drawn in the block in the style of the house, and changes nothing outside of it."""
    from matplotlib import rc_context

    style: Any = dict(_STYLE)  # its stubs list every name there is
    with rc_context(style):
        yield


def make_figure(width_in: float, height_in: float) -> Figure:
    """Make an empty figure that belongs to no window; call it within `house_style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def render_svg(figure: Figure) -> str:
    """Render a figure as SVG whose text is text; the same figure gives the same bytes."""
    file = io.StringIO()
    with house_style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def render_png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    file = io.BytesIO()
    with house_style():
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as .png or .svg in one step, and make the folder; raises RunError for another ending."""
    ending = path.suffix.lower()
    if ending not in (".png", ".svg"):
        raise RunError(f"{path}: a picture is written as .png or .svg; name it so")
    data = render_png(figure) if ending == ".png" else render_svg(figure).encode()
    fresh = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError as error:
        raise RunError(f"{path}: can't write the picture: {error.strerror or error}") from error
