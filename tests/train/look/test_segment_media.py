"""Checks that what is shown and heard of a segment is what its file holds, at the times that are said."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import scipy.signal
from PIL import Image

from echoshift.extract.media import OpenMedia
from echoshift.extract.readers.audio import read_audio
from echoshift.extract.recipes import PLANAMENTE2021
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import MediaError, MediaNotFoundError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FeatureSpec, OutputSpec
from echoshift.train.look.segment_media import (
    encode_frame,
    encode_spectrogram,
    encode_wav,
    read_segment_audio,
    read_shown_frames,
    read_spectrogram,
)

AUDIO = AudioSpec(
    recipe="zhang2022",
    span="segment",
    rate_hz=16000,
    duration_s=2.0,
    n_window=512,
    n_hop=159,
    n_fft=512,
    log_floor=1e-7,
    standardise=True,
)
SPEC = FeatureSpec(
    encoder="resnet_demo",
    weights="none",
    clip=ClipSpec(n_frames=1),
    audio=AUDIO,
    outputs=(OutputSpec(name="map", shape=(1,)),),
)


def make_segment(video: str, start_s: float, stop_s: float) -> Segment:
    return Segment("x", video, start_s, stop_s, ("low",), "s", "train")


@pytest.fixture(scope="module")
def media_root(tiny_shift: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("shown")
    tiny_shift.write_video(root / "loud.mp4", [0, 1] * 6, seed=0)
    tiny_shift.write_video(root / "mute.mp4", [0], seed=1, has_track=False)
    return root


@pytest.fixture
def media(media_root: Path) -> Any:
    with OpenMedia(media_root, MediaLayout()) as opened:
        yield opened


def test_frames_are_those_in_the_middle_of_equal_parts(media: OpenMedia, media_root: Path) -> None:
    frames = read_shown_frames(media, make_segment("loud", 2.0, 3.0), 5)
    # 12 pictures a second: what is shown at 2.1, 2.3, 2.5, 2.7 and 2.9 s.
    assert [frame.number for frame in frames] == [25, 27, 30, 32, 34]
    assert [frame.time_s for frame in frames] == pytest.approx([25 / 12, 27 / 12, 30 / 12, 32 / 12, 34 / 12])
    with av.open(str(media_root / "loud.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for frame in frames:
        shown = np.asarray(Image.open(io.BytesIO(frame.jpeg)), dtype=float)
        errors = [np.abs(shown - picture).mean() for picture in decoded]
        assert int(np.argmin(errors)) == frame.number  # every picture differs from its neighbours
        assert (frame.width_px, frame.height_px) == (32, 32)


def test_a_segment_of_few_pictures_shows_each_once(media: OpenMedia) -> None:
    frames = read_shown_frames(media, make_segment("loud", 1.0, 1.2), 8)
    assert [frame.number for frame in frames] == [12, 13, 14]


def test_a_segment_beyond_its_video_isnt_shown(media: OpenMedia) -> None:
    with pytest.raises(MediaError, match=r"runs from 11 to 14 s, the video ends at 12\.000 s"):
        read_shown_frames(media, make_segment("loud", 11.0, 14.0), 3)


def test_wide_pictures_become_320_pixels_wide() -> None:
    picture = np.zeros((360, 640, 3), dtype=np.uint8)
    picture[:, 320:] = 200
    frame = encode_frame(picture, 0.5, 3)
    image = Image.open(io.BytesIO(frame.jpeg))
    assert image.format == "JPEG"
    assert image.size == (frame.width_px, frame.height_px) == (320, 180)
    shown = np.asarray(image, dtype=float)
    assert shown[:, :150].max() < 20
    assert shown[:, 170:].min() > 180


def test_sound_is_that_of_the_segment(media: OpenMedia, media_root: Path) -> None:
    sound = read_segment_audio(media, make_segment("loud", 3.0, 4.0), 16000)
    expected = read_audio(media_root / "loud.mp4", 3.0, 4.0, 16000)
    np.testing.assert_array_equal(sound.samples, expected)
    with wave.open(io.BytesIO(sound.wav)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        played = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    assert np.abs(played / 32767 - expected).max() <= 0.5 / 32767 + 1e-7
    assert (sound.start_s, sound.stop_s) == (3.0, 4.0)
    # The second kind of second: a tone of 1900 Hz, amplitude 0.2, with noise of 0.02.
    spectrum = np.abs(np.fft.rfft(played))
    assert spectrum.argmax() == pytest.approx(1900, abs=2)
    assert sound.loudness_dbfs == pytest.approx(10 * np.log10(0.2**2 / 2 + 0.02**2), abs=0.3)


def test_at_most_ten_seconds_are_heard(media: OpenMedia) -> None:
    sound = read_segment_audio(media, make_segment("loud", 1.0, 12.0), 8000)
    assert len(sound.samples) == 80000
    assert sound.stop_s == 11.0


def test_loud_samples_are_clipped_not_wrapped() -> None:
    with wave.open(io.BytesIO(encode_wav(np.array([1.5, -1.5, 0.25]), 8000))) as file:
        played = np.frombuffer(file.readframes(3), dtype="<i2")
    assert played.tolist() == [32767, -32767, 8192]


def test_no_track_is_said(media: OpenMedia) -> None:
    with pytest.raises(MediaNotFoundError, match=r"mute\.mp4 has no sound track"):
        read_segment_audio(media, make_segment("mute", 0.0, 1.0), 16000)
    with pytest.raises(MediaNotFoundError, match="no sound in the segment"):
        read_spectrogram(media, make_segment("mute", 0.0, 1.0), SPEC, "resnet_demo")


def test_the_spectrogram_is_scipys(media: OpenMedia, media_root: Path) -> None:
    shown = read_spectrogram(media, make_segment("loud", 2.0, 3.0), SPEC, "resnet_demo")
    samples = np.tile(read_audio(media_root / "loud.mp4", 2.0, 3.0, 16000), 2)[:32000].astype(np.float64)
    _, _, power = scipy.signal.spectrogram(samples, 16000, nperseg=512, noverlap=512 - 159)
    expected = np.log(power + 1e-7)
    expected = (expected - expected.mean()) / (expected.std() + 1e-9)
    np.testing.assert_allclose(shown.values, expected, atol=2e-4)
    assert (shown.encoder, shown.recipe, shown.top_hz, shown.is_mel) == ("resnet_demo", "zhang2022", 8000.0, False)
    assert (shown.start_s, shown.stop_s) == (2.0, 3.0)
    assert shown.n_own_frames == round(16000 / 159)  # the second half of two seconds repeats the first
    image = Image.open(io.BytesIO(shown.png))
    assert image.size == (shown.n_own_frames, 257)
    brightness = np.asarray(image.convert("L"), dtype=float).mean(axis=1)
    assert 256 - brightness.argmax() in (9, 10)  # 300 Hz, bands of 31.25 Hz from the bottom


def test_of_sound_around_clips_the_middle_one_is_shown(media: OpenMedia, media_root: Path) -> None:
    clip = ClipSpec(n_frames=4, rate_hz=12.0, n_clips=3)
    spec = SPEC.model_copy(update={"audio": PLANAMENTE2021, "clip": clip})
    shown = read_spectrogram(media, make_segment("loud", 2.0, 5.0), spec, "resnet_demo")
    # 36 frames, clips of 4: a = 33 / 3, offsets 5, 16, 27; the middle clip runs from 2 + 16 / 12 to 2 + 20 / 12 s.
    middle_s = 2 + 18 / 12
    assert (shown.start_s, shown.stop_s) == pytest.approx((middle_s - 1.279 / 2, middle_s + 1.279 / 2))
    assert shown.values.shape == (256, 256) and shown.n_own_frames == 256
    samples = read_audio(media_root / "loud.mp4", shown.start_s, shown.stop_s, 24000).astype(np.float64)
    window = np.pad(scipy.signal.get_window("hann", 240), (135, 136))
    middle = samples[128 * 120 - 255 : 128 * 120 + 256] * window  # frame 128 is centred on sample 128 * 120
    expected = np.log(np.abs(np.fft.rfft(middle)) ** 2 + 1e-6)
    np.testing.assert_allclose(shown.values[:, 128], expected, atol=2e-3)


def test_the_image_of_a_spectrogram_has_low_bands_at_the_bottom() -> None:
    values = np.zeros((4, 3))
    values[0] = 1.0
    image = np.asarray(Image.open(io.BytesIO(encode_spectrogram(values))))
    assert image.tolist() == [[0] * 3] * 3 + [[255] * 3]
