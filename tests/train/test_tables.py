import csv
import io
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from scipy import stats

from echoshift.pipeline.cards import DatasetCard, PublishedNumber, Shift, read_dataset_card
from echoshift.pipeline.errors import RunError
from echoshift.train.grids import Grid, GridRow, PublishedTable, plan_runs, read_grid
from echoshift.train.runs import RunRecord
from echoshift.train.scores import Score, Scores
from echoshift.train.tables import NO_BENCHMARK, format_csv, format_latex, format_markdown, lay_out, make_table

CARD = DatasetCard(
    name="toy",
    title="Toy",
    task="single-label",
    metric="top1",
    classes=("a", "b"),
    domains=("D1", "D2", "D3"),
    shifts=(Shift(source=("D1",), target="D2"), Shift(source=("D2",), target="D1")),
    published=(
        PublishedNumber(paper="P", table="T", method="base", metric="top1", scores={"mean": 48.0}, note="I3D"),
        PublishedNumber(paper="P", table="T", method="more", metric="top1", scores={"D1-D2": 61.5, "mean": 50.0}),
        PublishedNumber(paper="P", table="U", method="most", metric="top1", scores={"mean": 99.0}),
    ),
)
GRID = Grid(
    name="toy-grid",
    title="Two methods",
    stage="stage1",
    baseline="V_1",
    published=PublishedTable(paper="P", table="T"),
    rows=(
        GridRow(name="V_1", overrides=("absent.weight=0",), published="base"),
        GridRow(name="+ more", overrides=("absent.weight=1",), published="more"),
        GridRow(name="+ most", overrides=("absent.weight=2",), published="most"),
    ),
)
PLANNED = plan_runs(GRID, CARD, lambda stage, overrides: {"overrides": list(overrides)})
# By row, shift and seed, top-1; of "+ most" one seed is whole, and one has one shift.
TOP1 = {
    "V_1": {"D1-D2": [0.50, 0.52, 0.54], "D2-D1": [0.40, 0.41, 0.45]},
    "+ more": {"D1-D2": [0.60, 0.58, 0.66], "D2-D1": [0.44, 0.47, 0.46]},
    "+ most": {"D1-D2": [0.70, 0.71], "D2-D1": [0.50]},
}


