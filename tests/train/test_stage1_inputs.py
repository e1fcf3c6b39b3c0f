"""Checks Stage 1 on what real data have: no track, a damaged video, a cache instead of videos, sound that changes."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_shift

from echoshift.extract.demo.generating import write_mp4
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaSurvey
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.open import list_stores
from echoshift.train.runs import RESULTS, read_runs
from echoshift.train.stage1.inputs import find_without_frames

TRUNK = ("visual.mode=trunk", "visual.n_views=2", "training.trainable_from=split")


@pytest.fixture
def tiny(tmp_path):
    made = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    made.make()
    return made


def read_table(tiny: Any) -> dict[str, list[Any]]:
    return pq.read_table(tiny.find_step("table") / "table.parquet").to_pydict()


def test_segments_without_a_track_are_trained_on_and_scored_apart(tmp_path):
    tiny = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    tiny.make(without_track=("t-train", "t-test"))
    code, out, err = tiny.stage1()
    assert code == 0, err
    scores = read_runs(tiny.runs / "tiny" / RESULTS)[0].scores
    assert (scores.silent.n, scores.audible.n, scores.audible.value) == (4, 0, None)
    assert next(line for line in out.splitlines() if line.startswith("s-t ")).split()[-3:] == ["-", "0", "last"]
    columns = read_table(tiny)
    assert columns["has_audio"] == [domain == "s" for domain in columns["domain"]]
    record = json.loads((tiny.find_step("absent_labels") / "record.json").read_text())
    assert record["outcome"]["n_silent"] == 8
    assert not np.load(tiny.find_step("absent_labels") / "absent.npy").any(), "silence says nothing of what is absent"
    losses = json.loads((tiny.find_step("encoder") / "record.json").read_text())["outcome"]["epochs"][0]["losses"]
    assert losses["absent"] == 0


def test_a_source_without_sound_says_how_to_train_without(tmp_path):
    tiny = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    tiny.make(without_track=("s-train", "s-test", "t-train", "t-test"))
    code, _, err = tiny.stage1()
    assert code == 2
    assert "0 of 8 source segments have any" in err
    remedy = "attention.enabled=false absent.weight=0 balance.kind=class"
    assert remedy in err
    code, _, err = tiny.stage1("--no-export", settings=remedy.split())
    assert code == 0, err
    assert set(read_runs(tiny.runs / "tiny" / RESULTS)[0].steps) == {"encoder", "predictions", "scores"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["absent.n_absent=3"], r"absent.n_absent is 3 of 3 classes.*--set absent.n_absent=1"),
        (["visual.mode=trunk", "visual.n_views=2"], "weights train from stem on, before the split"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_extracted(tiny, settings, words):
    code, _, err = tiny.stage1(settings=settings)
    assert code == 2
    assert re.search(words, err), err
    assert not list_stores(tiny.root / "cache")


def test_what_has_no_video_or_lies_outside_it_is_left_out_before_training(tiny):
    """The audio of `beyond` is extracted (a track may be longer than the frames): only the video itself can tell."""
    segments = [
        s for d in ("s", "t") for split, n in (("train", 8), ("test", 4)) for s in tiny_shift.make_segments(d, split, n)
    ]
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)]
    write_mp4(tiny.media / "short.mp4", frames, 6, rng.standard_normal(48_000).astype(np.float32), 16_000)
    (tiny.media / "broken.mp4").write_bytes(b"no video at all" * 100)
    beyond = Segment("beyond", "short", 0.0, 3.0, ("low",), "t", "test")
    lost = Segment("lost", "broken", 0.0, 1.0, ("low",), "t", "train")
    tiny.write_manifest([*segments, beyond, lost])
    code, out, err = tiny.stage1()
    assert code == 0, err
    assert "1 segments have no features of resnet_demo and are left out" in err
    assert "2 segments have no frames and are left out: " in err
    assert "2 segments left out, which failed to be extracted: lost" in out
    assert not {"lost", "beyond"} & set(read_table(tiny)["segment_id"])
    assert next(line for line in out.splitlines() if line.startswith("s-t ")).split()[3] == "4"


def test_trunk_mode_trains_from_the_cache_alone(tiny):
    code, _, err = tiny.stage1(settings=TRUNK)
    assert code == 0, err
    record = json.loads((tiny.find_step("encoder") / "record.json").read_text())
    assert record["settings"]["visual"]["mode"] == "trunk"
    assert record["inputs"]["visual"].startswith("trunk ")
    assert read_runs(tiny.runs / "tiny" / RESULTS)[0].config["visual"]["mode"] == "trunk"
    assert len(list_stores(tiny.root / "cache")) == 3, "sound, views to train on, clips to test on"
    written = (tiny.find_step("encoder") / "encoder.safetensors").read_bytes()
    shutil.rmtree(tiny.media)
    shutil.rmtree(tiny.runs)
    arguments = tiny.list_arguments("stage1", "tiny", "--shift", "s-t", settings=TRUNK)
    where = arguments.index("--media")
    del arguments[where : where + 2]
    code, _, err = tiny_shift.run(*arguments)
    assert code == 0, err
    assert (tiny.find_step("encoder") / "encoder.safetensors").read_bytes() == written


def test_a_test_segment_that_sounds_otherwise_is_predicted_anew(tiny):
    tiny.write_card(media=MediaLayout(rgb=("{video_id}",), audio=("sound/{video_id}.mp4",)))
    (tiny.media / "sound").mkdir()
    for path in tiny.media.glob("*.mp4"):
        shutil.copy(path, tiny.media / "sound" / path.name)
    settings = ["absent.weight=0", "visual.test_preset=zhang-stage1-val", "training.n_epochs=1"]
    assert tiny.stage1(settings=settings)[0] == 0
    before = tiny.list_records()
    tiny_shift.write_video(tiny.media / "sound" / "t-test.mp4", [1, 1, 0, 0], seed=9)
    code, _, err = tiny.stage1(settings=settings)
    assert code == 0, err
    fresh = {name.rpartition("-")[0] for name in set(tiny.list_records()) - set(before)}
    assert fresh == {"audio_predictions", "predictions", "features", "table", "scores"}, "nothing is trained anew"


def make_segment(video_id: str, stop_s: float) -> Segment:
    return Segment(f"{video_id} to {stop_s}", video_id, 0.0, stop_s, ("a",), "d", "train")


def test_only_what_a_header_casts_doubt_on_is_looked_through(tmp_path, monkeypatch):
    pictures = [np.zeros((12, 64, 64, 3), np.uint8)]
    for name in ("good", "short"):
        write_mp4(tmp_path / f"{name}.mp4", pictures, 6, None, 16_000)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    looked_through: list[str] = []
    probe = MediaSurvey.probe_duration_s
    monkeypatch.setattr(
        MediaSurvey, "probe_duration_s", lambda self, s: looked_through.append(s.video_id) or probe(self, s)
    )
    spec = make_feature_spec("slowfast_demo", resolve_weights("random:0", "slowfast_demo"), StoreOptions())
    segments = [
        *(make_segment("good", stop_s) for stop_s in (1.0, 2.0)),
        *(make_segment("short", stop_s) for stop_s in (2.0, 2.4, 2.6)),
        make_segment("broken", 1.0),
        make_segment("gone", 1.0),
    ]
    told: list[str] = []
    survey = MediaSurvey(tmp_path, MediaLayout())
    assert find_encoder("slowfast_demo").modality == "rgb"
    assert find_without_frames(survey, segments, spec, told.append) == {
        "short to 2.6",
        "broken to 1.0",
        "gone to 1.0",
    }
    assert looked_through == ["short", "broken", "gone"]
    assert len(told) == 1 and told[0].startswith("3 segments have no frames and are left out: short to 2.6 (it ends at")
    assert find_without_frames(survey, segments[:2], spec, told.append) == set()
    assert len(told) == 1
