"""Holds the PyAV reader against plain sequential decodes, in every order and for every kind of file."""

from __future__ import annotations

import json
from contextlib import suppress

import av
import numpy as np
import pytest

from echoshift.extract.readers.video import VideoReader, turn_upright
from echoshift.pipeline.errors import DecodeError, MediaNotFoundError, SegmentOutsideVideoError


def assert_reads_like(path, times, frames, n_single=4, seed=0):
    """Assert that single frames, a shuffled batch and windows are those of the sequential decode, bit for bit."""
    rng = np.random.default_rng(seed)
    with VideoReader(path) as reader:
        np.testing.assert_allclose(reader.frame_times_s, times, atol=2e-6)
        assert reader.info.n_frames == len(frames)
        for i in rng.permutation(len(frames))[:n_single]:
            assert np.array_equal(reader.read_frames(times[i])[0], frames[i]), f"frame {i} alone"
        batch = rng.integers(0, len(frames), 12)  # with repeats
        for i, image in zip(batch, reader.read_frames(times[batch]), strict=True):
            assert np.array_equal(image, frames[i]), f"frame {i} of a batch"
        for start in rng.integers(0, max(1, len(frames) - 32), 1):
            window = np.arange(start, min(start + 32, len(frames)))
            for i, image in zip(window, reader.read_frames(times[window] + 5e-4), strict=True):
                assert np.array_equal(image, frames[i]), f"frame {i} of a window"


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [*(f"seek/ids_{name}" for name in ("open.mp4", "hevc.mp4", "openedit.mp4", "h264.ts", "vfr.mp4", "intraref.mp4",
     "av1.mp4")), "edge/carphone_pristine.mp4", "edge/decord_unordered.mov", "edge/video_with_failing_audio.mp4",
     "edge/nasa_13013.mp4", "grid_av/clean/lbbk4n.mp4", "activitynet/v_GGSY1Qvo990.mp4"],
)  # fmt: skip
def test_real_files_read_like_a_sequential_decode(shared_data, media_factory, name):
    times, frames = media_factory.decode_all(shared_data / name)
    if name.startswith("seek"):
        first = 83 if "openedit" in name else 0
        assert [media_factory.read_boxes(frame) for frame in frames] == list(range(first, 400))
    assert_reads_like(shared_data / name, times, frames)


@pytest.mark.shared
def test_the_best_of_several_streams_has_the_times_of_its_list(shared_data):
    path = shared_data / "edge" / "nasa_13013.mp4"
    listed = json.loads((path.parent / f"{path.name}.stream3.all_frames_info.json").read_text())
    with VideoReader(path) as reader:
        np.testing.assert_allclose(reader.frame_times_s, [float(frame["pts_time"]) for frame in listed], atol=1e-6)
        assert (reader.info.width, reader.info.height) == (480, 270)
        assert reader.info.duration_s == pytest.approx(13.013)