def make_scores(top1, *, n=100, silent=None, rare=None):
    value = {"silent": (None, 0), "rare": (None, 0)} | {
        name: (part, n // 4) for name, part in (("silent", silent), ("rare", rare)) if part is not None
    }
    parts = {name: Score(value=number, n=n_part) for name, (number, n_part) in value.items()}
    rest = {
        name: Score(value=top1, n=n - parts[part].n) for name, part in (("audible", "silent"), ("frequent", "rare"))
    }
    main = {"task": "single-label", "n": n, "top1": Score(value=top1, n=n)}
    return Scores(
        **main, class_mean=Score(value=top1, n=n, n_classes=2), binned_by="pair", per_class=(), **parts, **rest
    )


def make_record(run, scores, **changes):
    fields = {
        "dataset": "toy",
        "stage": "stage1",
        "shift": run.shift,
        "seed": run.seed,
        "row": run.row,
        "config": dict(run.config),
        "config_hash": run.config_hash,
        "manifest_sha256": "a" * 64,
        "code_version": "0.1.0",
        "selection": "last",
        "scores": scores,
        "started": datetime(2026, 11, 25, 9, 0, tzinfo=UTC),
        "ended": datetime(2026, 11, 25, 9, 1, tzinfo=UTC),
        "duration_s": 60.0,
        "device": "cpu",
        **changes,
    }
    return RunRecord(**fields)


def make_records(**changes):
    return [
        make_record(run, make_scores(TOP1[run.row][run.shift][run.seed]), **changes)
        for run in PLANNED
        if run.seed < len(TOP1[run.row][run.shift])
    ]


def get_row(table, name):
    return next(row for row in table.rows if row.name == name)


def test_a_row_whose_runs_ended_with_a_warning_says_so():
    records = make_records()
    for i, record in enumerate(records):
        if record.row == "+ more" and (record.shift, record.seed) in (("D2-D1", 0), ("D1-D2", 2)):
            records[i] = record.model_copy(update={"warnings": ("half of it is dead", "so is the rest")})
    notes = make_table(GRID, records, PLANNED, CARD).notes
    [note] = [note for note in notes if "warning" in note]
    assert note == "Row '+ more': 2 of its runs ended with a warning, such as D2-D1, seed 0: half of it is dead."
    assert not [note for note in make_table(GRID, make_records(), PLANNED, CARD).notes if "warning" in note]


def test_cells_are_means_over_seeds_and_the_mean_is_over_shifts_first():
    table = make_table(GRID, make_records(), PLANNED, CARD)
    assert table.columns == ("D1-D2", "D2-D1", "mean")
    row = get_row(table, "+ more")
    for column, values in (("D1-D2", [60, 58, 66]), ("D2-D1", [44, 47, 46]), ("mean", [52, 52.5, 56])):
        interval = row.cells[column].interval
        low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert (interval.mean, interval.n) == (pytest.approx(np.mean(values)), 3)
        assert (interval.mean - interval.half_width, interval.mean + interval.half_width) == pytest.approx((low, high))


def test_rows_are_tested_against_the_baseline_over_the_pairs_both_have():
    table = make_table(GRID, make_records(), PLANNED, CARD)
    more, most = get_row(table, "+ more").difference, get_row(table, "+ most").difference
    expected = stats.ttest_rel([60, 58, 66, 44, 47, 46], [50, 52, 54, 40, 41, 45])
    assert (more.n, more.p_value) == (6, pytest.approx(expected.pvalue))
    assert more.difference == pytest.approx((10 + 6 + 12 + 4 + 6 + 1) / 6)
    assert (most.n, most.difference) == (3, pytest.approx((20 + 19 + 10) / 3))
    assert get_row(table, "V_1").difference is None


def test_a_row_with_missing_runs_says_so():
    table = make_table(GRID, make_records(), PLANNED, CARD)
    most = get_row(table, "+ most")
    # Two seeds are done on D1-D2, one on both.
    assert [most.cells[c].interval.n for c in table.columns] == [2, 1, 1]
    assert [most.cells[c].interval.half_width is None for c in table.columns] == [False, True, True]
    assert "Row '+ most' is not whole: 3 of 6 runs are done." in table.notes
    assert not any("'V_1' is not whole" in note for note in table.notes)
    _, lines = lay_out(table)
    assert [word for word in lines[2] if " of " in word] == ["70.5 ±6.4 (2 of 3)", "50.0 (1 of 3)", "60.0 (1 of 3)"]


def test_no_records_is_a_table_of_missing_runs():
    table = make_table(GRID, [], PLANNED, CARD)
    header, lines = lay_out(table)
    assert header == ["row", "D1-D2", "D1-D2, published", "D2-D1", "mean", "mean, published"]
    assert lines[0] == ["V_1", "- (0 of 3)", "-", "- (0 of 3)", "- (0 of 3)", "48.0"]
    assert "Row 'V_1' is not whole: 0 of 6 runs are done." in table.notes
    with pytest.raises(RunError, match="toy-grid has no runs"):
        make_table(GRID, [], [], CARD)


def test_published_numbers_stand_beside_ours_where_the_card_has_them():
    table = make_table(GRID, make_records(), PLANNED, CARD)
    assert [dict(row.published) for row in table.rows] == [{"mean": 48.0}, {"D1-D2": 61.5, "mean": 50.0}, {}]
    assert "Published: P, T (I3D); theirs, not measured here." in table.notes
    one_shift = [run for run in PLANNED if run.shift == "D1-D2"]
    table = make_table(GRID, make_records(), one_shift, CARD)
    assert table.columns == ("D1-D2",)
    assert [dict(row.published) for row in table.rows] == [{}, {"D1-D2": 61.5}, {}]


def test_the_mean_of_some_shifts_has_no_published_number():
    card = CARD.model_copy(update={"shifts": (*CARD.shifts, Shift(source=("D2",), target="D3"))})
    table = make_table(GRID, make_records(), PLANNED, card)
    assert [dict(row.published) for row in table.rows] == [{}, {"D1-D2": 61.5}, {}]


def test_a_synthetic_dataset_has_no_published_numbers_and_says_what_it_is():
    table = make_table(GRID, make_records(), PLANNED, CARD.model_copy(update={"synthetic": True}))
    assert not any(row.published for row in table.rows)
    assert table.notes[0] == NO_BENCHMARK
    assert not any("Published" in note for note in table.notes)
    for text in (format_markdown(table), format_latex(table)):
        assert NO_BENCHMARK in text
    assert {line["note"] for line in csv.DictReader(io.StringIO(format_csv(table)))} == {NO_BENCHMARK}
    assert NO_BENCHMARK not in format_markdown(make_table(GRID, make_records(), PLANNED, CARD))


def test_epics_table_2_shows_what_the_paper_printed():
    grid, card = read_grid("a-table2-stage1"), read_dataset_card("epic")
    table = make_table(grid, [], plan_runs(grid, card, lambda stage, overrides: {"overrides": list(overrides)}), card)
    assert [row.published for row in table.rows] == [{"mean": v} for v in (48.0, 51.2, 53.7, 55.7)]
    # The card also has three shifts from two sources, which the paper's mean is not over.
    assert table.columns == ("D1-D2", "D1-D3", "D2-D1", "D2-D3", "D3-D1", "D3-D2", "mean")


def test_the_last_record_of_a_run_counts_and_others_do_not():
    records = make_records()
    first = PLANNED[0]
    strangers = [
        make_record(first, make_scores(0.9), selection="target_oracle"),
        make_record(first, make_scores(0.9), dataset="other"),
        make_record(first, make_scores(0.9), stage="stage2"),
        make_record(first, make_scores(0.9), config_hash="0" * 12),
        make_record(first, make_scores(0.9), shift="D9-D1"),
    ]
    table = make_table(GRID, [*records, *strangers], PLANNED, CARD)
    assert get_row(table, "V_1").cells["D1-D2"].interval.mean == pytest.approx(52)
    table = make_table(GRID, [*records, make_record(first, make_scores(0.56))], PLANNED, CARD)
    assert get_row(table, "V_1").cells["D1-D2"].interval.mean == pytest.approx(54)
    oracle = make_table(GRID, [*records, *strangers], PLANNED, CARD, selection="target_oracle")
    assert get_row(oracle, "V_1").cells["D1-D2"].interval.mean == pytest.approx(90)
    assert any("sees the target's test labels" in note for note in oracle.notes)


def test_runs_of_another_manifest_are_named_or_left_out():
    records = [*make_records(), make_record(PLANNED[0], make_scores(0.9), manifest_sha256="b" * 64)]
    table = make_table(GRID, records, PLANNED, CARD)
    assert "The runs are of 2 manifests: aaaaaaaaaaaa, bbbbbbbbbbbb." in table.notes
    table = make_table(GRID, records, PLANNED, CARD, manifest_sha256="a" * 64)
    assert get_row(table, "V_1").n_done == 5
    assert "Runs on another manifest that are left out: 1." in table.notes


def test_parts_of_the_test_set_have_columns_on_request():
    records = [
        # On D2-D1 nothing is silent: the mean over shifts is that of D1-D2.
        make_record(run, make_scores(0.5, silent=0.2 + 0.1 * run.seed if run.shift == "D1-D2" else None, rare=0.3))
        for run in PLANNED
    ]
    table = make_table(GRID, records, PLANNED, CARD, columns=["silent", "rare"])
    assert table.columns == ("D1-D2", "D2-D1", "mean", "silent", "audible", "rare", "frequent")
    cells = get_row(table, "V_1").cells
    assert [round(cells[c].interval.mean, 6) for c in table.columns[3:]] == [30, 50, 30, 50]
    assert cells["silent"].interval.half_width == pytest.approx(stats.t.ppf(0.975, 2) * 10 / 3**0.5)
    assert "Silent: test segments without sound; 25 of 200 test segments." in table.notes
    assert "Rare: class and noun seen at most 10 times in the source; 50 of 200 test segments." in table.notes
    assert make_table(GRID.model_copy(update={"columns": ("rare",)}), records, PLANNED, CARD).columns[3:] == (
        "rare",
        "frequent",
    )


def test_a_part_that_no_segment_belongs_to_is_empty():
    table = make_table(GRID, make_records(), PLANNED, CARD, columns=["silent"])
    assert get_row(table, "V_1").cells["silent"].interval is None
    assert "Silent: test segments without sound; 0 of 200 test segments." in table.notes


def test_segments_are_tested_where_their_hits_are_given():
    rng = np.random.default_rng(0)
    theirs = {shift: (rng.random(100) < 0.4).astype(float) for shift in ("D1-D2", "D2-D1")}
    ours = {shift: np.maximum(hits, rng.random(100) < 0.2) for shift, hits in theirs.items()}
    table = make_table(GRID, make_records(), PLANNED, CARD, hits={"V_1": theirs, "+ more": ours})
    test = get_row(table, "+ more").segments
    assert test.difference == pytest.approx(100 * np.mean([ours[s].mean() - theirs[s].mean() for s in ours]))
    assert (test.n, test.p_value < 0.001) == (200, True)
    header, lines = lay_out(table)
    assert header[-1] == "p (segments)"
    assert [words[-1] for words in lines] == ["-", "<0.001", "-"]


def test_a_lone_test_segment_has_no_test_over_segments():
    theirs = {"D1-D2": np.array([0.0]), "D2-D1": np.array([0.0, 1.0])}
    ours = {"D1-D2": np.array([1.0]), "D2-D1": np.array([1.0, 1.0])}
    table = make_table(GRID, make_records(), PLANNED, CARD, hits={"V_1": theirs, "+ more": ours})
    assert get_row(table, "+ more").segments is None
    assert get_row(table, "+ more").difference.difference == pytest.approx(6.5, abs=0.05)


def test_markdown():
    assert format_markdown(make_table(GRID, make_records(), PLANNED, CARD)) == (
        "**Two methods, toy**\n\n"
        "| row | D1-D2 | D1-D2, published | D2-D1 | mean | mean, published | difference to V_1 | p |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| V_1 | 52.0 ±5.0 (3) | - | 42.0 ±6.6 (3) | 47.0 ±5.7 (3) | 48.0 | - | - |\n"
        "| + more | 61.3 ±10.3 (3) | 61.5 | 45.7 ±3.8 (3) | 53.5 ±5.4 (3) | 50.0 | +6.5 ±4.2 (6) | 0.010 |\n"
        "| + most | 70.5 ±6.4 (2 of 3) | - | 50.0 (1 of 3) | 60.0 (1 of 3) | - | +16.3 ±13.7 (3) | 0.036 |\n"
        "\n"
        "- Top-1 accuracy in % on the target's test split: mean ± half width of the 95 % t-interval (n seeds); one seed"
        " has no interval. Weights by the rule `last`.\n"
        "- Difference to 'V_1' in points over (shift, seed) pairs: mean ± half width (n pairs), and p of the paired"
        " t-test.\n"
        "- Published: P, T (I3D); theirs, not measured here.\n"
        "- Published: P, T; theirs, not measured here.\n"
        "- Row '+ most' is not whole: 3 of 6 runs are done.\n"
    )


def test_csv_holds_the_numbers():
    lines = list(csv.DictReader(io.StringIO(format_csv(make_table(GRID, make_records(), PLANNED, CARD)))))
    by_place = {(line["row"], line["column"]): line for line in lines}
    assert len(lines) == len(by_place) == 3 * 3 + 2
    line = by_place["+ more", "mean"]
    assert (line["value"], line["n"], line["n_planned"], line["published"]) == ("53.5", "3", "3", "50.0")
    assert float(line["half_width"]) == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem([52, 52.5, 56]), rel=1e-5)
    assert (by_place["+ most", "D2-D1"]["half_width"], by_place["+ most", "D2-D1"]["n"]) == ("", "1")
    expected = stats.ttest_rel([60, 58, 66, 44, 47, 46], [50, 52, 54, 40, 41, 45]).pvalue
    assert float(by_place["+ more", "difference to V_1"]["p_value"]) == pytest.approx(expected, rel=1e-5)
    assert {line["note"] for line in lines} == {""}


