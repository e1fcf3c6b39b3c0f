"""Compares the reader of audio with signals known by construction, and spans against the whole."""

from __future__ import annotations

from types import SimpleNamespace

import av
import numpy as np
import pytest

from echoshift.extract.readers import audio as audio_module
from echoshift.extract.readers.audio import AudioReader, probe_audio_end_s, read_audio
from echoshift.extract.readers.container import has_whole_index, open_container
from echoshift.pipeline.errors import DecodeError, MediaNotFoundError

RATE = 44100


def make_chirp(seconds, rate=RATE, n_channels=1):
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((n_channels, len(t)))
    return (0.4 * np.sin(2 * np.pi * (150 * t + 60 * t**2)) + 0.05 * noise).astype(np.float32)


def make_click(at, seconds=3.0, rate=RATE):
    """Make a short tone burst whose middle lies at sample `at`, under a Gaussian of 1 ms."""
    t = (np.arange(round(seconds * rate)) - at) / rate
    return (0.8 * np.exp(-0.5 * (t / 1e-3) ** 2) * np.cos(2 * np.pi * 2000 * t)).astype(np.float32)[None]


def find_peak_s(samples, rate):
    i = int(np.argmax(np.abs(samples)))
    left, middle, right = np.abs(samples[i - 1 : i + 2]).tolist()
    return (i + 0.5 * (left - right) / (left - 2 * middle + right)) / rate


@pytest.mark.parametrize(
    ("name", "codec", "tolerance_s"),
    [("x.wav", "pcm_s16le", 2e-5), ("x.flac", "flac", 2e-5), ("x.m4a", "aac", 1e-3), ("x.mp3", "libmp3lame", 1e-3),
     ("x.mkv", "aac", 1e-3), ("x.ogg", "libopus", 1e-3)],
)  # fmt: skip
@pytest.mark.parametrize("out_rate", [16000, 24000])
def test_a_click_is_heard_when_it_sounds(tmp_path, media_factory, name, codec, tolerance_s, out_rate):
    rate = 48000 if codec == "libopus" else RATE
    path = media_factory.write_sound(tmp_path / name, make_click(1.3 * rate, rate=rate), codec, rate)
    heard = read_audio(path, 0.0, 3.0, out_rate)
    assert heard.dtype == np.float32 and abs(len(heard) - 3 * out_rate) <= 0.03 * out_rate
    assert find_peak_s(heard, out_rate) == pytest.approx(1.3, abs=tolerance_s)
    later = read_audio(path, 1.2, 1.5, out_rate)
    assert len(later) == round(0.3 * out_rate)
    assert find_peak_s(later, out_rate) == pytest.approx(0.1, abs=tolerance_s)


def test_resampling_is_accurate_against_the_formula(tmp_path, media_factory):
    t = np.arange(3 * RATE) / RATE
    path = media_factory.write_sound(tmp_path / "x.wav", np.sin(2 * np.pi * 997 * t)[None] * 0.5, "pcm_f32le", RATE)
    for rate in (16000, 24000, 44100, 48000):
        heard = read_audio(path, 0.5, 2.5, rate)
        expected = 0.5 * np.sin(2 * np.pi * 997 * (round(0.5 * rate) + np.arange(2 * rate)) / rate)
        assert np.abs(heard - expected).max() < 2e-4  # swresample's 32 taps; 5e-5 here


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("x.wav", "pcm_s16le", RATE), ("x.flac", "flac", RATE), ("x.m4a", "aac", RATE), ("x.mkv", "aac", RATE),
     ("x.mp3", "libmp3lame", RATE), ("x.ogg", "libopus", 48000), ("o.mkv", "libopus", 48000),
     ("f.mkv", "flac", RATE), ("f.ogg", "flac", RATE), ("x.ts", "aac", RATE)],
)  # fmt: skip
def test_a_span_read_alone_is_that_span_of_the_whole(tmp_path, media_factory, monkeypatch, name, codec, rate):
    # FFmpeg's AAC encoder stores noise by its level, and each decode makes up its own: off here.
    options = {"aac_pns": "0"} if codec == "aac" else None
    path = media_factory.write_sound(tmp_path / name, make_chirp(14, rate, 2), codec, rate, options)
    whole = read_audio(path, 0.0, 14.0, 16000)
    monkeypatch.setattr(audio_module, "FROM_START_S", 1.0)  # so that short files are sought in too
    with AudioReader(path) as reader:
        for start_s in (0.0, 1.2345, 11.9, 3.21, 7.77777, 12.5):
            alone = reader.read(start_s, start_s + 0.9, 16000)
            first = round(start_s * 16000)
            assert len(alone) == 14400
            assert np.abs(alone - whole[first : first + 14400]).max() < 1e-6, start_s
            assert np.array_equal(alone, read_audio(path, start_s, start_s + 0.9, 16000)), "depends on earlier reads"


