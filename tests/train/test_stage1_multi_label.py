"""Checks Stage 1 on several labels a segment, with part of the target labelled, from videos to average precision."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_shift
from sklearn.metrics import average_precision_score

from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment
from echoshift.train.predictions import Predictions
from echoshift.train.runs import RESULTS, read_runs
from echoshift.train.stage1.steps import PREDICTIONS

SETTINGS = (
    "target_labels.use_tags=true",
    "target_labels.clusters_from=labelled-target",
    "absent.gamma=0.5",
    "visual.test_preset=zhang-stage2-test",
    "export.label_preset=zhang-stage2-test",
)


def make_segments() -> list[Segment]:
    """Make segments of zero to two labels, paired across domains; half of the target's train split is labelled."""
    segments = []
    for domain in ("s", "t"):
        for split, n in (("train", 8), ("test", 4)):
            for i, segment in enumerate(tiny_shift.make_segments(domain, split, n, pairs=True)):
                labels = [segment.labels, ("low", "high"), segment.labels, ()][i % 4]
                tags = ()
                if (domain, split) == ("t", "train"):
                    tags = ("labelled",) if i < 4 else ("unlabelled",)
                segments.append(replace(segment, labels=labels, tags=tags))
    return segments


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("multi")
    tiny = tiny_shift.TinyShift(root, root / "runs")
    tiny.make()
    tiny.write_card(task="multi-label", metric="map")
    tiny.write_manifest(make_segments())
    code, out, err = tiny.stage1(settings=SETTINGS)
    assert code == 0, err
    (root / "printed.txt").write_text(out)
    return tiny


def read_outcome(tiny: Any, name: str) -> dict[str, Any]:
    return json.loads((tiny.find_step(name) / "record.json").read_text())["outcome"]


def test_mean_average_precision_is_printed_and_is_that_of_the_predictions(finished):
    kept = Predictions.read(finished.find_step("predictions") / PREDICTIONS)
    tests = [s for s in make_segments() if (s.domain, s.split) == ("t", "test")]
    p = kept.select([s.segment_id for s in tests]).probabilities
    precisions = [
        average_precision_score([name in s.labels for s in tests], p[:, k]) for k, name in enumerate(("low", "high"))
    ]
    expected = sum(precisions) / 3
    scores = read_runs(finished.runs / "tiny" / RESULTS)[0].scores
    assert scores.task == "multi-label"
    assert scores.main.value == pytest.approx(expected)
    out = (finished.root / "printed.txt").read_text()
    assert "mAP" in out
    assert next(line for line in out.splitlines() if line.startswith("s-t ")).split()[2] == f"{100 * expected:.1f}"


def test_every_part_of_the_loss_is_there(finished):
    for epoch in read_outcome(finished, "encoder")["epochs"]:
        losses = epoch["losses"]
        assert losses["labelled"] > 0 and losses["absent"] > 0 and losses["source"] > 0
        assert losses["total"] == pytest.approx(losses["source"] + losses["absent"] + losses["labelled"])


def test_gamma_decides_how_many_videos_lack_a_class(finished):
    """The source's shares are 4/8 + 1/8 low, 3/8 high and 0 never; four unlabelled target segments have sound."""
    absent = np.load(finished.find_step("absent_labels") / "absent.npy")
    assert absent.shape == (4, 3)
    labels = np.array([[1, 0], [1, 1], [1, 0], [0, 0]] * 2, float)
    shares = np.append(labels.mean(axis=0), 0.0)
    counts = read_outcome(finished, "absent_labels")["n_absent_by_class"]
    assert list(counts.values()) == absent.sum(axis=0).tolist()
    for n, share in zip(absent.sum(axis=0), shares, strict=True):
        assert abs(n - (1 - share) * 0.5 * 4) < 1
    assert absent[:, 2].sum() == 2


def test_the_sound_of_the_labelled_target_is_what_is_clustered(finished):
    found = np.load(finished.find_step("clusters") / "clusters.npy")
    assert found.shape == (4, 3)
    assert ((found >= 0) == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).all()
    classes = read_outcome(finished, "clusters")["classes"]
    assert [c["n_samples"] for c in classes] == [3, 1, 0]


def test_the_table_has_no_pseudo_labels(finished):
    columns = pq.read_table(finished.find_step("table") / "table.parquet").to_pydict()
    assert set(columns["pseudo_label"]) == {-1}
    p = np.array(columns["visual_probabilities"])
    assert ((p >= 0) & (p <= 1)).all()
    assert not np.allclose(p.sum(axis=1), 1, atol=0.05)


def test_poisoned_labels_of_the_unlabelled_target_change_nothing(finished, tmp_path):
    poisoned = [
        replace(s, labels=("never",)) if s.domain == "t" and "labelled" not in s.tags else s for s in make_segments()
    ]
    tiny = finished.with_runs(tmp_path)
    manifest = tmp_path / "poisoned.csv"
    write_manifest(manifest, poisoned)
    code, _, err = tiny.stage1("--manifest", manifest, settings=SETTINGS)
    assert code == 0, err
    for step, name in (("encoder", "encoder.safetensors"), ("table", "table.parquet")):
        assert (tiny.find_step(step) / name).read_bytes() == (finished.find_step(step) / name).read_bytes()


@pytest.mark.parametrize(("fraction", "n_labelled"), [("0", 0), ("1", 8)])
def test_all_or_nothing_of_the_target_may_be_labelled(finished, tmp_path, fraction, n_labelled):
    tiny = finished.with_runs(tmp_path)
    chosen = [f"target_labels.labelled_fraction={fraction}", *SETTINGS[2:]]
    code, _, err = tiny.stage1("--no-export", settings=chosen)
    assert code == 0, err
    losses = read_outcome(tiny, "encoder")["epochs"][0]["losses"]
    assert ("labelled" in losses) == (n_labelled > 0)
    assert (losses["absent"] > 0) == (n_labelled < 8)


def test_clusters_of_a_labelled_target_that_is_empty_are_an_error(finished, tmp_path):
    tiny = finished.with_runs(tmp_path)
    chosen = ["target_labels.labelled_fraction=0", "target_labels.clusters_from=labelled-target", *SETTINGS[2:]]
    code, _, err = tiny.stage1("--no-export", settings=chosen)
    assert code == 2
    assert "no segment of the target is labelled" in err
