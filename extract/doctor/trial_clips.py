"""Makes the tiny clips with sound on which decoders are tried, in every format that PyAV can write here."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.codec import UnknownCodecError

N_FRAMES = 12
RATE_HZ = 12
SOUND_HZ = 48000
SIDE_PX = 64
TONE_HZ = 440.0
TONE = 0.3


@dataclass(frozen=True, slots=True)
class ClipFormat:
    """One format: encoder and pixels of the pictures, encoder of the sound, ending of the file."""

    name: str
    video: str
    pixels: str
    sound: str
    ending: str
    options: tuple[tuple[str, str], ...] = ()


FORMATS = (
    ClipFormat("h264", "libx264", "yuv420p", "aac", ".mp4"),
    ClipFormat("hevc", "libx265", "yuv420p", "aac", ".mp4", (("x265-params", "log-level=none"),)),
    ClipFormat("vp9", "libvpx-vp9", "yuv420p", "libopus", ".webm"),
    ClipFormat("av1", "libsvtav1", "yuv420p", "libopus", ".mkv", (("preset", "12"),)),
    ClipFormat("mpeg4", "mpeg4", "yuv420p", "libmp3lame", ".mp4"),
    ClipFormat("mjpeg", "mjpeg", "yuvj420p", "pcm_s16le", ".mkv"),
)


def grey_of_frame(number: int) -> int:
    """Return the grey of a clip's frame, 40 to 216, 16 apart: far enough to tell frames by after any coding."""
    return 40 + 16 * number


def can_write(form: ClipFormat) -> bool:
    """Return whether the FFmpeg in PyAV has the encoders of a format."""
    for name in (form.video, form.sound):
        try:
            av.Codec(name, "w")
        except UnknownCodecError:
            return False
    return True


def write_clip(form: ClipFormat, folder: Path) -> Path:
    """Write a second of grey pictures, each of its own grey, with a tone; raises av.FFmpegError where that fails."""
    path = folder / f"{form.name}{form.ending}"
    with av.open(str(path), "w") as container:
        pictures: Any = container.add_stream(form.video, rate=RATE_HZ, options=dict(form.options))
        pictures.width = pictures.height = SIDE_PX
        pictures.pix_fmt = form.pixels
        sound: Any = container.add_stream(form.sound, rate=SOUND_HZ, layout="mono")
        for number in range(N_FRAMES):
            picture = np.full((SIDE_PX, SIDE_PX, 3), grey_of_frame(number), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE_HZ)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        times_s = np.arange(SOUND_HZ) / SOUND_HZ
        tone = (TONE * np.sin(2 * np.pi * TONE_HZ * times_s)).astype(np.float32)
        convert = av.AudioResampler(format=sound.codec_context.format.name, layout="mono", rate=SOUND_HZ)
        whole = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        whole.sample_rate, whole.pts, whole.time_base = SOUND_HZ, 0, Fraction(1, SOUND_HZ)
        fifo = av.AudioFifo()
        for converted in convert.resample(whole):
            fifo.write(converted)
        n_samples = sound.codec_context.frame_size or 1024
        while (block := fifo.read(n_samples, partial=True)) is not None:
            container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    return path
