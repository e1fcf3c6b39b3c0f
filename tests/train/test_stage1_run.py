"""Checks one run of Stage 1 from videos to table: what it leaves, what it does again, what target labels change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_shift
from safetensors import safe_open

from echoshift.pipeline.segments import Segment, TimedLabel
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.predictions import Predictions
from echoshift.train.runs import RESULTS, read_runs
from echoshift.train.stage1.steps import PREDICTIONS

ENTRIES = 15  # zhang-encoder-test: 5 clips, three crops each


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def read_outputs(tiny: Any) -> dict[str, bytes]:
    """Read what a run hands on, and what it stands on: bytes by name."""
    folder = tiny.find_step("features")
    store = open_store(next(folder.glob("*.zarr")))
    names = [f"outputs/{output.name}" for output in store.spec.outputs]
    names += ["times", "frames", "n_valid", "digest", "state", "segment_id"]
    read = {name: store.read_array(name).tobytes() for name in names}
    read["checkpoint"] = (tiny.find_step("encoder") / "encoder.safetensors").read_bytes()
    read["table"] = (tiny.find_step("table") / "table.parquet").read_bytes()
    read["absent"] = (tiny.find_step("absent_labels") / "absent.npy").read_bytes()
    return read


def list_fresh(tiny: Any, before: dict[str, int]) -> set[str]:
    """List the names of the steps that were done since `before`."""
    now = tiny.list_records()
    return {name.rpartition("-")[0] for name, written in now.items() if before.get(name) != written}


def test_a_run_prints_the_scores_of_its_stored_predictions_and_where_its_results_lie(finished):
    out = (finished.root / "printed.txt").read_text()
    scores = read_runs(finished.runs / "tiny" / RESULTS)[0].scores
    kept = Predictions.read(finished.find_step("predictions") / PREDICTIONS)
    guesses = kept.select([f"t-test-{i}" for i in range(4)]).probabilities.argmax(axis=1)
    assert scores.top1.value == pytest.approx(np.mean(guesses == [0, 1, 0, 1]))
    assert scores.n == 4
    percent = f"{100 * scores.top1.value:.1f}"
    row = next(line for line in out.splitlines() if line.startswith("s-t "))
    assert row.split() == ["s-t", "0", percent, "4", "-", "0", percent, "4", "last"]
    assert "no benchmark" in out
    for path in (finished.find_step("encoder") / "encoder.safetensors", finished.find_step("table") / "table.parquet"):
        assert str(path) in out


def test_the_table_holds_every_segment_and_pseudo_labels_are_the_argmax(finished):
    table = pq.read_table(finished.find_step("table") / "table.parquet")
    assert table.schema.metadata[b"classes"] == b"low\nhigh\nnever"
    columns = table.to_pydict()
    assert list(columns) == [
        "segment_id", "domain", "split", "has_audio", "audio_features", "audio_probabilities", "visual_probabilities",
        "pseudo_label",
    ]  # fmt: skip
    assert len(columns["segment_id"]) == len(set(columns["segment_id"])) == 24
    assert all(columns["has_audio"])
    kept = Predictions.read(finished.find_step("features") / PREDICTIONS)
    probabilities = kept.select(columns["segment_id"]).probabilities
    assert np.array_equal(np.array(columns["visual_probabilities"], np.float32), probabilities)
    assert np.allclose(np.array(columns["audio_probabilities"]).sum(axis=1), 1, atol=1e-5)
    is_labelled = [d == "t" and s == "train" for d, s in zip(columns["domain"], columns["split"], strict=True)]
    expected = np.where(is_labelled, probabilities.argmax(axis=1), -1)
    assert columns["pseudo_label"] == expected.tolist()
    assert sum(is_labelled) == 8


def test_the_adapted_store_verifies_and_covers_the_times_of_an_extraction(finished):
    path = next(finished.find_step("features").glob("*.zarr"))
    code, out, err = tiny_shift.run("store", "verify", path)
    assert code == 0, out + err
    adapted = open_store(path)
    assert (adapted.read_array("state") == DONE).all()
    assert adapted.spec.weights == read_record(finished.find_step("encoder"))["outcome"]["identity"]
    with safe_open(finished.find_step("encoder") / "encoder.safetensors", "np") as checkpoint:
        assert checkpoint.metadata()["identity"] == adapted.spec.weights
    settings = ["frame.short_side=36", "frame.crop=32", "clip.n_frames=4"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    code, _, err = tiny_shift.run(
        "extract", "tiny", "--media", finished.media, "--cache", finished.root / "plain", "--manifests", finished.root,
        "--device", "cpu", "--encoders", "slowfast_demo", "--preset", "zhang-encoder-test", *chosen,
    )  # fmt: skip
    assert code == 0, err
    plain = open_store(list_stores(finished.root / "plain")[0])
    assert sorted(plain.segment_ids) == sorted(adapted.segment_ids)
    ids = sorted(plain.segment_ids)
    rows = [[list(store.segment_ids).index(segment_id) for segment_id in ids] for store in (plain, adapted)]
    for name in ("times", "frames", "digest", "n_valid"):
        of_plain, of_adapted = (s.read_array(name)[r] for s, r in zip((plain, adapted), rows, strict=True))
        assert np.array_equal(of_plain, of_adapted), name
    assert (adapted.read_array("n_valid") == ENTRIES).all()
    assert adapted.read(ids, "pooled").shape == plain.read(ids, "pooled").shape
    assert not np.array_equal(adapted.read(ids, "pooled"), plain.read(ids, "pooled"))


def test_a_second_run_of_the_dataset_last_extracted_does_nothing(copied):
    before = copied.list_records()
    results = (copied.runs / "tiny" / RESULTS).read_bytes()
    code, out, err = copied.stage1(dataset="")
    assert code == 0, err
    assert "no dataset named: tiny, the one last extracted" in err
    assert copied.list_records() == before
    assert (copied.runs / "tiny" / RESULTS).read_bytes() == results
    assert out.splitlines()[-4:-2] == (copied.root / "printed.txt").read_text().splitlines()[-4:-2]


@pytest.mark.parametrize(
    ("setting", "fresh"),
    [
        ("training.lr=2e-3", {"encoder", "predictions", "features", "table", "scores"}),
        ("absent.n_absent=2", {"absent_labels", "encoder", "predictions", "features", "table", "scores"}),
        ('export.outputs=["pooled_avg"]', {"features", "table"}),
    ],
)
def test_a_changed_setting_does_again_what_depends_on_it(copied, setting, fresh):
    before = copied.list_records()
    code, _, err = copied.stage1(settings=[setting])
    assert code == 0, err
    assert list_fresh(copied, before) == fresh
    assert set(before) <= set(copied.list_records()), "what was done stays"


def test_pseudo_labels_are_made_of_the_views_that_their_preset_says(copied):
    before = copied.list_records()
    code, _, err = copied.stage1(settings=["visual.test_preset=zhang-stage1-val"])
    assert code == 0, err
    assert list_fresh(copied, before) == {"predictions", "features", "table", "scores"}, "clips of a test train nothing"
    steps = read_runs(copied.runs / "tiny" / RESULTS)[-1].steps
    kept = Predictions.read(copied.steps / f"predictions-{steps['label_predictions']}" / PREDICTIONS)
    columns = pq.read_table(copied.steps / f"table-{steps['table']}" / "table.parquet").to_pydict()
    labels = dict(zip(columns["segment_id"], columns["pseudo_label"], strict=True))
    ids = [f"t-train-{i}" for i in range(8)]
    assert set(kept.segment_ids) == set(ids)
    assert [labels[segment_id] for segment_id in ids] == kept.select(ids).probabilities.argmax(axis=1).tolist()
    shown = dict(zip(columns["segment_id"], columns["visual_probabilities"], strict=True))
    assert not np.allclose([shown[segment_id] for segment_id in ids], kept.select(ids).probabilities), (
        "other views, other numbers"
    )


def test_steps_are_rerun_alone_once_and_come_to_the_same(copied):
    before = copied.list_records()
    files = [copied.find_step("clusters") / "clusters.npy", copied.find_step("encoder") / "encoder.safetensors"]
    written = [path.read_bytes() for path in files]
    code, _, err = copied.stage1("--rerun", "clusters", "--rerun", "encoder")
    assert code == 0, err
    assert list_fresh(copied, before) == {"clusters", "encoder"}
    assert [path.read_bytes() for path in files] == written
    assert err.count("epoch 2/2") == 1, err


def list_segments() -> list[Segment]:
    return [
        segment
        for domain in ("s", "t")
        for split, n in (("train", 8), ("test", 4))
        for segment in tiny_shift.make_segments(domain, split, n)
    ]


def poison(segments: list[Segment]) -> list[Segment]:
    """Return every segment of the target another class, a noun and a timed label."""
    other = {"low": "never", "high": "low"}
    poisoned = []
    for s in segments:
        if s.domain == "t":
            label = other[s.labels[0]]
            s = replace(s, labels=(label,), noun="n", timed_labels=(TimedLabel(label, s.start_s, s.stop_s),))
        poisoned.append(s)
    return poisoned


def test_target_labels_change_nothing_but_the_scores(finished, tmp_path):
    shutil.copytree(finished.media, tmp_path / "media")
    poisoned = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    poisoned.write_card()
    poisoned.write_manifest(poison(list_segments()))
    code, _, err = poisoned.stage1()
    assert code == 0, err
    assert read_outputs(poisoned) == read_outputs(finished)
    records = [read_runs(tiny.runs / "tiny" / RESULTS)[0] for tiny in (finished, poisoned)]
    steps = [record.steps for record in records]
    assert {name for name in steps[0] if steps[0][name] != steps[1][name]} == {"scores"}
    counts = [np.array(record.scores.confusion) for record in records]
    assert np.array_equal(counts[0][[1, 2, 0]], counts[1]), "the same predictions, other labels, which are the rows"
    assert not np.array_equal(*counts)


def test_without_anything_extracted_a_dataset_must_be_named(finished):
    code, _, err = tiny_shift.run("stage1", "--cache", finished.root / "empty", "--manifests", finished.root)
    assert code == 2
    assert "no dataset named, and nothing extracted in" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shift", "s-x"], "tiny has no shift 's-x'; did you mean 's-t'?"),
        (["--rerun", "cluster"], "there is no step 'cluster'; did you mean 'clusters'?"),
        (["--set", "training.trainable_from=res9"], "no stage 'res9'"),
        (["--media", "/nowhere"], "no media folder /nowhere"),
    ],
)
def test_a_wrong_word_is_an_error_in_one_line(finished, tmp_path, arguments, words):
    tiny = finished.with_runs(tmp_path)
    code, _, err = tiny.stage1(*arguments)
    assert code == 2, err
    assert words in err
    assert len(err.strip().splitlines()) == 1, err