@pytest.mark.shared
def test_pictures_are_turned_by_the_display_matrix(shared_data, media_factory):
    path = shared_data / "edge" / "decord_video_90.mov"
    times, frames = media_factory.decode_all(path)
    assert frames[0].shape == (320, 568, 3)
    with VideoReader(path) as reader:
        assert (reader.info.height, reader.info.width, reader.info.rotation_deg) == (568, 320, 90)
        images = reader.read_frames(times)
    assert np.array_equal(images, [np.rot90(frame, -1) for frame in frames])  # clockwise


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [((1, 0, 0, 1), [[1, 2], [3, 4], [5, 6]]), ((0, 1, -1, 0), [[5, 3, 1], [6, 4, 2]]),
     ((-1, 0, 0, -1), [[6, 5], [4, 3], [2, 1]]), ((0, -1, 1, 0), [[2, 4, 6], [1, 3, 5]]),
     ((-1, 0, 0, 1), [[2, 1], [4, 3], [6, 5]]), ((0, 1, 1, 0), [[1, 3, 5], [2, 4, 6]])],
)  # fmt: skip
def test_a_point_goes_where_its_matrix_sends_it(matrix, shown):
    image = np.array([[1, 2], [3, 4], [5, 6]], np.uint8)[..., None]
    assert turn_upright(image, matrix)[..., 0].tolist() == shown


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("x.avi", "mpeg4", {"bf": 2, "g": 12}), ("h.avi", "libx264", {"bf": 2, "g": 12}),
     ("x.mkv", "libx264", {"bf": 2, "g": 12}), ("x.ts", "libx264", {"bf": 2, "g": 12}),
     ("x.h264", "libx264", {"bf": 2, "g": 12}), ("x.flv", "libx264", {"bf": 2, "g": 12}),
     ("x.mpg", "mpeg2video", {"bf": 2, "g": 12}), ("x.webm", "libvpx", {"auto-alt-ref": 1, "lag-in-frames": 16}),
     ("x9.webm", "libvpx-vp9", {"lag-in-frames": 16}), ("odd.mp4", "libx264", {"width": 50, "height": 38}),
     ("odd.mkv", "libx264", {"width": 53, "height": 37, "pix_fmt": "yuv444p"}),
     ("ten.mp4", "libx264", {"pix_fmt": "yuv420p10le"}), ("intra.mov", "libx264", {"g": 1}),
     ("vfr.mp4", "libx264", {"n_frames": 40, "times": [i + i * i // 7 for i in range(40)]})],
)  # fmt: skip
def test_every_container_reads_like_a_sequential_decode(tmp_path, media_factory, name, codec, options):
    path = media_factory.write_video(tmp_path / name, codec, **options)
    times, frames = media_factory.decode_all(path)
    if name == "h.avi":  # AVI has no time stamps of showing: the frames are counted
        times = np.arange(len(frames)) / 25
    assert_reads_like(path, times, frames)


def test_a_stream_cut_between_keyframes_begins_with_its_first_whole_frame(tmp_path, media_factory):
    whole = media_factory.write_video(tmp_path / "x.ts", n_frames=90, bf=2, g=30).read_bytes()
    (tmp_path / "cut.ts").write_bytes(whole[188 * (len(whole) // 188 // 4) :])
    times, frames = media_factory.decode_all(tmp_path / "cut.ts")
    assert 30 <= len(frames) < 90
    assert_reads_like(tmp_path / "cut.ts", times, frames)


def test_goes_on_decoding_while_the_next_frame_lies_ahead(tmp_path, media_factory, monkeypatch):
    path = media_factory.write_video(tmp_path / "x.mp4", n_frames=200, bf=2, g=50, sc_threshold=0)
    starts = []
    walk = VideoReader._decode_from
    monkeypatch.setattr(VideoReader, "_decode_from", lambda self, start: starts.append(start) or walk(self, start))
    with VideoReader(path) as reader:
        times = reader.frame_times_s
        reader.read_frames(times[5:40])
        reader.read_frames(times[39:60])  # the frame held, then on
        assert starts == [0]
        reader.read_frames(times[[155, 160, 155]])  # a jump is worth a seek
        assert starts == [0, 3]
        reader.read_frames(times[10])
        assert starts == [0, 3, 0]


def test_times_before_the_first_frame_give_it_and_past_the_end_fail(tmp_path, media_factory):
    path = media_factory.write_video(tmp_path / "x.mp4", n_frames=50)
    _, frames = media_factory.decode_all(path)
    with VideoReader(path) as reader:
        assert reader.info.duration_s == pytest.approx(2.0)
        assert reader.info.rate_hz == pytest.approx(25.0)
        images = reader.read_frames([-3.0, 0.0385, 0.0395, 2.0009])  # 1 ms early is on time
        assert np.array_equal(images, [frames[i] for i in (0, 0, 1, 49)])
        assert reader.read_frames([]).shape == (0, 48, 64, 3)
        with pytest.raises(
            SegmentOutsideVideoError, match=r"x\.mp4 ends at 2\.000 s, a frame is asked for at 2\.002 s"
        ):
            reader.read_frames([1.0, 2.002])
        with pytest.raises(SegmentOutsideVideoError):
            reader.read_frames([float("nan")])


@pytest.mark.shared
def test_damage_is_named_and_frames_before_it_are_read(shared_data):
    path = shared_data / "edge" / "decord_corrupted.mp4"
    whole = []
    with av.open(str(path)) as container, suppress(av.InvalidDataError):
        for frame in container.decode(video=0):
            whole.append(frame.to_ndarray(format="rgb24"))
    with VideoReader(path) as reader:
        assert reader.info.n_frames == 50
        n_whole = len(whole)
        assert 20 < n_whole < 50
        assert np.array_equal(reader.read_frames(reader.frame_times_s[:n_whole:5]), whole[::5])
        with pytest.raises(DecodeError, match=r"decord_corrupted\.mp4: the frame at 4\.\d+ s can't be decoded whole"):
            reader.read_frames([4.5])
        assert np.array_equal(reader.read_frames([1.0])[0], whole[10])  # and it goes on


@pytest.mark.parametrize(("name", "options"), [("x.mp4", {"movflags": "faststart"}), ("x.mkv", {}), ("x.avi", {})])
def test_a_file_that_is_cut_short_is_refused(tmp_path, media_factory, name, options):
    codec = "mpeg4" if name == "x.avi" else "libx264"
    path = media_factory.write_video(tmp_path / name, codec, n_frames=100, g=10, container_options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DecodeError, match=rf"{name} declares \d\.\d+ s of frames but holds \d\.\d+ s: it is cut short"):
        VideoReader(path)


def test_sound_may_end_long_before_or_after_the_pictures(tmp_path, media_factory):
    for seconds in (1, 6):
        tone = np.zeros((1, seconds * 44100), np.float32)
        for ending in ("mp4", "mkv"):
            path = media_factory.write_video(tmp_path / f"s{seconds}.{ending}", n_frames=75, sound=tone)
            with VideoReader(path) as reader:
                assert reader.info.duration_s == pytest.approx(3.0, abs=0.03)


def test_what_is_no_video_is_refused_in_one_line(tmp_path, media_factory):
    media_factory.write_sound(tmp_path / "sound.wav", np.zeros((1, 8000), np.float32), "pcm_s16le", 8000)
    whole = media_factory.write_video(tmp_path / "whole.mp4", n_frames=50).read_bytes()
    contents = {
        "text.mp4": b"this is no video\n" * 40, "empty.mp4": b"", "zero.mp4": bytes(100_000),
        "moov.mp4": whole[: len(whole) // 2], "list.mp4": b"ffconcat version 1.0\nfile whole.mp4\n",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "sound.wav"):
        with pytest.raises(DecodeError) as caught:
            VideoReader(tmp_path / name)
        message = str(caught.value)
        assert str(tmp_path / name) in message and "\n" not in message and ("; " in message or ": " in message)
    with pytest.raises(DecodeError, match="holds no video"):
        VideoReader(tmp_path / "sound.wav")
    with pytest.raises(MediaNotFoundError, match=r"nothing\.mp4: no such file"):
        VideoReader(tmp_path / "nothing.mp4")
