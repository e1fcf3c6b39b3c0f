import re
from functools import cache

import pytest

from echoshift.pipeline.cards import DatasetCard, Shift, read_dataset_card
from echoshift.pipeline.errors import RunError
from echoshift.train.grids import list_grids, plan_runs, read_grid
from echoshift.train.runs import hash_config
from echoshift.train.settings import resolve_settings

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


@cache
def resolve(stage, overrides):
    """Resolve overrides as the commands do: the field must be there, and take the value."""
    return resolve_settings(stage, read_dataset_card("epic"), "paper", None, overrides).describe()


def write_grid(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", list_grids())
def test_each_grid_sets_fields_that_there_are(name):
    grid = read_grid(name)
    several = Shift(source=("D1", "D2"), target="D3")
    card = CARD.model_copy(
        update={"task": grid.task or "single-label", "domains": ("D1", "D2", "D3"), "shifts": (*CARD.shifts, several)}
    )
    planned = plan_runs(grid, card, resolve)
    assert len(planned) == 3 * (1 if grid.sources == "several" else 2) * len(grid.rows)
    assert all(run.config_hash == hash_config(resolve(run.stage, run.overrides)) for run in planned)


@pytest.mark.parametrize(
    ("name", "dataset", "expected"),
    [
        ("a-table2", "epic", [48.0, 51.2, 53.7, 55.7, 56.1, 57.2, 59.2]),
        ("a-table2", "charades_ego", [23.1, 23.5, 24.4, 25.0, 25.0, 25.4, 26.3]),
        ("a-table2-stage1", "epic", [48.0, 51.2, 53.7, 55.7]),
        ("a-table2-stage2", "epic", [56.1, 57.2, 59.2]),
        ("a-table3", "charades_ego", [23.1, 26.3]),
        ("a-missing-audio", "epic", [50.7, 51.2]),
        ("a-table4", "epic", [54.1, 61.0]),
    ],
)
def test_a_grid_finds_each_published_number(name, dataset, expected):
    grid, card = read_grid(name), read_dataset_card(dataset)
    listed = {(p.paper, p.table, p.method): p.scores for p in card.published}
    named = [row.published for row in grid.rows if row.published]
    numbers = [listed[grid.published.paper, grid.published.table, name] for name in named]
    assert [scores.get("mean", next(iter(scores.values()))) for scores in numbers] == expected


def test_the_last_rows_of_table_2_are_z_m_z_prime_and_z():
    rows = {run.row: run for run in plan_runs(read_grid("a-table2"), CARD, resolve, seeds=[0])}
    found = [rows[name].config["stage2"]["recogniser"] for name in ("+ z^m", "+ z'", "+ z")]
    assert [(r["class_token"], r["audio_tokens"], r["domain_embedding"]) for r in found] == [
        ("learnable", True, "none"), ("learnable", True, "per_domain"), ("h_prime", False, "per_domain")
    ]  # fmt: skip
    assert [rows[name].stage for name in ("+ balanced", "+ z")] == ["stage1", "stage2"]
    # The recogniser's rows stand on the encoder of the row above them.
    [stream] = rows["+ z"].config["streams"]
    assert stream["stage1"] == rows["+ balanced"].config


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
    words = "there is no grid 'a-table2-stage'; did you mean 'a-table2-stage1' or 'a-table2-stage2'?"
    with pytest.raises(RunError, match=re.escape(words)):
        read_grid("a-table2-stage")
    with pytest.raises(RunError, match="there is no grid 'zzz'; there are a-absent-r, a-bn-mode"):
        read_grid("zzz")
    with pytest.raises(RunError, match=r"no grid file .*a-lambdas.toml; did you mean 'a-lambda'"):
        read_grid(tmp_path / "a-lambdas.toml")


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
    def refuse(stage, overrides):
        raise RunError("no field absent.weight")

    with pytest.raises(RunError, match="no field") as caught:
        plan_runs(read_grid(write_grid(tmp_path, GRID)), CARD, refuse)
    assert caught.value.__notes__ == ["in row 'first' of grid own"]