def test_latex_escapes_what_means_something_there():
    text = format_latex(make_table(GRID, make_records(), PLANNED, CARD))
    assert r"V\_1 & 52.0 $\pm$5.0 (3) & - &" in text
    assert text.startswith("\\begin{tabular}{lrrrrrrr}\n\\toprule\nrow & D1-D2 &")
    assert "% Row '+ most' is not whole: 3 of 6 runs are done.\n" in text


def test_a_table_needs_neither_extract_nor_torch():
    code = "import sys, echoshift.train.tables, echoshift.train.runs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    loaded = {name.partition(".")[0] for name in modules}
    assert "numpy" in loaded and not [name for name in modules if name.startswith("echoshift.extract")]
    assert not loaded & {"torch", "sklearn", "av", "timm"}


def test_rows_that_are_trained_on_the_targets_labels_are_marked():
    oracle = {"streams": [{"stage2": {"pseudo_labels": {"kind": "oracle"}}}]}
    supervised = {"alignment": {"alignment": {"setting": "supervised"}}}
    planned = [
        replace(run, config=oracle) if run.row == "+ more" else replace(run, stage="alignment", config=supervised)
        for run in PLANNED
    ]
    text = "\n".join(make_table(GRID, [], planned, CARD).notes)
    for row in {run.row for run in PLANNED}:
        assert f"Row {row!r} is trained on the target's own labels: an upper bound, no result." in text
    assert "upper bound" not in "\n".join(make_table(GRID, [], PLANNED, CARD).notes)
