"""Checks that `manifest check --media` asks for what the card's encoders read, and counts what it says."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echoshift.extract.media import MediaSurvey, NeededMediaProbe, find_needed_modalities
from echoshift.pipeline.cards import DatasetCard, MediaLayout, write_card
from echoshift.pipeline.errors import MediaNotFoundError
from echoshift.pipeline.segments import Segment

CARD = DatasetCard(
    name="tiny", title="Tiny", task="single-label", metric="top1", classes=("a", "b"), domains=("d",), splits=("train",)
)
RATE_HZ = 8000


def write_wav(path: Path, duration_s: float) -> None:
    """Write silence."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(bytes(2 * int(duration_s * RATE_HZ)))


def check(tiny, media: Path, *options: str):
    return tiny.run("manifest", "check", "tiny", "--manifests", tiny.root, "--media", media, *options)


def test_a_card_of_sound_asks_for_sound_files_and_how_long_they_are(tiny, tiny_dataset) -> None:
    write_card(tiny.root / "tiny.toml", CARD.model_copy(update={"encoders": ("resnet_demo", "resnet18_audio")}))
    for name in ("v", "w"):
        write_wav(tiny.media / f"{name}.wav", 3.0)
    tiny.write_manifest(tiny_dataset.make_segments(["v", "w"]))
    assert check(tiny, tiny.media) == (0, f"{tiny.root / 'tiny.csv'}: 0 errors, 0 warnings\n", "")
    write_wav(tiny.media / "w.wav", 2.0)
    code, out, _ = check(tiny, tiny.media)
    assert code == 1
    assert out.splitlines()[0] == (
        f"error: {tiny.root / 'tiny.csv'}:9: segment w-3: it ends at 2.7 s, its video w at 2.000 s; "
        "correct the time, or the video is another version or incomplete"
    )
    assert out.count("\n") == 2
    (tiny.media / "w.wav").unlink()
    code, out, _ = check(tiny, tiny.media)
    assert code == 1 and out.count("\n") == 2
    assert "segment w-0 and 3 more of its video: no media: no audio of video w below" in out


def test_a_wrong_folder_is_one_line_and_json_stays_whole(tiny, tiny_dataset, tmp_path: Path) -> None:
    videos = [f"v{i:02}" for i in range(25)]
    tiny.write_manifest(tiny_dataset.make_segments(videos))
    wrong, manifest = tmp_path / "wrong", tiny.root / "tiny.csv"
    wrong.mkdir()
    code, out, _ = check(tiny, wrong)
    assert code == 1
    assert out.splitlines() == [
        f"error: {manifest}: none of the 25 videos is in {wrong}: no rgb of video v00 below {wrong}; tried v00; "
        "name the folder that holds them with --media, or mount its disk",
        f"{manifest}: 100 errors, 0 warnings",
    ]
    code, out, _ = check(tiny, wrong, "--json")
    found = json.loads(out)
    assert (code, found["n_errors"], len(found["faults"])) == (1, 100, 100)
    assert [fault["segment_id"] for fault in found["faults"]] == [f"{v}-{i}" for v in videos for i in range(4)]
    assert {fault["media"] for fault in found["faults"]} == {"missing"}
    tiny_dataset.write_video(wrong / "v07.mp4")
    code, out, _ = check(tiny, wrong)
    lines = out.splitlines()
    assert (code, len(lines)) == (1, 20 + 2)
    assert all("-0 and 3 more of its video: no media: " in line for line in lines[:20])
    assert lines[20:] == [
        f"error: {manifest}: and 4 more missing videos, of 16 segments; --json lists all",
        f"{manifest}: 96 errors, 0 warnings",
    ]


@pytest.mark.parametrize(
    ("encoders", "modalities"),
    [
        ((), ("rgb",)),
        (("resnet_demo",), ("audio",)),
        (("resnet_demo", "slowfast_demo"), ("rgb",)),
        (("bninception_audio",), ("rgb",)),  # its sound is centred on clips
        (("slowonly_r50_flow", "resnet18_audio"), ("flow", "rgb")),
        (("slowonly_r50_flow", "i3d_rgb"), ("rgb",)),
    ],
)
def test_pictures_are_needed_where_an_encoder_reads_them(
    encoders: tuple[str, ...], modalities: tuple[str, ...]
) -> None:
    assert find_needed_modalities(CARD.model_copy(update={"encoders": encoders})) == modalities


def test_flow_images_alone_are_enough_for_flow_and_loose_frames_hold_no_sound(tmp_path: Path) -> None:
    for part in ("u", "v"):
        (tmp_path / "flow" / "x" / part).mkdir(parents=True)
        for i in range(1, 31):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "flow" / "x" / part / f"frame_{i:010}.jpg")
    layout = MediaLayout(rgb=("rgb/{video_id}",), flow=("flow/{video_id}",), flow_rate_hz=30.0, frame_rate_hz=30.0)
    segment = Segment("s", "x", 0.0, 1.0, ("a",), "d", "train")
    survey = MediaSurvey(tmp_path, layout)
    probe = NeededMediaProbe(survey, ("flow", "rgb"))
    assert probe.probe_duration_s(segment) == pytest.approx(1.0)
    missing = Segment("t", "y", 0.0, 1.0, ("a",), "d", "train")
    with pytest.raises(MediaNotFoundError, match="no rgb of video y"):
        probe.probe_duration_s(missing)
    assert (probe.asked, probe.found) == ({"x", "y"}, {"x"})
    (tmp_path / "rgb" / "x").mkdir(parents=True)
    with pytest.raises(MediaNotFoundError, match=r"no audio of video x below .*; only loose frames are there"):
        NeededMediaProbe(survey, ("audio",)).probe_duration_s(segment)
