"""Checks that the numbers of the published tables in docs/ are those of the cards, and that each has its grid."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from echoshift.pipeline.cards import read_dataset_card
from echoshift.train.grids import list_grids, read_grid

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "published-tables.md"
_NOT_ON_THE_PAGE = {"Table 3 (silent activities)", "Table 3 (audible activities)", "section 5.2"}


def read_rows() -> set[tuple[str, ...]]:
    """Read the rows of all tables, numbers as they are printed."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")}


@pytest.mark.parametrize("dataset", ["epic", "charades_ego"])
def test_numbers_are_those_of_the_card(dataset: str) -> None:
    rows, n_found = read_rows(), 0
    for published in read_dataset_card(dataset, ROOT / "data" / "manifests").published:
        if published.table in _NOT_ON_THE_PAGE:
            continue
        n_digits = 2 if published.paper.startswith("Planamente") else 1
        wanted = (published.method, *(f"{score:.{n_digits}f}" for score in published.scores.values()))
        assert wanted in rows, f"{published.paper}, {published.table}: {wanted}"
        n_found += 1
    assert n_found > 8


def test_every_grid_of_a_paper_is_named_with_its_command(blocks: ModuleType) -> None:
    named = set(re.findall(r"GRID=([\w-]+)", PAGE.read_text(encoding="utf-8")))
    of_papers = {name for name in list_grids() if read_grid(name).published is not None}
    of_parts = {"a-table2-stage1", "a-table2-stage2"}  # rows of a-table2
    assert of_papers - of_parts <= named
