"""Checks what is offered in the place of a mistyped name."""

from __future__ import annotations

import pytest

from echoshift.pipeline.errors import find_nearest, suggest

GRIDS = ("a-table2", "a-table2-stage1", "a-table2-stage2", "b-table1a", "b-table1b")


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("papper", ("paper", "released", "quick"), ["paper"]),
        ("EPIC", ("epic", "hac"), ["epic"]),
        ("d1-d2", ("D1-D2", "D2-D1"), ["D1-D2"]),
        ("epic-kitchens-55", ("epic", "hac", "demo"), ["epic"]),  # not alike (8/20), but its beginning
        ("a-table2-stage", GRIDS, ["a-table2-stage1", "a-table2-stage2"]),
        ("zzz", GRIDS, []),
        ("x", ("xyzzy",), []),  # one letter is the beginning of anything
    ],
)
def test_the_nearest_names_are_those_that_are_alike(name: str, known: tuple[str, ...], near: list[str]) -> None:
    assert find_nearest(name, known) == near


def test_a_name_far_less_alike_than_the_nearest_is_not_offered() -> None:
    # Ratios to "slowfast": 16/17 and 16/23 by hand; the second is over the cutoff, but 0.25 below the first.
    assert find_nearest("slowfast", ("slowfasts", "slowfast_r50_xy")) == ["slowfasts"]


def test_the_hint_says_the_nearest_and_how_to_see_all() -> None:
    assert suggest("papper", ["paper"]) == "did you mean 'paper'?"
    assert suggest("abx", ["aby", "abz"], listed_by="echoshift list grids") == (
        "did you mean 'aby' or 'abz'? `echoshift list grids` lists all"
    )


def test_without_a_near_name_all_are_listed_up_to_24() -> None:
    assert suggest("q", ["one", "two"], listed_by="x", there="it has") == "it has one, two"
    assert suggest("q", []) == "there are none"
    many = [f"n{i:02d}" for i in range(30)]
    assert suggest("q", many, listed_by="echoshift list grids") == (
        f"there are {', '.join(many[:24])}, … 30 in all; `echoshift list grids` lists all"
    )