@pytest.fixture
def count_openings(monkeypatch):
    """Count, in the list it gives, the files that the reader of audio opens."""
    opened = []

    def open_and_note(path):
        opened.append(path.name)
        return open_container(path)

    monkeypatch.setattr(audio_module, "open_container", open_and_note)
    return opened


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.mp4", "aac", None), ("a.mov", "aac", None), ("m.mp4", "libmp3lame", None), ("3.mp4", "ac3", None),
     ("e.mp4", "eac3", None), ("a.m4a", "alac", None), ("f.mp4", "flac", None)],
)  # fmt: skip
def test_an_mp4_is_opened_once_and_reads_as_if_opened_for_each_span(
    tmp_path, media_factory, monkeypatch, count_openings, name, codec, options
):
    monkeypatch.setattr(audio_module, "FROM_START_S", 0.7)
    noise = 0.3 * np.random.default_rng(0).standard_normal((2, 6 * RATE)).astype(np.float32)  # AAC's is made up
    path = media_factory.write_sound(tmp_path / name, noise, codec, RATE, options)
    starts_s = (5.2, 2.3, 1.9, 4.7, 2.3, 5.7)  # the last one beyond the track's end
    with AudioReader(path) as reader:
        kept = [reader.read(start_s, start_s + 0.5, 16000) for start_s in starts_s]
    assert count_openings == [name]
    monkeypatch.setattr(audio_module, "has_whole_index", lambda container, path: False)
    for start_s, samples in zip(starts_s, kept, strict=True):
        anew = read_audio(path, start_s, start_s + 0.5, 16000)
        assert np.array_equal(samples, anew) and samples.any()
    assert len(kept[0]) == 8000 and len(kept[-1]) < 8000 and np.array_equal(kept[1], kept[4])


@pytest.mark.parametrize(
    ("name", "codec", "rate", "container_options"),
    [("f.mp4", "aac", RATE, {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}),
     ("o.mp4", "libopus", 48000, {}), ("p.mov", "pcm_s16le", RATE, {}), ("a.mkv", "aac", RATE, {})],
)  # fmt: skip
def test_other_files_are_opened_for_each_span(
    tmp_path, media_factory, monkeypatch, count_openings, name, codec, rate, container_options
):
    monkeypatch.setattr(audio_module, "FROM_START_S", 0.7)
    path = media_factory.write_video(
        tmp_path / name, n_frames=125, sound=make_chirp(5, rate, 2), sound_codec=codec, sound_rate=rate,
        container_options=container_options,
    )  # fmt: skip
    with AudioReader(path) as reader:
        kept = [reader.read(start_s, start_s + 0.5, 16000) for start_s in (3.2, 1.9, 3.2)]
    assert len(count_openings) >= 3
    assert len(kept[0]) == 8000 and np.array_equal(kept[0], kept[2])
    assert np.array_equal(kept[1], read_audio(path, 1.9, 2.4, 16000))


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(b"ftyp", 24), (b"mdat", 0), (b"moof", 32)], True),  # the rest of the file
        ([(b"ftyp", 24), (b"mdat", 1), (b"moof", 32)], False),  # 64 bits of size
        ([(b"ftyp", 24), (b"moov", 5)], False),  # no box
    ],
)
def test_fragments_are_found_among_the_outermost_boxes(tmp_path, boxes, expected):
    path = tmp_path / "x.mp4"
    data = b""
    for kind, size in boxes:
        large = (48).to_bytes(8, "big") if size == 1 else b""
        data += (size.to_bytes(4, "big") + kind + large).ljust({0: 80, 1: 48}.get(size, max(size, 8)), b"\0")
    path.write_bytes(data)
    named = SimpleNamespace(format=SimpleNamespace(name="mov,mp4,m4a,3gp,3g2,mj2"))
    assert has_whole_index(named, path) is expected
    assert has_whole_index(SimpleNamespace(format=SimpleNamespace(name="matroska,webm")), path) is False
    path.unlink()
    assert has_whole_index(named, path) is False


