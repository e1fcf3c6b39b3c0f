"""Checks where media are found, what identifies them, which are asked for, and how they are opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from echoshift.extract.media import (
    MediaLocation,
    MediaSurvey,
    NeededMediaProbe,
    find_needed_modalities,
    identify_media,
    locate_media,
    open_frames,
    probe_duration_s,
)
from echoshift.extract.readers.audio import read_audio
from echoshift.extract.readers.decord_video import DecordReader
from echoshift.extract.readers.video import VideoReader
from echoshift.pipeline.cards import MediaLayout, write_card
from echoshift.pipeline.errors import MediaError, MediaNotFoundError
from echoshift.pipeline.segments import Segment


def make_segment(video_id="P08_01", domain="D1", split="train"):
    return Segment("0", video_id, 0.0, 1.0, ("open",), domain, split)


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["P08_01.MP4", "P08_01.mkv"])
def test_a_video_is_found_by_any_known_ending(tmp_path, name):
    path = touch(tmp_path / "D1" / name)
    touch(tmp_path / "D1" / "P08_01.txt")
    touch(tmp_path / "D1" / "P08_01.5.mp4")
    layout = MediaLayout(rgb=("{domain}/{video_id}",))
    assert locate_media(tmp_path, layout, make_segment(), "rgb") == MediaLocation("file", path, "rgb")
    assert locate_media(tmp_path, layout, make_segment("P08_01.5"), "rgb").path.name == "P08_01.5.mp4"


def test_templates_are_tried_in_order_and_fields_filled(tmp_path):
    layout = MediaLayout(
        rgb=("rgb/{split}/{domain}/{video_id}", "{participant}/videos/{video_id}.MP4", "{video_id}.tar"),
        frame_rate_hz=60.0, n_first_frame=0, frame_pattern="{video_id}-%06d.jpg",
    )  # fmt: skip
    touch(tmp_path / "P08_01.tar")
    found = locate_media(tmp_path, layout, make_segment(), "rgb")
    assert (found.kind, found.path.name, found.rate_hz, found.n_first) == ("tar", "P08_01.tar", 60.0, 0)
    assert found.pattern == "P08_01-%06d.jpg"
    touch(tmp_path / "P08" / "videos" / "P08_01.MP4")
    assert locate_media(tmp_path, layout, make_segment(), "rgb").kind == "file"
    (tmp_path / "rgb" / "train" / "D1" / "P08_01").mkdir(parents=True)
    assert locate_media(tmp_path, layout, make_segment(), "rgb").kind == "folder"
    touch(tmp_path / "rgb" / "train" / "D1" / "P08_01.tar")
    assert locate_media(tmp_path, layout, make_segment(), "rgb").kind == "tar"
    touch(tmp_path / "rgb" / "train" / "D1" / "P08_01.mp4")
    assert locate_media(tmp_path, layout, make_segment(), "rgb").path.name == "P08_01.mp4"


def test_a_video_id_may_be_a_file_name_or_lie_deeper(tmp_path):
    path = touch(tmp_path / "a" / "b" / "clip.mp4")
    for video_id in ("a/b/clip.mp4", "a/b/clip"):
        assert locate_media(tmp_path, MediaLayout(), make_segment(video_id), "rgb").path == path


def test_two_files_of_one_name_collide(tmp_path):
    touch(tmp_path / "P08_01.mp4"), touch(tmp_path / "P08_01.mkv")
    with pytest.raises(MediaError, match=r"P08_01\.mkv and \S+P08_01\.mp4 differ only in their endings; keep one"):
        locate_media(tmp_path, MediaLayout(), make_segment(), "rgb")


@pytest.mark.parametrize("video_id", ["../secret", "a/../../secret", "/secret"])
def test_no_path_leads_out_of_the_root(tmp_path, video_id):
    touch(tmp_path / "secret.mp4")
    with pytest.raises(MediaError, match="leads out of the media root"):
        locate_media(tmp_path / "root", MediaLayout(), make_segment(video_id), "rgb")


def test_what_was_tried_is_listed(tmp_path):
    layout = MediaLayout(rgb=("rgb/{video_id}", "{domain}/{video_id}.mp4"))
    with pytest.raises(
        MediaNotFoundError, match=r"no rgb of video P08_01 .*; tried rgb/P08_01, D1/P08_01\.mp4"
    ) as caught:
        locate_media(tmp_path, layout, make_segment(), "rgb")
    assert caught.value.retryable
    with pytest.raises(MediaNotFoundError, match=r"the card has no flow template in \[media\]"):
        locate_media(tmp_path, layout, make_segment(), "flow")


def test_sound_is_a_file_beside_the_pictures_their_own_track_or_unknown(tmp_path):
    layout = MediaLayout(rgb=("{video_id}",), frame_rate_hz=60.0)
    touch(tmp_path / "P08_01.mp4")
    assert locate_media(tmp_path, layout, make_segment(), "audio").path.name == "P08_01.mp4"
    touch(tmp_path / "P08_01.WAV")
    assert locate_media(tmp_path, layout, make_segment(), "audio").path.name == "P08_01.WAV"
    (tmp_path / "P01_02").mkdir()
    assert locate_media(tmp_path, layout, make_segment("P01_02"), "audio").kind == "none"
    touch(tmp_path / "P01_02.flac")
    assert locate_media(tmp_path, layout, make_segment("P01_02"), "audio").path.name == "P01_02.flac"
    own = MediaLayout(rgb=("{video_id}",), audio=("sound/{video_id}",))
    touch(tmp_path / "sound" / "P08_01.ogg")
    assert locate_media(tmp_path, own, make_segment(), "audio").path.parent.name == "sound"
    with pytest.raises(MediaNotFoundError, match="no audio of video P22"):
        locate_media(tmp_path, own, make_segment("P22"), "audio")


def test_loose_frames_need_a_rate(tmp_path):
    (tmp_path / "P08_01").mkdir()
    with pytest.raises(MediaError, match=r"P08_01 holds loose frames, but the card says no frame_rate_hz"):
        locate_media(tmp_path, MediaLayout(), make_segment(), "rgb")


def test_identity_is_content(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    first = MediaLocation.of_file(touch(tmp_path / "a.mp4", content))
    second = MediaLocation.of_file(touch(tmp_path / "elsewhere" / "b.mkv", content))
    os.utime(second.path, (1, 1))
    identity = identify_media(first)
    assert len(identity) == 32 and int(identity, 16) >= 0
    assert identify_media(second) == identity
    for changed in (content[:-1], content + b"x", b"y" + content[1:], content[:-1] + b"y"):
        second.path.write_bytes(changed)
        assert identify_media(second) != identity
    for size in (0, 1, 70_000):  # smaller than all blocks together
        assert len(identify_media(MediaLocation.of_file(touch(tmp_path / "small", bytes(size))))) == 32


def test_identity_of_frames_sees_every_name_and_size(tmp_path, media_factory):
    media_factory.write_images(tmp_path / "v", range(1, 31))
    location = MediaLocation("folder", tmp_path / "v", rate_hz=60.0, pattern="frame_%010d.jpg")
    identity = identify_media(location)
    shutil.copytree(tmp_path / "v", tmp_path / "w")
    there = MediaLocation("folder", tmp_path / "w", rate_hz=60.0, pattern="frame_%010d.jpg")
    assert identify_media(there) == identity
    assert identify_media(MediaLocation("folder", tmp_path / "w", rate_hz=30.0, pattern="frame_%010d.jpg")) != identity
    (tmp_path / "w" / "frame_0000000017.jpg").unlink()
    assert identify_media(there) != identity


def test_what_is_found_opens(tmp_path, media_factory):
    media_factory.write_video(tmp_path / "a.mp4", n_frames=50)
    media_factory.write_images(tmp_path / "b", range(1, 31))
    media_factory.pack_tar(tmp_path / "c.tar", tmp_path / "b", "c/")
    for channel in ("u", "v"):
        media_factory.write_images(tmp_path / "flow" / "b" / channel, range(1, 16), mode="L")
    tone = np.zeros((1, 24000), np.float32)
    media_factory.write_sound(tmp_path / "d.wav", tone, "pcm_s16le", 16000)
    layout = MediaLayout(flow=("flow/{video_id}",), frame_rate_hz=60.0, flow_rate_hz=30.0, n_first_flow=0.5)
    for video_id, modality, duration_s in (
        ("a", "rgb", 2.0), ("b", "rgb", 0.5), ("c", "rgb", 0.5), ("b", "flow", 0.5 + 0.5 / 30), ("d", "audio", 1.5)
    ):  # fmt: skip
        location = locate_media(tmp_path, layout, make_segment(video_id), modality)
        assert probe_duration_s(location) == pytest.approx(duration_s, abs=1e-3), (video_id, modality)
        if modality == "audio":
            assert len(read_audio(location.path, 0, 2, 16000)) == 24000
            continue
        with open_frames(location) as reader:
            assert reader.read_frames([0.0]).shape[-1] == (2 if modality == "flow" else 3)
    movie = locate_media(tmp_path, layout, make_segment("a"), "rgb")
    for decoder, kind in (("pyav", VideoReader), ("decord", DecordReader)):
        with open_frames(movie, decoder) as reader:
            assert isinstance(reader, kind)
    silent = locate_media(tmp_path, layout, make_segment("b"), "audio")
    with pytest.raises(MediaNotFoundError, match="holds no frames"):
        open_frames(silent)


def check(tiny, media: Path, *options: str):
    return tiny.run("manifest", "check", "tiny", "--manifests", tiny.root, "--media", media, *options)


def test_a_card_of_sound_asks_for_sound_files_and_how_long_they_are(tiny, tiny_dataset, media_factory) -> None:
    def write_wav(path: Path, duration_s: float) -> None:
        media_factory.write_sound(path, np.zeros((1, int(8000 * duration_s)), np.float32), "pcm_s16le", 8000)

    write_card(
        tiny.root / "tiny.toml", tiny_dataset.CARD.model_copy(update={"encoders": ("resnet_demo", "resnet18_audio")})
    )
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
def test_pictures_are_needed_where_an_encoder_reads_them(tiny_dataset, encoders, modalities) -> None:
    assert find_needed_modalities(tiny_dataset.CARD.model_copy(update={"encoders": encoders})) == modalities


def test_flow_images_alone_are_enough_for_flow_and_loose_frames_hold_no_sound(tmp_path: Path, media_factory) -> None:
    for part in ("u", "v"):
        media_factory.write_images(tmp_path / "flow" / "x" / part, range(1, 31), mode="L")
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
