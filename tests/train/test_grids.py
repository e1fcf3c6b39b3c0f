import re

import pytest
from pydantic import BaseModel

from pipeline.cards import DatasetCard, Shift, read_dataset_card
from pipeline.errors import RunError
from train.grids import list_grids, plan_runs, read_grid
from train.runs import hash_config
from train.stage1.config import Stage1Config

CARD = DatasetCard(
    name="toy",
    title="Toy",
    task="single-label",
    metric="top1",
    classes=("a", "b"),
    domains=("D1", "D2"),
    shifts=(Shift(source=("D1",), target="D2"), Shift(source=("D2",), target="D1")),
)

GRID = """
title = "Two rows"
stage = "stage1"
baseline = "first"

[[rows]]
name = "first"
overrides = ["absent.weight=0"]

[[rows]]
name = "second"
"""


def resolve(overrides):
    """Applies overrides to a Stage1Config: the field must be there, and take the value."""
    fields = Stage1Config(visual={"encoder": "slowfast_demo"}, sound={"encoder": "resnet_demo"}).model_dump(mode="json")
    for override in overrides:
        key, _, value = override.partition("=")
        *parts, field = key.split(".")
        model, place = Stage1Config, fields
        for part in parts:
            model, place = model.model_fields[part].annotation, place[part]
            assert issubclass(model, BaseModel)
        assert field in model.model_fields, key
        place[field] = value
    return Stage1Config.model_validate(fields).model_dump(mode="json")


def write_grid(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", list_grids())
def test_each_grid_sets_fields_that_there_are(name):
    grid = read_grid(name)
    assert grid.stage == "stage1"
    card = CARD.model_copy(update={"task": grid.task or "single-label"})
    planned = plan_runs(grid, card, resolve)
    assert len(planned) == 3 * 2 * len(grid.rows)
    assert all(run.config_hash == hash_config(resolve(run.overrides)) for run in planned)


def test_the_grids_are_those_of_the_issue():
    assert set(list_grids()) >= {"a-table2-stage1", "a-fig4", "a-bn-mode", "a-lambda", "a-absent-r", "a-gamma"}


@pytest.mark.parametrize("dataset", ["epic", "charades_ego"])
def test_table_2_finds_each_published_number(dataset):
    grid, card = read_grid("a-table2-stage1"), read_dataset_card(dataset)
    listed = {(p.paper, p.table, p.method): p.scores for p in card.published}
    numbers = [listed[grid.published.paper, grid.published.table, row.published] for row in grid.rows]
    expected = {"epic": [48.0, 51.2, 53.7, 55.7], "charades_ego": [23.1, 23.5, 24.4, 25.0]}[dataset]
    assert [next(iter(scores.values())) for scores in numbers] == expected


def test_the_rows_of_table_2_are_the_papers():
    rows = {run.row: run.config for run in plan_runs(read_grid("a-table2-stage1"), CARD, resolve, seeds=[0])}
    found = [(c["attention"]["enabled"], c["absent"]["weight"], c["balance"]["kind"]) for c in rows.values()]
    assert found == [(False, 0, "none"), (True, 0, "none"), (True, 1, "none"), (True, 1, "audio")]


def test_runs_are_planned_in_whole_seeds(tmp_path):
    grid = read_grid(write_grid(tmp_path, GRID))
    planned = plan_runs(grid, CARD, resolve, seeds=[5, 4])
    assert [(run.seed, run.shift, run.row) for run in planned] == [
        (seed, shift, row) for seed in (5, 4) for shift in ("D1-D2", "D2-D1") for row in ("first", "second")
    ]
    assert [(run.config["absent"]["weight"], run.overrides) for run in planned[:2]] == [
        (0, ("absent.weight=0",)),
        (1, ()),
    ]


def test_a_grids_own_seeds_and_shifts_yield_to_those_asked_for(tmp_path):
    grid = read_grid(write_grid(tmp_path, 'seeds = [7]\nshifts = ["D2-D1"]\n' + GRID))
    assert {(run.seed, run.shift) for run in plan_runs(grid, CARD, resolve)} == {(7, "D2-D1")}
    assert {(run.seed, run.shift) for run in plan_runs(grid, CARD, resolve, seeds=[1], shifts=["D1-D2"])} == {
        (1, "D1-D2")
    }


@pytest.mark.parametrize(
    ("sources", "expected"),
    [("single", {"D1-D2", "D2-D1"}), ("several", {"D1+D2-D3"}), ("any", {"D1-D2", "D2-D1", "D1+D2-D3"})],
)
def test_shifts_are_those_with_as_many_sources(tmp_path, sources, expected):
    grid = read_grid(write_grid(tmp_path, f'sources = "{sources}"\n' + GRID))
    card = CARD.model_copy(update={"shifts": (*CARD.shifts, Shift(source=("D1", "D2"), target="D3"))})
    assert {run.shift for run in plan_runs(grid, card, resolve)} == expected
    assert {run.shift for run in plan_runs(grid, card, resolve, shifts=["D1+D2-D3"])} == {"D1+D2-D3"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('baseline = "first"', 'baselin = "first"', "own.toml: baselin: no such key; did you mean 'baseline'?"),
        ("overrides =", "overides =", "own.toml: rows.0.overides: no such key; did you mean 'overrides'?"),
        ('title = "Two rows"', 'name = "x"', "own.toml: name: a grid is named by its file"),
        ('title = "Two rows"', "", "own.toml: title: Field required"),
        ('"first"\n\n', '"furst"\n\n', "baseline 'furst' is no row; did you mean 'first'?"),
        ('"stage1"', '"stage9"', "own.toml: stage: Input should be"),
        ("absent.weight=0", "absent.weight", "own.toml: rows.0.overrides: .*'absent.weight' is not part.field=value"),
        ('0"]', '0", "absent.weight=1"]', "field 'absent.weight' is listed twice"),
        ('"second"', '"first"', "row 'first' is listed twice"),
        ('"second"', '"second"\npublished = "V"', "`published` names no paper and table"),
        ("[[rows]]", "[[rows", "own.toml is not valid TOML"),
        ('"stage1"\n', '"stage1"\npublished = { paper = "A", tabel = "2" }\n', "published.tabel: no such key"),
    ],
)
def test_a_faulty_grid_is_named_with_its_key(tmp_path, old, new, words):
    assert old in GRID
    with pytest.raises(RunError, match=words):
        read_grid(write_grid(tmp_path, GRID.replace(old, new, 1)))


