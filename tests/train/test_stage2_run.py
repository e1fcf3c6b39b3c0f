"""Checks Stage 2 from Stage 1's tables to scores: what it reads, what it does again, what target labels change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.manifest import read_manifest, write_manifest
from echoshift.train.runs import RESULTS, RunRecord, read_runs

# What features are made with; who has the features needs none of it.
HEAVY = ("av", "decord", "torchaudio", "torchvision", "timm", "pytorchvideo", "cv2")


@pytest.fixture(scope="module")
def recognised(finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("stage2")
    shutil.copytree(finished.runs, root / "runs")
    tiny = finished.with_runs(root / "runs")
    code, out, err = tiny.stage2()
    assert code == 0, err
    assert "Stage 1 isn't done" not in err
    (root / "printed.txt").write_text(out)
    return tiny


@pytest.fixture
def own(recognised, tmp_path):
    shutil.copytree(recognised.runs, tmp_path / "runs")
    return recognised.with_runs(tmp_path / "runs")


def list_results(tiny: Any) -> list[RunRecord]:
    return [record for record in read_runs(tiny.runs / "tiny" / RESULTS) if record.stage == "stage2"]


def list_fresh(tiny: Any, before: dict[str, int]) -> list[str]:
    return sorted(name.rpartition("-")[0] for name, when in tiny.list_records().items() if before.get(name) != when)


def read_probabilities(tiny: Any, key: str) -> np.ndarray:
    with np.load(tiny.steps / f"predicted-{key}" / "predictions.npz") as arrays:
        probabilities: np.ndarray = arrays["probabilities"]
    return probabilities


def test_a_run_prints_the_scores_of_its_stored_predictions(recognised):
    [record] = list_results(recognised)
    assert (record.shift, record.seed, record.selection) == ("s-t", 0, "last")
    assert set(record.steps) == {"trained_rgb", "predictions_rgb", "scores"}
    probabilities = read_probabilities(recognised, record.steps["predictions_rgb"])
    assert probabilities.shape == (4, 3)
    top1 = float(np.mean(probabilities.argmax(axis=1) == [0, 1, 0, 1]))
    assert record.scores.main.value == pytest.approx(top1)
    out = (recognised.runs.parent / "printed.txt").read_text()
    row = next(line for line in out.splitlines() if line.startswith("s-t "))
    assert row.split() == ["s-t", "0", f"{100 * top1:.1f}", "4", "-", "0", f"{100 * top1:.1f}", "4", "last"]
    assert "no benchmark" in out
    with np.load(recognised.steps / f"scores-{record.steps['scores']}" / "hits.npz") as hits:
        assert hits["segment_ids"].tolist() == [f"t-test-{i}" for i in range(4)]
        assert np.array_equal(hits["is_right"], probabilities.argmax(axis=1) == [0, 1, 0, 1])


def test_it_runs_where_nothing_that_makes_features_can_be_imported(own):
    shutil.rmtree(own.steps / f"recogniser_rgb-{list_results(own)[0].steps['trained_rgb']}")
    absent = (*HEAVY, "torch._dynamo")  # torch's compiler would cost a start seconds
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); from echoshift.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *own.list_stage2()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_second_run_does_nothing(own):
    before, results = own.list_records(), (own.runs / "tiny" / RESULTS).read_bytes()
    code, _, err = own.stage2()
    assert code == 0, err
    assert own.list_records() == before
    assert (own.runs / "tiny" / RESULTS).read_bytes() == results


@pytest.mark.parametrize(
    ("setting", "fresh"),
    [
        ("schedule.lr=1e-3", ["predicted", "recogniser_rgb", "scores"]),
        ("pseudo_labels.kind=none", ["predicted", "recogniser_rgb", "scores"]),
    ],
)
def test_a_changed_setting_does_again_what_depends_on_it(own, setting, fresh):
    before = own.list_records()
    code, _, err = own.stage2(settings=[setting])
    assert code == 0, err
    assert list_fresh(own, before) == fresh


def test_without_sound_at_test_nothing_is_trained_again(own):
    before = own.list_records()
    code, _, err = own.stage2(settings=["test.sound=missing"])
    assert code == 0, err
    # Stage 1 predicts without sound, and makes such features of the test split; its encoder and ours stay.
    assert list_fresh(own, before) == ["features", "predicted", "predictions", "scores", "scores"]
    kept, missing = list_results(own)
    assert kept.steps["trained_rgb"] == missing.steps["trained_rgb"]
    first, second = (read_probabilities(own, record.steps["predictions_rgb"]) for record in (kept, missing))
    assert not np.allclose(first, second)


def test_target_labels_change_no_weight(recognised, own):
    """Other labels of the target give the same bytes, and other scores."""
    card = read_dataset_card("tiny", own.root)
    other = {"low": "never", "high": "low"}
    segments = [
        replace(s, labels=(other[s.labels[0]],)) if s.domain == "t" else s
        for s in read_manifest(own.root / "tiny.csv", card)
    ]
    write_manifest(own.runs / "other.csv", segments)
    before = own.list_records()
    code, _, err = own.stage2("--manifest", own.runs / "other.csv")
    assert code == 0, err
    assert list_fresh(own, before) == ["scores"]
    first, second = list_results(own)
    assert {name for name in first.steps if first.steps[name] != second.steps[name]} == {"scores"}
    counts = [np.array(record.scores.confusion) for record in (first, second)]
    assert np.array_equal(counts[0][[1, 2, 0]], counts[1]) and not np.array_equal(*counts)
    code, _, err = own.stage2("--manifest", own.runs / "other.csv", "--rerun", "recogniser_rgb")
    assert code == 0, err
    path = Path("recogniser_rgb-" + first.steps["trained_rgb"]) / "trained.safetensors"
    assert (own.steps / path).read_bytes() == (recognised.steps / path).read_bytes()


def test_an_oracle_s_pseudo_labels_are_another_training(own):
    code, _, err = own.stage2(settings=["pseudo_labels.kind=oracle"])
    assert code == 0, err
    step = own.steps / f"recogniser_rgb-{list_results(own)[-1].steps['trained_rgb']}"
    assert "target labels (oracle)" in json.loads((step / "record.json").read_text())["inputs"]


def test_each_rule_is_a_result_of_its_own(own):
    code, out, err = own.stage2(settings=['selection.rules=["last","source_val","target_oracle"]'])
    assert code == 0, err
    records = {record.selection: record for record in list_results(own)[-3:]}
    assert set(records) == {"last", "source_val", "target_oracle"}
    folder = own.steps / f"recogniser_rgb-{records['last'].steps['trained_rgb']}"
    with np.load(folder / "epochs.npz") as arrays:
        of_source, of_target = arrays["source_val"], arrays["target_test"]
    assert of_target.shape == (3, 4, 3)
    labels = np.array([0, 1, 0, 1])
    best = int(np.argmax((of_source.argmax(axis=2) == labels).mean(axis=1)))
    chosen = read_probabilities(own, records["source_val"].steps["predictions_rgb"])
    assert np.array_equal(chosen, of_target[best])
    assert records["target_oracle"].scores.main.value == (of_target.argmax(axis=2) == labels).mean(axis=1).max()
    np.testing.assert_allclose(
        read_probabilities(own, records["last"].steps["predictions_rgb"]), of_target[-1], atol=1e-6
    )
    assert "target_oracle sees the target's test labels: an upper bound" in out


def test_two_streams_are_averaged(own):
    streams = '[{name="rgb"}, {name="fast", stage2=["schedule.lr=5e-3"]}]'
    code, _, err = own.stage2(settings=[f"streams={streams}"])
    assert code == 0, err
    single, both = list_results(own)
    assert both.steps["trained_rgb"] == single.steps["trained_rgb"], "a stream is trained once"
    parts = [read_probabilities(own, both.steps[f"predictions_{name}"]) for name in ("rgb", "fast")]
    assert not np.allclose(*parts)
    expected = float((np.mean(parts, axis=0).argmax(axis=1) == [0, 1, 0, 1]).mean())
    assert both.scores.main.value == pytest.approx(expected)


def test_features_made_elsewhere_take_the_place_of_stage_1(own, tmp_path):
    record = next(r for r in read_runs(own.runs / "tiny" / RESULTS) if r.stage == "stage1")
    features = next((own.steps / f"features-{record.steps['features']}").glob("*.zarr"))
    table = own.steps / f"table-{record.steps['table']}" / "table.parquet"
    alone = own.with_runs(tmp_path / "alone")
    elsewhere = f'streams=[{{name="rgb", features="{features}", table="{table}"}}]'
    code, _, err = alone.stage2(settings=[elsewhere])
    assert code == 0, err
    assert not list(alone.steps.glob("encoder-*")), "nothing of Stage 1 is done"
    [ours], [first] = list_results(alone), list_results(own)
    assert np.array_equal(
        read_probabilities(alone, ours.steps["predictions_rgb"]),
        read_probabilities(own, first.steps["predictions_rgb"]),
    )
    sound = next((own.root / "cache" / "tiny").glob("resnet_demo-*.zarr"))
    plain = f'streams=[{{name="rgb", features="{features}", sound="{sound}"}}]'
    code, _, err = alone.stage2(settings=[plain])
    assert code == 2
    assert "features without Stage 1's table have no pseudo-labels" in err
    code, _, err = alone.stage2(settings=[plain, "pseudo_labels.kind=none"])
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "streams=[{name='a'},{name='a'}]"], "two streams have one name"),
        (["--set", 'streams=[{name="a", features="/nowhere", sound="/nowhere"}]'], "stream a: no file /nowhere"),
        (["--set", 'selection.rules=["best"]'], "selection.rules"),
        (["--rerun", "recogniser"], "there is no step 'recogniser'; did you mean 'recogniser_rgb'?"),
    ],
)
def test_a_wrong_word_is_an_error(recognised, tmp_path, arguments, words):
    code, _, err = recognised.with_runs(tmp_path).stage2(*arguments)
    assert code == 2, err
    assert words in err


def test_a_changed_table_of_classes_is_refused(own):
    import pyarrow.parquet as pq

    record = next(r for r in read_runs(own.runs / "tiny" / RESULTS) if r.stage == "stage1")
    path = own.steps / f"table-{record.steps['table']}" / "table.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"classes": "a\nb\nc"}), path)
    code, _, err = own.stage2("--rerun", "recogniser_rgb")
    assert code == 2
    assert f"{path} has the classes a, b, c, the card of tiny has low, high, never" in err
