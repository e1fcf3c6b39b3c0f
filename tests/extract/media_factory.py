"""Makes small media files with PyAV and reads them back in the plainest way, for the tests of the readers."""

from __future__ import annotations

import io
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def draw_frame(number, width=64, height=48):
    """Draw a picture that tells its number by eight vertical bars, over a ramp."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = np.linspace(0, 200, height, dtype=np.uint8)[:, None, None]
    for bit in range(8):
        image[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 255 * ((number >> bit) & 1)
    return image


def write_video(
    path, codec="libx264", n_frames=60, width=64, height=48, rate=25, pix_fmt="yuv420p", sound=None,
    sound_codec="aac", sound_rate=44100, sound_options=None, times=None, container_options=None,
    draw=draw_frame, **options,
):  # fmt: skip
    """Write a video of numbered frames, with float32 sound [C, n] if given; `times` are ticks of 1/rate."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        audio = None if sound is None else _add_sound(container, sound_codec, sound_rate, sound, sound_options)
        for number in range(n_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, width, height), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if audio is not None:
            _encode_sound(container, audio, sound, sound_rate)
    return path


def write_sound(path, sound, codec, rate, options=None):
    with av.open(str(path), "w") as container:
        _encode_sound(container, _add_sound(container, codec, rate, sound, options), sound, rate)
    return path


def _layout(sound):
    return {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]


def _add_sound(container, codec, rate, sound, options):
    return container.add_stream(codec, rate=rate, layout=_layout(sound), options=options or {})


def _encode_sound(container, stream, sound, rate):
    convert = av.AudioResampler(format=stream.codec_context.format.name, layout=_layout(sound), rate=rate)
    for begin in range(0, sound.shape[1], 4096):
        block = np.ascontiguousarray(sound[:, begin : begin + 4096], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_layout(sound))
        frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        for converted in convert.resample(frame):
            for packet in stream.encode(converted):
                container.mux(packet)
    for packet in stream.encode(None):
        container.mux(packet)


def decode_all(path, stream=None):
    """Decode a file from its start, the plainest way: (times, RGB frames) of its best picture stream, not turned."""
    with av.open(str(path)) as container:
        video = container.streams.best("video") if stream is None else container.streams[stream]
        video.thread_type = "AUTO"
        start_s = (container.start_time or 0) / av.time_base
        frames, times = [], []
        for frame in container.decode(video):
            times.append(len(times) / float(video.average_rate) if frame.pts is None else frame.time - start_s)
            frames.append(frame.to_ndarray(format="rgb24"))
    return np.array(times), frames


def read_boxes(image):
    """Read the number that the files of shared/data/seek carry in 12 boxes of their top rows."""
    return sum(int(image[8:32, 12 + 48 * bit : 40 + 48 * bit].mean() > 127) << bit for bit in range(12))


def write_images(folder: Path, numbers, pattern="frame_%010d.jpg", width=20, height=10, mode="RGB"):
    """Write numbered images by PIL and return what PIL reads back, by number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, images = np.random.default_rng(0), {}
    for number in numbers:
        shape = (height, width, 3) if mode == "RGB" else (height, width)
        path = folder / (pattern % number)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(path)
        images[number] = np.asarray(Image.open(path))
    return images


def pack_tar(path, folder: Path, prefix=""):
    """Pack a folder's files into an uncompressed tar below a prefix."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                data = file.read_bytes()
                member = tarfile.TarInfo(prefix + file.relative_to(folder).as_posix())
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path
