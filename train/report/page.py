"""Renders the page: one HTML file that holds its style, its script, its pictures and its sound."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup, escape

from echoshift.train.report.blocks import Page

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render_page(page: Page) -> str:
    """Render the page as HTML; whatever words it is made of are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = mark_code
    return environment.get_template("page.html.j2").render(
        page=page, style=_read_asset("report.css"), script=_read_asset("report.js")
    )


def write_page(path: Path, page: Page) -> int:
    """Write the page in one step, and return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = render_page(page).encode("utf-8")
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_bytes(data)
    fresh.replace(path)
    return len(data)


def mark_code(text: str) -> Markup:
    """Escape words and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _read_asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))
