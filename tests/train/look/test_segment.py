"""Checks what is said of a segment: gates and predictions as runs stored them, and sentences for what is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from echoshift.extract.weights.load import default_weights, load_encoder, resolve_weights
from echoshift.pipeline.errors import ManifestError, WeightsError
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.look.segment import (
    CheckpointGates,
    SegmentReader,
    ShownPrediction,
    ViewOptions,
    rank_classes,
    read_segment_view,
    summarise_gates,
)
from echoshift.train.runs import RESULTS, read_runs
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import build_encoder, read_checkpoint


def find_sound(tiny: Any) -> Any:
    return next(
        store for path in list_stores(tiny.root / "cache") if (store := open_store(path)).spec.audio is not None
    )


def select(predictions: tuple[ShownPrediction, ...], speaker: str, selection: str = "last") -> ShownPrediction:
    (found,) = [p for p in predictions if (p.speaker, p.selection) == (speaker, selection)]
    return found


def test_gates_are_those_of_the_trained_encoder(all_stages: Any, open_tiny: Any) -> None:
    view = read_segment_view(open_tiny(all_stages), all_stages.runs / "tiny", "t-test-1")
    checkpoint = all_stages.find_step("encoder") / "encoder.safetensors"
    config = Stage1Config.model_validate(read_runs(all_stages.runs / "tiny" / RESULTS)[0].config)
    network = load_encoder("slowfast_demo", resolve_weights(default_weights("slowfast_demo"), "slowfast_demo"))
    store = find_sound(all_stages)
    maps = torch.from_numpy(store.read(["t-test-1"], "map")[:, 0].astype(np.float32))
    model = build_encoder(network, maps.shape[1], 3, config, seed=5)
    read_checkpoint(checkpoint, model)
    with torch.no_grad():
        expected = model.eval().compute_gates(maps, torch.ones(1, dtype=torch.bool))
    assert view.gate is not None and expected is not None
    assert view.gate.hears
    assert view.gate.checkpoint == checkpoint
    assert view.gate.run == "stage1 s-t, seed 0"
    assert {group.name for group in view.gate.groups} == set(expected) == {"trunk_slow", "trunk_fast"}
    for group in view.gate.groups:
        values = expected[group.name][0].numpy()
        np.testing.assert_allclose(group.values, values, atol=1e-6)
        assert group.mean == pytest.approx(values.mean(), abs=1e-6)
        assert group.spread == pytest.approx(values.std(), abs=1e-6)


def test_a_summary_names_the_channels_at_either_end() -> None:
    group = summarise_gates("path", np.array([0.5, 0.9, 0.1, 0.9, 0.2, 0.7, 0.3], dtype=np.float32))
    assert list(group.most_open) == [1, 3, 5, 0, 6]
    assert list(group.most_closed) == [2, 4, 6, 0, 5]


def test_a_changed_checkpoint_makes_no_gates(all_stages: Any, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    shutil.copy(all_stages.find_step("encoder") / "encoder.safetensors", path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match="has changed since it was written"):
        CheckpointGates(path, find_sound(all_stages))


def test_stage1_says_what_its_table_says(all_stages: Any, open_tiny: Any) -> None:
    table = pq.read_table(all_stages.find_step("table") / "table.parquet").to_pandas().set_index("segment_id")
    classes = ("low", "high", "never")
    with SegmentReader(open_tiny(all_stages), all_stages.runs / "tiny") as views:
        for segment_id, role in (("t-train-3", "target train"), ("s-train-0", "source train")):
            view, row = views.read(segment_id), table.loc[segment_id]
            seen, heard = select(view.predictions, "frames"), select(view.predictions, "audio")
            np.testing.assert_array_equal(seen.probabilities, row["visual_probabilities"])
            np.testing.assert_array_equal(heard.probabilities, row["audio_probabilities"])
            expected = "" if row["pseudo_label"] < 0 else classes[row["pseudo_label"]]
            assert (seen.pseudo_label, heard.pseudo_label) == (expected, "")
            assert seen.role == role
            assert {p.speaker for p in view.predictions} == {"frames", "audio"}
            assert "predictions" not in view.missing


def test_networks_say_what_they_stored(all_stages: Any, open_tiny: Any) -> None:
    places, runs_dir = open_tiny(all_stages), all_stages.runs / "tiny"
    records = {(record.stage, record.selection): record for record in read_runs(runs_dir / RESULTS)}
    with SegmentReader(places, runs_dir, ViewOptions(with_media=False)) as views:
        found = [views.read(f"t-test-{i}").predictions for i in range(4)]
    for (stage, rule), speaker in ((("stage2", "last"), "recogniser"), (("alignment", "mean_last"), "alignment")):
        record = records[stage, rule]
        (folder,) = all_stages.steps.glob(f"*-{record.steps['predictions_rgb']}")
        with np.load(folder / "predictions.npz") as arrays:
            stored = arrays["probabilities"]
        stored = stored if stored.ndim == 2 else stored.mean(axis=0)
        said = [select(predictions, speaker, rule) for predictions in found]
        np.testing.assert_allclose([p.probabilities for p in said], stored, atol=1e-6)
        labels = [0, 1, 0, 1]  # of the test segments, in turn
        assert [p.is_right for p in said] == (stored.argmax(axis=1) == labels).tolist()
    hits = np.load(all_stages.steps / f"scores-{records['stage2', 'last'].steps['scores']}" / "hits.npz")
    assert [select(p, "recogniser").is_right for p in found] == hits["is_right"].tolist()


def test_the_top_classes_are_ranked_and_marked() -> None:
    top = rank_classes(np.array([0.2, 0.3, 0.2, 0.3]), ("a", "b", "c", "d"), ("c",), 3)
    assert [(score.name, score.is_true) for score in top] == [("b", False), ("d", False), ("a", False)]


def test_options_choose_runs(all_stages: Any, open_tiny: Any) -> None:
    places, runs_dir = open_tiny(all_stages), all_stages.runs / "tiny"
    none = read_segment_view(places, runs_dir, "t-test-0", ViewOptions(seed=7, with_media=False))
    assert none.predictions == ()
    assert none.missing["predictions"].startswith("No finished run has predicted it")
    assert "`echoshift stage1 tiny` trains one" in none.missing["gate"]
    assert none.frames == () and none.audio is None and "frames" not in none.missing


def test_runs_of_another_manifest_are_left_out(all_stages: Any, open_tiny: Any) -> None:
    places = open_tiny(all_stages)
    other = replace(places, manifest=replace(places.manifest, sha256="0" * 64))
    view = read_segment_view(other, all_stages.runs / "tiny", "t-test-0", ViewOptions(with_media=False))
    assert view.predictions == ()
    assert view.missing["predictions"] == ("Left out: stage1 s-t, seed 0: made of another manifest, and 3 more runs.")


def test_runs_of_a_shift_that_is_gone_are_left_out(all_stages: Any, open_tiny: Any) -> None:
    places = open_tiny(all_stages)
    other = replace(places, card=places.card.model_copy(update={"shifts": places.card.shifts[1:]}))
    view = read_segment_view(other, all_stages.runs / "tiny", "t-test-0", ViewOptions(with_media=False))
    assert view.predictions == () and view.gate is None
    why = "Left out: stage1 s-t, seed 0: the card has no such shift any more, and 3 more runs."
    assert view.missing["predictions"] == why


def test_predictions_of_unknown_segments_are_left_out(all_stages: Any, open_tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(all_stages.runs, tmp_path / "runs")
    tiny = all_stages.with_runs(tmp_path / "runs")
    record = next(r for r in read_runs(tiny.runs / "tiny" / RESULTS) if r.stage == "stage2")
    (folder,) = tiny.steps.glob(f"*-{record.steps['predictions_rgb']}")
    step = json.loads((folder / "record.json").read_text())
    step["inputs"]["test"] = "0" * 12
    (folder / "record.json").write_text(json.dumps(step))
    view = read_segment_view(open_tiny(tiny), tiny.runs / "tiny", "t-test-0", ViewOptions(with_media=False))
    assert {p.speaker for p in view.predictions} == {"frames", "audio", "alignment"}
    assert "stage2 s-t, seed 0: it doesn't say whose predictions it has" in view.missing["predictions"]


def test_predictions_without_hits_are_those_of_the_manifests_test_split(
    all_stages: Any, open_tiny: Any, tmp_path: Path
) -> None:
    before = read_segment_view(open_tiny(all_stages), all_stages.runs / "tiny", "t-test-2", ViewOptions())
    shutil.copytree(all_stages.runs, tmp_path / "runs")
    tiny = all_stages.with_runs(tmp_path / "runs")
    for hits in tiny.steps.glob("scores-*/hits.npz"):
        hits.unlink()
    after = read_segment_view(open_tiny(tiny), tiny.runs / "tiny", "t-test-2", ViewOptions())
    assert len(before.predictions) == len(after.predictions) == 5
    for a, b in zip(before.predictions, after.predictions, strict=True):
        np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_missing_media_are_sentences(all_stages: Any, open_tiny: Any, tmp_path: Path) -> None:
    places = replace(open_tiny(all_stages), media_root=tmp_path)
    view = read_segment_view(places, all_stages.runs / "tiny", "t-test-0")
    assert (view.frames, view.audio, view.spectrogram) == ((), None, None)
    assert view.missing["frames"] == f"No rgb of video t-test below {tmp_path}; tried t-test."
    assert view.gate is not None and len(view.predictions) == 5


def test_silent_segments_share_one_gate(tiny_shift: ModuleType, tmp_path: Path, open_tiny: Any) -> None:
    tiny = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    tiny.make(without_track=("t-test", "s-test"))
    code, _, err = tiny.stage1("--no-export", settings=("training.n_epochs=1",))
    assert code == 0, err
    with SegmentReader(open_tiny(tiny), tiny.runs / "tiny") as views:
        first, second, loud = (views.read(name) for name in ("t-test-0", "t-test-1", "t-train-0"))
    assert first.audio is None and "has no sound track" in first.missing["audio"]
    assert first.gate is not None and second.gate is not None and loud.gate is not None
    assert (first.gate.hears, loud.gate.hears) == (False, True)
    for a, b, c in zip(first.gate.groups, second.gate.groups, loud.gate.groups, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
        assert np.abs(a.values - c.values).max() > 0
    assert [p.speaker for p in first.predictions] == ["frames"]  # nothing is heard, so that nobody says what it was


def test_an_unknown_segment_is_told_its_nearest(all_stages: Any, open_tiny: Any) -> None:
    with pytest.raises(ManifestError, match=r"tiny has no segment 't-tset-0'; did you mean 't-test-0'"):
        read_segment_view(open_tiny(all_stages), all_stages.runs / "tiny", "t-tset-0")