@pytest.mark.shared
def test_vorbis_spans_agree_with_the_whole(shared_data, monkeypatch):
    path = shared_data / "esc10" / "005_Clock_tick" / "4-175945-A.ogg"
    whole = read_audio(path, 0, 6, 16000)
    assert len(whole) == -(-223808 * 160 // 441)  # all its samples, resampled
    assert np.array_equal(read_audio(path, 2.5, 4.0, 16000), whole[40000:64000])
    monkeypatch.setattr(audio_module, "FROM_START_S", 1.0)
    assert np.abs(read_audio(path, 3.5, 4.5, 16000) - whole[56000:72000]).max() < 1e-6


def test_sound_and_picture_share_their_clock(tmp_path, media_factory):
    def flash(number, width, height):
        return np.full((height, width, 3), 255 if number == 40 else 0, np.uint8)

    click = make_click(40 / 25 * RATE, 3)
    for ending in ("mp4", "mkv", "ts"):
        path = media_factory.write_video(tmp_path / f"x.{ending}", n_frames=75, sound=click, draw=flash)
        heard_s = find_peak_s(read_audio(path, 0, 3, 16000), 16000)
        # MPEG-TS can't say that AAC begins with 1024 samples of nothing, nor can any player know.
        assert heard_s == pytest.approx(40 / 25, abs=2e-3 if ending != "ts" else 0.025)


def test_the_end_of_the_track_ends_the_samples(tmp_path, media_factory):
    path = media_factory.write_sound(tmp_path / "x.wav", make_chirp(2.0), "pcm_s16le", RATE)
    assert len(read_audio(path, 1.5, 4.0, 16000)) == 8000
    assert len(read_audio(path, 2.5, 4.0, 16000)) == 0
    assert len(read_audio(path, 1.0, 1.0, 16000)) == 0
    assert probe_audio_end_s(path) == pytest.approx(2.0, abs=1e-3)
    early = read_audio(path, -0.5, 0.5, 16000)
    assert len(early) == 16000 and np.abs(early[:7990]).max() < 1e-4 and np.abs(early[8010:]).max() > 0.3


def test_no_sound_gives_no_samples(tmp_path, media_factory):
    path = media_factory.write_video(tmp_path / "x.mp4", n_frames=10)
    with AudioReader(path) as reader:
        assert not reader.has_track
    assert read_audio(path, 0.0, 0.4, 16000).shape == (0,)
    assert probe_audio_end_s(path) == 0.0
    with pytest.raises(MediaNotFoundError):
        read_audio(tmp_path / "nothing.mp4", 0, 1, 16000)


def test_a_late_track_and_a_gap_are_silent(tmp_path):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for packet in [*video.encode(av.VideoFrame(32, 32, "yuv420p")), *video.encode()]:
            container.mux(packet)
        for first in (*range(8000, 16000, 800), *range(24000, 32000, 800)):
            frame = av.AudioFrame.from_ndarray(np.full((1, 800), 8192, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, first
            for packet in audio.encode(frame):
                container.mux(packet)
    heard = read_audio(path, 0.0, 3.0, 16000)
    expected = np.zeros(32000, np.float32)
    expected[8000:16000] = expected[24000:32000] = 0.25
    assert np.array_equal(heard, expected)


def test_channels_are_mixed_as_into_a_16_bit_file(tmp_path, media_factory):
    levels = np.array([0.1, 0.2, 0.3, 0.4, 0.05, 0.15], np.float32)  # FL FR FC LFE BL BR
    for n_channels, weights in ((2, [0.5, 0.5]), (6, np.array([0.5**0.5, 0.5**0.5, 1, 0, 0.5, 0.5]) / (2 + 2**0.5))):
        sound = np.repeat(levels[:n_channels, None], RATE, axis=1)
        path = media_factory.write_sound(tmp_path / f"{n_channels}.wav", sound, "pcm_f32le", RATE)
        assert read_audio(path, 0.2, 0.8, RATE).mean() == pytest.approx(float(levels[:n_channels] @ weights), abs=1e-4)


@pytest.mark.shared
def test_real_tracks_of_all_kinds(shared_data):
    surround = read_audio(shared_data / "edge" / "bigbuckbunny.mp4", 0, 10, 16000)
    assert len(surround) == 254976 // 3 and 0.01 < np.abs(surround).max() <= 1.0
    with AudioReader(shared_data / "edge" / "carphone_pristine.mp4") as reader:
        assert not reader.has_track
    with AudioReader(shared_data / "gmdcsa24" / "Subject_1" / "Fall" / "14.mp4") as reader:  # begins at 109 ms
        samples = reader.read(0.0, 1.0, 48000)
        assert len(samples) == 48000 and not samples[:5232].any()
    # The best track is the one of the best pictures' programme: 16 kHz, 13.056 s.
    assert probe_audio_end_s(shared_data / "edge" / "nasa_13013.mp4") == pytest.approx(13.056)


def test_damaged_sound_is_named_and_the_rest_is_read(tmp_path, media_factory):
    path = media_factory.write_sound(tmp_path / "x.m4a", make_chirp(8), "aac", RATE, {"aac_pns": "0"})
    whole = read_audio(path, 0, 8, 16000)
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size, float(p.pts * p.time_base)) for p in container.demux(audio=0) if p.size]
    data = bytearray(path.read_bytes())
    for pos, size, at_s in spans:
        if 4.0 <= at_s < 4.3:
            data[pos : pos + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=r"x\.m4a: its audio can't be decoded at 4\.\d+ s: .*; the file is damaged"):
        read_audio(path, 3.5, 4.5, 16000)
    assert np.array_equal(read_audio(path, 1.0, 3.5, 16000), whole[16000:56000])
    assert np.abs(read_audio(path, 5.0, 6.0, 16000) - whole[80000:96000]).max() < 1e-6


def test_sound_that_is_cut_short_is_refused(tmp_path, media_factory):
    path = media_factory.write_sound(tmp_path / "x.flac", make_chirp(4), "flac", RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(read_audio(path, 0.0, 1.5, 16000)) == 24000
    with pytest.raises(DecodeError, match=r"x\.flac: its audio can't be decoded at 1\.\d+ s: Invalid data"):
        read_audio(path, 1.0, 3.0, 16000)  # its last frame is half there
    with pytest.raises(DecodeError, match=r"x\.flac declares 4\.00 s of audio but holds \d\.\d+ s: it is cut short"):
        probe_audio_end_s(path)
    (tmp_path / "text.wav").write_text("no sound\n" * 99)
    with pytest.raises(DecodeError, match=r"text\.wav .* can't be opened as a media file: Invalid data"):
        read_audio(tmp_path / "text.wav", 0, 1, 16000)