def test_an_unknown_grid_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(RunError, match=re.escape("there is no grid 'a-table2-stage'; did you mean 'a-table2-stage1'?")):
        read_grid("a-table2-stage")
    with pytest.raises(RunError, match="there is no grid 'zzz'; there are a-absent-r, a-bn-mode"):
        read_grid("zzz")
    with pytest.raises(RunError, match=r"no grid file .*a-fig5.toml; did you mean 'a-fig4'"):
        read_grid(tmp_path / "a-fig5.toml")


def test_what_a_card_lacks_is_named(tmp_path):
    grid = read_grid(write_grid(tmp_path, GRID))
    with pytest.raises(RunError, match="toy has no shift 'D1-D3'; did you mean 'D1-D2'"):
        plan_runs(grid, CARD, resolve, shifts=["D1-D3"])
    with pytest.raises(RunError, match=r"toy has no shift for grid own \(sources: single\)"):
        plan_runs(grid, CARD.model_copy(update={"shifts": ()}), resolve)
    with pytest.raises(RunError, match="a-gamma is for multi-label datasets; toy is single-label"):
        plan_runs(read_grid("a-gamma"), CARD, resolve)
    with pytest.raises(RunError, match="seed 1 is listed twice"):
        plan_runs(grid, CARD, resolve, seeds=[1, 2, 1])


def test_rows_that_are_the_same_run_are_an_error(tmp_path):
    grid = read_grid(write_grid(tmp_path, GRID.replace("absent.weight=0", "absent.weight=1.0")))
    with pytest.raises(RunError, match="rows 'first' and 'second' are the same configuration"):
        plan_runs(grid, CARD, resolve)


def test_a_rows_override_that_cannot_be_says_which_row(tmp_path):
    def refuse(overrides):
        raise RunError("no field absent.weight")

    with pytest.raises(RunError, match="no field") as caught:
        plan_runs(read_grid(write_grid(tmp_path, GRID)), CARD, refuse)
    assert caught.value.__notes__ == ["in row 'first' of grid own"]
