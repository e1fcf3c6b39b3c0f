"""Reads a segment's pictures and sound by the readers of extraction, and puts them into files that browsers play."""

from __future__ import annotations

import io
import wave

import numpy as np

from echoshift.extract.media import OpenMedia
from echoshift.extract.readers.interface import find_shown_frames
from echoshift.pipeline.errors import MediaNotFoundError, SegmentOutsideVideoError
from echoshift.pipeline.segments import END_TOLERANCE_S, Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.train.segment_view.view import SegmentSound, SegmentSpectrogram, ShownFrame

MAX_WIDTH_PX = 320
MAX_SOUND_S = 10.0
_JPEG_QUALITY = 82


def read_shown_frames(media: OpenMedia, segment: Segment, n_frames: int) -> tuple[ShownFrame, ...]:
    """Read the pictures in the middle of each of `n_frames` equal parts of a segment; fewer where it has fewer.

    Raises MediaError naming what can't be read.
    """
    reader = media.open_frames(segment, "rgb", "pyav")
    stop_s = min(segment.stop_s, reader.info.duration_s)
    if segment.stop_s > reader.info.duration_s + END_TOLERANCE_S or segment.start_s >= stop_s:
        raise SegmentOutsideVideoError(
            f"the segment runs from {segment.start_s:g} to {segment.stop_s:g} s, the video ends at "
            f"{reader.info.duration_s:.3f} s; correct the segment's times"
        )
    middles_s = segment.start_s + (np.arange(n_frames) + 0.5) / n_frames * (stop_s - segment.start_s)
    numbers = np.unique(find_shown_frames(reader.frame_times_s, middles_s))
    times_s = reader.frame_times_s[numbers]
    pictures = reader.read_frames(times_s)
    return tuple(
        encode_picture(picture, time_s, number)
        for picture, time_s, number in zip(pictures, times_s.tolist(), numbers.tolist(), strict=True)
    )


def encode_picture(picture: np.ndarray, time_s: float, number: int) -> ShownFrame:
    """Encode a picture, uint8 [H, W, 3], as a JPEG no wider than MAX_WIDTH_PX."""
    from PIL import Image

    image = Image.fromarray(picture)
    if image.width > MAX_WIDTH_PX:
        height = max(1, round(image.height * MAX_WIDTH_PX / image.width))
        image = image.resize((MAX_WIDTH_PX, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return ShownFrame(file.getvalue(), time_s, number, image.width, image.height)


def read_segment_sound(media: OpenMedia, segment: Segment, rate_hz: int) -> SegmentSound:
    """Read the first MAX_SOUND_S of a segment's sound at `rate_hz`.

    Raises MediaNotFoundError where there is none to hear, saying which: no track, or one of zeros alone.
    """
    from echoshift.extract.readers.audio import AudioReader

    location = media.locate(segment, "audio")
    if location.kind == "none":
        raise MediaNotFoundError("the video lies as loose frames, which have no sound")
    stop_s = min(segment.stop_s, segment.start_s + MAX_SOUND_S)
    with AudioReader(location.path) as reader:
        if not reader.has_track:
            raise MediaNotFoundError(f"{location.path.name} has no sound track")
        samples = reader.read(segment.start_s, stop_s, rate_hz)
    if not len(samples):
        raise MediaNotFoundError(f"the sound track of {location.path.name} ends before the segment begins")
    if not samples.any():
        raise MediaNotFoundError(f"the sound track of {location.path.name} is silent here: every sample is zero")
    loudness = 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)))
    return SegmentSound(
        encode_wav(samples, rate_hz),
        samples,
        rate_hz,
        segment.start_s,
        segment.start_s + len(samples) / rate_hz,
        float(loudness),
    )


def encode_wav(samples: np.ndarray, rate_hz: int) -> bytes:
    """Encode samples, float [n], as mono 16-bit WAV; what is beyond full scale is clipped."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def read_spectrogram(media: OpenMedia, segment: Segment, spec: FeatureSpec, *, is_stored: bool) -> SegmentSpectrogram:
    """Compute the log spectrogram that the encoder of `spec` sees; of one window a clip, that of the middle clip.

    Raises MediaNotFoundError for a segment without sound.
    """
    import torch

    from echoshift.extract.audio import log_spectrogram
    from echoshift.extract.rows import AudioWindow, plan_windows_of, read_audio_windows

    audio = spec.audio
    assert audio is not None, "chosen among encoders of sound"
    found = {
        item.number: item.samples
        for item in read_audio_windows(media, segment, "", spec)
        if isinstance(item, AudioWindow) and len(item.samples)
    }
    if not found:
        raise MediaNotFoundError("there is no sound in the segment, so that no encoder hears it")
    entry = sorted(found)[len(found) // 2]
    values = log_spectrogram([torch.from_numpy(found[entry])], audio)[0, 0].numpy()
    n_own = values.shape[1]
    if audio.span == "segment":
        hop = len(found[entry]) / audio.n_hop
        n_own = min(n_own, max(1, round(hop)))
    start_s, stop_s = plan_windows_of(media, segment, spec)[entry].tolist()
    top_hz = audio.f_max_hz if audio.f_max_hz is not None else audio.rate_hz / 2
    return SegmentSpectrogram(
        values=values,
        png=encode_spectrogram(values[:, :n_own]),
        encoder=spec.encoder if is_stored else "",
        recipe=audio.recipe,
        start_s=start_s,
        stop_s=stop_s,
        n_own_frames=n_own,
        top_hz=top_hz,
        is_mel=audio.n_mels is not None,
    )


def encode_spectrogram(values: np.ndarray) -> bytes:
    """Encode a spectrogram, float [n_bands, n_frames], as a PNG of a palette of 256 colours, low bands at the bottom.

    The range is that from the 1st to the 99.5th percentile, so that single values don't take the contrast.
    """
    from matplotlib import colormaps
    from PIL import Image

    low, high = np.percentile(values, (1.0, 99.5))
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    image = Image.fromarray(np.rint(scaled[::-1] * 255).astype(np.uint8), "P")
    palette = colormaps["magma"](np.arange(256), bytes=True)[:, :3]
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
