"""Checks the numbers of Figures 6 and 7 against NumPy, and that they are those of the trained network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.tensor_files import read_tensors
from echoshift.train.look.features import (
    Classifier,
    ModalityFeatures,
    read_cached_features,
    read_projected_features,
)
from echoshift.train.look.figures import compute_norms, compute_shares, draw_norms, draw_shares, share_norm
from echoshift.train.look.run_choice import RunChoice, choose_alignment_run, find_source_only, get_method
from echoshift.train.predictions import read_prediction_table
from echoshift.train.runs import RESULTS, read_runs


def make_features(*, frames: np.ndarray, audio: np.ndarray, heard: np.ndarray, **more: Any) -> ModalityFeatures:
    segments = tuple(
        Segment(str(i), "v", 0.0, 1.0, ("a",), "s" if i < len(frames) // 2 else "t", "test") for i in range(len(frames))
    )
    return ModalityFeatures("made", segments, frames, audio, heard, **more)


def test_norms_are_means_over_clips_of_sounding_segments() -> None:
    visual = np.array([[[3.0, 4.0], [0.0, 1.0]], [[6.0, 8.0], [0.0, 0.0]], [[1, 0], [1, 0]], [[0, 2], [0, 2]]])
    audio = np.array([[[2.0], [4.0]], [[9.0], [9.0]], [[1.0], [1.0]], [[5.0], [3.0]]])
    norms = compute_norms(make_features(frames=visual, audio=audio, heard=np.array([True, False, True, True])))
    assert norms.frames.tolist() == [3.0, 5.0, 1.0, 2.0]
    assert norms.audio.tolist() == [3.0, 1.0, 4.0]
    assert norms.ratio == pytest.approx(2.75 / (8 / 3))
    assert norms.ratios == {"s": pytest.approx(4.0 / 3.0), "t": pytest.approx(1.5 / 2.5)}
    drawn = draw_norms([norms], "here")
    numbers = drawn.numbers["made"]
    expected, _ = np.histogram(norms.frames, bins=drawn.numbers["edges"])
    assert numbers["counts_frames"].tolist() == expected.tolist()
    assert numbers["counts_frames"].sum() == 4 and numbers["counts_audio"].sum() == 3
    assert "made: mean norm of frames 2.75, of audio 2.67, ratio 1.03" in drawn.description


def test_silence_has_no_norm() -> None:
    ones = np.ones((2, 1, 3))
    with pytest.raises(RunError, match="no segment has sound, or the network doesn't hear"):
        compute_norms(make_features(frames=ones, audio=ones, heard=np.zeros(2, dtype=bool)))


def test_top_features_are_those_of_the_largest_weights() -> None:
    classifier = Classifier(np.array([[0.1, 3.0, 0.0, 1.0], [0.2, 0.0, 0.1, 1.0]]), np.zeros(2))
    values = np.array([[[1.0, 2.0, 3.0, 4.0]], [[0.0, 0.0, 0.0, 0.0]], [[2.0, 0.0, 0.0, 0.0]]])
    # By weight: features 1 and 3. The second segment has no norm to share.
    assert share_norm(values, classifier, 2) == pytest.approx(((4 + 16) / 30 + 0.0) / 2)
    assert share_norm(values, classifier, 4) == pytest.approx(1.0)


def test_shares_against_numpy() -> None:
    rng = np.random.default_rng(0)
    visual, audio = rng.random((12, 2, 10)), rng.random((12, 2, 6))
    heard = np.arange(12) != 4
    weights = {"v": rng.standard_normal((3, 10)), "a": rng.standard_normal((3, 6))}
    bias = {"v": rng.standard_normal(3), "a": rng.standard_normal(3)}
    labels = rng.integers(0, 3, 12)
    shares = compute_shares(
        make_features(
            frames=visual,
            audio=audio,
            heard=heard,
            classify_frames=Classifier(weights["v"], bias["v"]),
            classify_audio=Classifier(weights["a"], bias["a"]),
        ),
        labels,
        n_top=4,
    )
    logits_v = visual.mean(axis=1)[heard] @ weights["v"].T + bias["v"]
    logits_a = audio.mean(axis=1)[heard] @ weights["a"].T + bias["a"]
    both = logits_v + logits_a
    for name, logits in (("frames", logits_v), ("audio", logits_a), ("both", both)):
        assert shares.accuracy[name] == pytest.approx((logits.argmax(axis=1) == labels[heard]).mean())
    rows, predicted = np.arange(11), both.argmax(axis=1)
    v = np.abs(logits_v[rows, predicted] - logits_v.mean(axis=1))
    a = np.abs(logits_a[rows, predicted] - logits_a.mean(axis=1))
    assert shares.score_share["frames"] == pytest.approx((v / (v + a)).mean())
    assert shares.score_share["audio"] == pytest.approx((a / (v + a)).mean())
    assert (shares.n_top, shares.n_features) == ({"frames": 4, "audio": 3}, {"frames": 10, "audio": 6})
    drawn = draw_shares([shares], "here")
    assert drawn.numbers["made"]["norm_share"] == dict(shares.norm_share)
    titles = [axis.get_title(loc="left") for axis in drawn.figure.axes]
    assert titles[2].endswith("(3 of 6, 4 of 10)")  # what is fewer than 300 is said


def test_features_are_those_that_the_trained_network_classifies(compared: Any, open_tiny: Any) -> None:
    places, runs_dir = open_tiny(compared), compared.runs / "tiny"
    record = choose_alignment_run(runs_dir, RunChoice())
    assert get_method(record) == "rna"
    found = read_projected_features(places, runs_dir, record)
    stage1 = read_runs(runs_dir / RESULTS)[0]
    folder = compared.steps / f"features-{stage1.steps['features']}"
    (path,) = folder.glob("*.zarr")
    ids = [segment.segment_id for segment in found.segments]
    assert sorted(ids) == sorted(f"{domain}-test-{i}" for domain in "st" for i in range(4))
    # Entry 0 is the first clip's first crop; crops are views, of which the first is projected.
    pooled = open_store(path).read(ids, "pooled")[:, 0].astype(np.float32)
    table = read_prediction_table(compared.steps / f"table-{stage1.steps['table']}" / "table.parquet")
    heard = table.audio_features[table.find(ids)]
    weights = read_tensors(compared.steps / f"rna_rgb-{record.steps['trained_rgb']}" / "trained.safetensors")
    w = {name.removeprefix("streams."): tensor.numpy() for name, tensor in weights.items()}
    visual = np.maximum(pooled @ w["project_visual.weight"].T + w["project_visual.bias"], 0)
    audio = np.maximum(heard @ w["project_audio.weight"].T + w["project_audio.bias"], 0)
    np.testing.assert_allclose(found.frames[:, 0], visual, atol=1e-4)
    np.testing.assert_allclose(found.audio[:, 0], audio, atol=1e-4)
    assert found.classify_frames is not None
    np.testing.assert_array_equal(found.classify_frames.weight, w["classify_visual.weight"])
    assert found.has_audio.all()
    cached = read_cached_features(places, runs_dir, record)
    np.testing.assert_allclose(cached.frames[:, 0], pooled, atol=1e-6)
    np.testing.assert_allclose(cached.audio[:, 0], heard, atol=1e-6)


def test_a_method_is_compared_with_source_only_of_its_network(compared: Any) -> None:
    runs_dir = compared.runs / "tiny"
    record = choose_alignment_run(runs_dir, RunChoice(method="rna", seed=0))
    without = find_source_only(runs_dir, record)
    assert without is not None and get_method(without) == "source_only"
    described = record.config["alignment"]
    wider = {**described, "alignment": {**described["alignment"], "network": {"width": 9}}}
    changed = record.model_copy(update={"config": {**record.config, "alignment": wider}})
    assert find_source_only(runs_dir, changed) is None
    with pytest.raises(RunError, match=r"no finished run of alignment of hna, s-t, seed 0 .*alignment\.method=hna"):
        choose_alignment_run(runs_dir, RunChoice(method="hna", shift="s-t", seed=0))


def test_a_lost_checkpoint_is_said(compared: Any, open_tiny: Any, tmp_path: Any) -> None:
    record = choose_alignment_run(compared.runs / "tiny", RunChoice())
    with pytest.raises(RunError, match=r"trained\.safetensors is gone; run `echoshift align` for s-t, seed 0, again"):
        read_projected_features(open_tiny(compared), tmp_path, record)
