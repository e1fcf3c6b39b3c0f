"""Looks at the report in headless Chromium: numbers, sorting, filters, colours, a phone's width, accessibility."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from echoshift.train.look.report_results import PRESETS
from echoshift.train.tables import PERCENT

pytestmark = pytest.mark.browser

TABLE = f"two-{PRESETS[0]}-last"

CHROMIUM = os.environ.get("ECHOSHIFT_CHROMIUM") or shutil.which("chromium") or ""
# Nothing that the browser does by itself asks the network for anything, so that a request can only be the page's.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the browser once."""
    if not CHROMIUM:
        pytest.skip("no chromium; install Debian's, or set ECHOSHIFT_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright, which drives the browser")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser: Any, reported: Any) -> Iterator[Any]:
    """Open the page from the disk; return it with what it said and asked for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(reported.path.as_uri())
    page.wait_for_load_state("load")
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    yield page, said, asked
    page.close()


def read_column(page: Any, table: str, column: int) -> list[str]:
    """Read the words of a table's column, of the rows that are shown, from above to below."""
    found: list[str] = page.evaluate(
        "([id, i]) => [...document.getElementById(id).tBodies[0].rows].filter((row) => !row.hidden)"
        ".map((row) => row.cells[i].innerText.trim())",
        [table, column],
    )
    return found


def read_values(page: Any, table: str, column: int) -> list[float | None]:
    """Read the numbers that a table's column is sorted by."""
    found: list[float | None] = page.evaluate(
        "([id, i]) => [...document.getElementById(id).tBodies[0].rows].filter((row) => !row.hidden)"
        ".map((row) => 'value' in row.cells[i].dataset ? Number(row.cells[i].dataset.value) : null)",
        [table, column],
    )
    return found


def find_column(page: Any, table: str, name: str) -> int:
    """Find a table's column by the words of its header."""
    headers: list[str] = page.evaluate(
        "(id) => [...document.getElementById(id).tHead.rows[0].cells].map((cell) => cell.innerText.trim())", table
    )
    return [header.replace("\u00a0", " ") for header in headers].index(name)


def test_it_asks_for_nothing_and_complains_of_nothing(opened: Any, reported: Any) -> None:
    page, said, asked = opened
    assert page.title() == "tiny – echoshift report"
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [reported.path.as_uri()]


def test_its_numbers_are_those_of_the_results(opened: Any, reported: Any) -> None:
    page, _, _ = opened
    scores = {(r.row, r.seed): r.scores.main.value * PERCENT for r in reported.records}
    means = [(scores[row, 0] + scores[row, 1]) / 2 for row in ("plain", "gated")]
    assert read_column(page, TABLE, 0) == ["plain", "gated"]
    assert read_values(page, TABLE, find_column(page, TABLE, "s-t")) == pytest.approx(means)
    silent = {(r.row, r.seed): r.scores.silent.value * PERCENT for r in reported.records}
    means = [(silent[row, 0] + silent[row, 1]) / 2 for row in ("plain", "gated")]
    assert read_values(page, TABLE, find_column(page, TABLE, "silent")) == pytest.approx(means)
    column = find_column(page, "all-runs", "score, %")
    listed = [
        value
        for row, value in zip(read_column(page, "all-runs", 1), read_values(page, "all-runs", column), strict=True)
        if row in ("plain", "gated")
    ]
    assert listed == [r.scores.main.value * PERCENT for r in reported.records]
    assert "mean of 2 seeds" in page.inner_text("#results")
    assert PRESETS[0] in page.inner_text("#results")


def test_a_grids_table_is_the_one_that_the_command_prints(opened: Any, reported: Any, tiny_shift: ModuleType) -> None:
    page, _, _ = opened
    places = ["--cache", reported.cache, "--manifests", reported.tiny.root, "--runs", reported.tiny.runs]
    grid = reported.cache.parent / "two.toml"
    code, out, err = tiny_shift.run("table", "tiny", "--grid", grid, "--shifts", "s-t", "--form", "markdown", *places)
    assert code == 0, err
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line)
    for i, name in enumerate(header):
        shown = read_column(page, TABLE, find_column(page, TABLE, name))
        assert shown == [row[i] for row in rows], name
    assert {"s-t", "difference to plain", "p"} <= set(header)


