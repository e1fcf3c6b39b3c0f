"""Frames, audio and spectrogram of one segment, read by the readers of extraction, in formats that browsers show."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from echoshift.extract.audio import log_spectrogram
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import OpenMedia
from echoshift.extract.readers.interface import find_shown_frames
from echoshift.extract.recipes import ZHANG2022
from echoshift.extract.rows import AudioWindow, plan_windows_of, read_audio_windows
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import MediaNotFoundError, SegmentOutsideVideoError
from echoshift.pipeline.segments import END_TOLERANCE_S, Segment
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, OutputSpec

MAX_WIDTH_PX = 320
MAX_AUDIO_S = 10.0
_JPEG_QUALITY = 82


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """One frame as a JPEG of at most 320 pixels in width; `number` is its index in the file.

    `time_s` is when it is first shown, in seconds from the start of the video.
    """

    jpeg: bytes
    time_s: float
    number: int
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True, eq=False)
class SegmentAudio:
    """The first 10 s at most of the segment's sound, mono.

    Attributes:
        wav: 16-bit PCM.
        samples: the same before it was rounded, float32 [n] in about -1..1.
        start_s, stop_s: seconds from the start of the video.
        loudness_dbfs: mean power in dB of full scale.
    """

    wav: bytes
    samples: np.ndarray
    rate_hz: int
    start_s: float
    stop_s: float
    loudness_dbfs: float


@dataclass(frozen=True, slots=True, eq=False)
class Spectrogram:
    """The log spectrogram that an audio encoder sees.

    Attributes:
        values: float32 [n_bands, n_frames], lowest band first, exactly the network's input.
        png: the part that isn't repeated, lowest band at the bottom, 8-bit colours.
        encoder: whose input it is; "" where nothing was extracted and the recipe's own settings are shown.
        start_s, stop_s: what the window covers, in seconds from the start of the video.
        n_own_frames: frames before the sound, shorter than the window, begins again or ends; n_frames where it doesn't.
        top_hz: frequency of the highest band.
        is_mel: whether the bands lie evenly on the mel scale rather than in Hz.
    """

    values: np.ndarray
    png: bytes
    encoder: str
    recipe: str
    start_s: float
    stop_s: float
    n_own_frames: int
    top_hz: float
    is_mel: bool


def choose_audio_spec(card: DatasetCard, stored: Sequence[FeatureSpec]) -> tuple[FeatureSpec, bool]:
    """Return the specification of an audio encoder, and whether something was extracted by it.

    Of several stores the one of the encoder that the card names first. Where no audio was extracted it is the recipe of
    Zhang et al. (METHODS section 3), of no encoder.
    """
    hearing = [spec for spec in stored if spec.audio is not None]
    order = {name: place for place, name in enumerate(card.encoders) if find_encoder(name).modality == "audio"}
    if hearing:
        return min(hearing, key=lambda spec: order.get(spec.encoder, len(order))), True
    nothing = (OutputSpec(name="map", shape=(1,)),)
    spec = FeatureSpec(encoder="none", weights="none", clip=ClipSpec(n_frames=1), audio=ZHANG2022, outputs=nothing)
    return spec, False


def read_shown_frames(media: OpenMedia, segment: Segment, n_frames: int) -> tuple[ShownFrame, ...]:
    """Read the frames in the middle of each of `n_frames` equal parts of a segment; fewer where it has fewer.

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
    frames = zip(reader.read_frames(times_s), times_s.tolist(), numbers.tolist(), strict=True)
    return tuple(encode_frame(frame, time_s, number) for frame, time_s, number in frames)


def encode_frame(frame: np.ndarray, time_s: float, number: int) -> ShownFrame:
    """Encode a frame, uint8 [H, W, 3], as a JPEG no wider than MAX_WIDTH_PX."""
    from PIL import Image

    image = Image.fromarray(frame)
    if image.width > MAX_WIDTH_PX:
        height = max(1, round(image.height * MAX_WIDTH_PX / image.width))
        image = image.resize((MAX_WIDTH_PX, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return ShownFrame(file.getvalue(), time_s, number, image.width, image.height)


def read_segment_audio(media: OpenMedia, segment: Segment, rate_hz: int) -> SegmentAudio:
    """Read the first MAX_AUDIO_S of a segment's sound at `rate_hz`.

    Raises MediaNotFoundError where there is none to hear, saying which: no track, or one of zeros alone.
    """
    location = media.locate(segment, "audio")
    reader = media.open_audio(location)
    if reader is None:
        raise MediaNotFoundError("the video lies as loose frames, which have no sound")
    if not reader.has_track:
        raise MediaNotFoundError(f"{location.path.name} has no sound track")
    samples = reader.read(segment.start_s, min(segment.stop_s, segment.start_s + MAX_AUDIO_S), rate_hz)
    if not len(samples):
        raise MediaNotFoundError(f"the sound track of {location.path.name} ends before the segment begins")
    if not samples.any():
        raise MediaNotFoundError(f"the sound track of {location.path.name} is silent here: every sample is zero")
    loudness = float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64))))
    stop_s = segment.start_s + len(samples) / rate_hz
    return SegmentAudio(encode_wav(samples, rate_hz), samples, rate_hz, segment.start_s, stop_s, loudness)


def encode_wav(samples: np.ndarray, rate_hz: int) -> bytes:
    """Encode samples, float [n], as mono 16-bit WAV; what is beyond full scale is clipped."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def read_spectrogram(media: OpenMedia, segment: Segment, spec: FeatureSpec, encoder: str) -> Spectrogram:
    """Compute the log spectrogram that `encoder` of `spec` sees; of one window a clip, that of the middle clip.

    Raises MediaNotFoundError for a segment without sound.
    """
    audio = spec.audio
    assert audio is not None, "chosen among encoders of audio"
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
        n_own = min(n_own, max(1, round(len(found[entry]) / audio.n_hop)))
    start_s, stop_s = plan_windows_of(media, segment, spec)[entry].tolist()
    return Spectrogram(
        values=values,
        png=encode_spectrogram(values[:, :n_own]),
        encoder=encoder,
        recipe=audio.recipe,
        start_s=start_s,
        stop_s=stop_s,
        n_own_frames=n_own,
        top_hz=audio.f_max_hz if audio.f_max_hz is not None else audio.rate_hz / 2,
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
    image.putpalette(colormaps["magma"](np.arange(256), bytes=True)[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
