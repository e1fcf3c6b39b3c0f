"""Writes mp4 files, H.264 with or without AAC, that are the same bytes each time."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags

BITEXACT = {"fflags": "+bitexact"}
X264 = {"preset": "veryfast", "crf": "17", "g": "45", "x264-params": "cpu-independent=1"}
"""Without `cpu-independent`, libx264 encodes differently from run to run where it uses AVX-512 (DECISIONS.md)."""


def write_mp4(
    path: Path,
    pictures: Iterable[npt.NDArray[np.uint8]],
    frame_rate_hz: int,
    samples: npt.NDArray[np.float32] | None,
    sample_rate_hz: int,
) -> None:
    """Write runs of pictures uint8 [T, H, W, 3] and mono samples float32 [n] (None: no track), both from time zero on.

    H.264 yuv420p by libx264 (with B-frames, as real files have them) and AAC, one thread each, nothing of the clock
    in the file: the same input gives the same bytes with the same libraries. The file appears under its name when it
    is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with av.open(str(partial), "w", format="mp4", options=BITEXACT) as container:
        video: av.VideoStream | None = None
        sound = None
        if samples is not None:
            sound = container.add_stream("aac", rate=sample_rate_hz, layout="mono", options={"b": "64k"})
            sound.codec_context.flags |= Flags.bitexact
        n_frames = n_samples = 0
        for run in pictures:
            if video is None:
                video = container.add_stream("libx264", rate=frame_rate_hz, options=X264)
                video.height, video.width = run.shape[1:3]
                video.pix_fmt = "yuv420p"
                video.codec_context.thread_count = 1
                video.codec_context.flags |= Flags.bitexact
            for picture in run:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = n_frames, Fraction(1, frame_rate_hz)
                container.mux(video.encode(frame))
                n_frames += 1
            if sound is not None and samples is not None:
                # Sound follows the pictures run by run, so that the file is interleaved.
                stop = min(len(samples), n_frames * sample_rate_hz // frame_rate_hz)
                container.mux(sound.encode(_make_audio_frame(samples, n_samples, stop, sample_rate_hz)))
                n_samples = stop
        if sound is not None and samples is not None:
            if n_samples < len(samples):
                container.mux(sound.encode(_make_audio_frame(samples, n_samples, len(samples), sample_rate_hz)))
            container.mux(sound.encode(None))
        if video is not None:
            container.mux(video.encode(None))
    partial.replace(path)


def _make_audio_frame(samples: npt.NDArray[np.float32], start: int, stop: int, sample_rate_hz: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(samples[None, start:stop], format="fltp", layout="mono")
    frame.sample_rate = sample_rate_hz
    frame.pts, frame.time_base = start, Fraction(1, sample_rate_hz)
    return frame