def test_tables_sort_both_ways_and_what_has_no_number_comes_last(opened: Any) -> None:
    page, _, _ = opened
    column = find_column(page, "all-runs", "score, %")
    header = page.locator(f"#all-runs thead th:nth-child({column + 1})")
    header.locator("button").click()
    falling = read_values(page, "all-runs", column)
    assert header.get_attribute("aria-sort") == "descending" and falling == sorted(falling, reverse=True)
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert read_values(page, "all-runs", column) == falling[::-1] != falling
    silent = find_column(page, "all-runs", "silent, %")
    page.locator(f"#all-runs thead th:nth-child({silent + 1}) button").click()
    values = read_values(page, "all-runs", silent)
    there = [value for value in values if value is not None]
    assert values == [*sorted(there, reverse=True), *[None] * (len(values) - len(there))] and None in values
    assert header.get_attribute("aria-sort") is None
    page.locator("#all-runs thead th:nth-child(2) button").click()
    assert read_column(page, "all-runs", 1) == ["gated", "gated", "plain", "plain", "–"]


def test_a_filter_keeps_the_rows_that_hold_all_its_words(opened: Any) -> None:
    page, _, _ = opened
    n_all = len(read_column(page, "all-runs", 0))
    page.fill("#all-runs-filter", "GATED stage1")
    assert read_column(page, "all-runs", 1) == ["gated", "gated"]
    block = page.locator("[data-filtered]", has=page.locator("#all-runs"))
    assert block.locator(".filter-count").inner_text() == f"2 of {n_all}"
    page.fill("#all-runs-filter", "")
    assert len(read_column(page, "all-runs", 0)) == n_all


def test_classes_of_a_row_and_shift_are_shown(opened: Any) -> None:
    page, _, _ = opened
    parts = page.locator("#results details details", has=page.locator(f"#{TABLE}-1-classes"))
    assert parts.locator("summary").inner_text() == "gated, s-t"
    cells = parts.locator(".confusion tbody td").all_inner_texts()
    # Of 4 segments, labels 0 1 0 1, the first seed has all right, the second the last one wrong.
    assert cells == ["4", "0", "0", "0", "3", "1", "0", "0", "0"]


def test_colours_follow_the_system_and_the_switch(opened: Any) -> None:
    page, _, _ = opened
    read_paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(read_paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(read_paper)
    assert light == "rgb(247, 247, 244)" and dark == "rgb(20, 23, 26)"
    page.click("button.theme")
    assert page.evaluate(read_paper) == light
    page.click("button.theme")
    assert page.evaluate(read_paper) == dark
    page.evaluate("delete document.documentElement.dataset.theme")
    page.emulate_media(color_scheme="light")
    assert page.evaluate(read_paper) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-playwright-python")
    page, _, _ = opened
    page.emulate_media(color_scheme=scheme)
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if scheme == "dark":  # the one rule that colours have a say in
        options["runOnly"] = ["color-contrast"]
    found = axe.Axe().run(page, options=options).response["violations"]
    page.emulate_media(color_scheme="light")
    assert [(f["id"], f["nodes"][0]["html"]) for f in found] == []


def test_a_phone_scrolls_no_way_but_down(opened: Any) -> None:
    page, _, _ = opened
    page.set_viewport_size({"width": 360, "height": 740})
    width, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width == screen == 360
    table = page.locator(".table-block .scroll", has=page.locator("#all-runs"))
    assert table.evaluate("(box) => box.scrollWidth > box.clientWidth")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_segments_are_seen_and_heard(opened: Any) -> None:
    page, _, _ = opened
    cards = page.locator(".segment")
    assert cards.count() == 8  # two of each of two domains' two splits
    widths = page.evaluate("Promise.all([...document.images].map(async (i) => (await i.decode(), i.naturalWidth)))")
    assert len(widths) == 8 * 5 and all(width > 0 for width in widths)  # four frames and a spectrogram each
    duration_s = page.evaluate(
        """() => new Promise((resolve, reject) => {
          const sound = document.querySelector(".segment audio");
          sound.addEventListener("loadedmetadata", () => resolve(sound.duration));
          sound.addEventListener("error", () => reject(sound.error.message));
          sound.preload = "metadata";
          sound.load();
        })"""
    )
    assert duration_s == pytest.approx(1.0, abs=0.01)
    page.fill("#segments-filter", "t-test high")
    shown = [card.get_by_role("heading").inner_text() for card in cards.all() if card.is_visible()]
    assert len(shown) == 1 and shown[0] in ("t-test-1", "t-test-3")
    page.fill("#segments-filter", "")


def test_features_are_drawn_before_and_after(opened: Any) -> None:
    page, _, _ = opened
    figures = page.locator("#features figure svg[role=img]")
    embedding, norms, cam = [figure.get_attribute("aria-label") for figure in figures.all()]
    assert embedding.startswith("t-SNE of all 8 segments, tiny") and "before: slowfast_demo as extracted" in embedding
    assert norms.startswith("Norms of pooled, s-t: histogram")
    assert cam.startswith("Class activation maps over a clip of t-test-0") and figures.nth(2).locator("image").count()
    assert "make align METHOD=rna DATASET=tiny" in page.inner_text("#features")
