"""Checks which segments are known to have no pictures before training, and that sound videos aren't looked through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from echoshift.extract.demo.generating import write_mp4
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaSurvey
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.segments import Segment
from echoshift.train.stage1.inputs import find_without_frames


def make_segment(video_id: str, stop_s: float) -> Segment:
    return Segment(f"{video_id} to {stop_s}", video_id, 0.0, stop_s, ("a",), "d", "train")


def test_only_what_a_header_casts_doubt_on_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
