"""Reads the frames of a video file through decord 0.6; to compare with features that were made with it.

It is wrong, without saying so, after seeks in open-GOP H.264 and HEVC, in intra-refresh streams, in Xvid with B-frames,
in files with an edit list (where it also invents frames at the end), and always in MPEG-TS; it can't open AV1 or raw
H.264, and reports no damage. It decodes ahead without bound: reading one frame of a minute of 1080p takes gigabytes.
The PyAV reader has none of these faults.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from echoshift.extract.readers.container import get_container_start_s, open_container, pick_video_stream
from echoshift.extract.readers.interface import FrameReader, VideoInfo, check_times, find_shown_frames
from echoshift.extract.readers.video import compute_rotation_deg, get_orientation
from echoshift.pipeline.errors import DecodeError, SpecError

NO_DECORD = (
    "decord isn't installed (its wheels are for x86_64 Linux and Windows alone); leave out --decoder decord: PyAV, the "
    "default, is exact"
)
_N_BATCH = 64  # frames taken from decord at a time


def ensure_decord() -> None:
    """Raise SpecError where decord isn't installed."""
    if importlib.util.find_spec("decord") is None:
        raise SpecError(NO_DECORD)


class DecordReader(FrameReader):
    """The frames of one video file by decord: full size, RGB, upright.

    Times are decord's own time stamps, less the container's start time; they are float32, so within 0.25 ms in the
    first hour. Frames are found by those times; which images come back is decord's doing (see above).
    Raises MediaNotFoundError or DecodeError when made; can't be pickled.
    """

    def __init__(self, path: Path) -> None:
        ensure_decord()
        import decord

        self._path = path
        with open_container(path) as container:  # decord's own errors name neither file nor reason
            stream = pick_video_stream(container, path)
            start_s = get_container_start_s(container)
            orientation = get_orientation(next(iter(container.decode(stream))))
            width, height = stream.codec_context.width, stream.codec_context.height
        if orientation[1] != 0:
            width, height = height, width
        self._errors: tuple[type[Exception], ...] = (decord.DECORDError, decord.DECORDLimitReachedError)
        try:
            # More threads fail now and then with VP9, and differ between machines.
            self._reader: Any = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            n_frames = len(self._reader)
            stamps = self._reader.get_frame_timestamp(np.arange(n_frames))
        except self._errors as error:
            raise self._explain(error) from error
        if n_frames == 0:
            raise DecodeError(f"{path}: decord finds no frame; use the PyAV reader")
        self.frame_times_s = np.asarray(stamps[:, 0], dtype=np.float64) - start_s
        duration_s = float(stamps[:, 1].max()) - start_s
        self.info = VideoInfo(
            n_frames=n_frames,
            duration_s=duration_s,
            rate_hz=n_frames / max(duration_s - float(self.frame_times_s[0]), 1e-6),
            height=height,
            width=width,
            rotation_deg=compute_rotation_deg(orientation),
        )

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames that decord gives for the times, uint8 [T, H, W, 3].

        Raises DecodeError where decord fails or gives another shape than the video has (it does for widths of 1 to 8,
        12, 16, 24, 48 and 72), SegmentOutsideVideoError past the end.
        """
        times = check_times(times_s, self.info.duration_s, self._path)
        shape = (self.info.height, self.info.width, 3)
        frames = np.empty((times.size, *shape), dtype=np.uint8)
        positions, inverse = np.unique(find_shown_frames(self.frame_times_s, times), return_inverse=True)
        for begin in range(0, len(positions), _N_BATCH):
            batch = positions[begin : begin + _N_BATCH]
            try:
                images = self._reader.get_batch(batch.tolist()).asnumpy()
            except self._errors as error:
                raise self._explain(error) from error
            if images.shape != (len(batch), *shape):
                raise DecodeError(
                    f"{self._path}: decord gives frames of shape {images.shape[1:]}, the video's are {shape}; "
                    "use the PyAV reader"
                )
            for nth, image in enumerate(images, start=begin):
                for place in np.flatnonzero(inverse == nth):
                    frames[place] = image
        return frames

    def close(self) -> None:
        """Close decord's reader with its threads and its queue of decoded frames."""
        self._reader = None

    def _explain(self, error: Exception) -> DecodeError:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        why = re.sub(r"^\[[\d:]+\] \S+: ", "", why)  # the time, and the source file on its builder's machine
        return DecodeError(f"{self._path}: decord fails: {why}; use the PyAV reader")
