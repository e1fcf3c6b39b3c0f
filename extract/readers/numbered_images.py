"""Reads pictures that lie as numbered image files, wherever those lie: by name pattern, number and clock."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoshift.extract.readers.protocol import VideoInfo, check_times, find_shown_frames
from echoshift.pipeline.errors import DecodeError

FRAME_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""All that PIL may take a frame for, whatever its name says: EPS runs Ghostscript, others are plugged in."""
_NUMBER = re.compile(r"%(0\d+)?d")


class NumberedFiles(Protocol):
    """The bytes of image files by their number."""

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The numbers that are there, ascending, int64 [n]."""
        ...

    def read(self, number: int) -> bytes:
        """Read one file; raises DecodeError if that fails."""
        ...

    def name(self, number: int) -> str:
        """Return what messages call a file."""
        ...

    def close(self) -> None:
        """Return back the file handle, if there is one."""
        ...


def compile_frame_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a name pattern such as `frame_%010d.jpg` (one %d or %0Nd, `%%` for a percent sign).

    The number is group 1. Raises DecodeError for any other pattern.
    """
    plain = pattern.replace("%%", "\0")
    match = _NUMBER.search(plain)
    if match is None or "%" in plain[: match.start()] + plain[match.end() :] or "/" in plain:
        raise DecodeError(f"frame pattern {pattern!r} needs exactly one number, such as frame_%010d.jpg, and no folder")
    before, after = (re.escape(part.replace("\0", "%")) for part in (plain[: match.start()], plain[match.end() :]))
    width = int(match[1] or 1)
    return re.compile(f"{before}(\\d{{{width},}}){after}")


class NumberedFrameReader:
    """Reads numbered image files by time (protocol `FrameReader`); frame n is shown from (n - n_first) / rate_hz on.

    One set of files gives RGB, two give one gray channel each (flow: u, v). Frames between the lowest and the highest
    number count as shown even where a file is missing; asking for such a frame is a DecodeError. n_first may lie
    between two numbers.
    """

    def __init__(self, files: tuple[NumberedFiles, ...], where: Path, rate_hz: float, n_first: float) -> None:
        self._files, self._where = files, where
        numbers = files[0].numbers
        if len(numbers) == 0:
            raise DecodeError(f"{where} holds no file called like {files[0].name(int(n_first))}")
        self._first, last = int(numbers[0]), int(numbers[-1])
        self._missing = np.setdiff1d(np.arange(self._first, last + 1), numbers)
        self._times_s = (np.arange(self._first, last + 1) - n_first).astype(np.float64) / rate_hz
        self._duration_s = (last + 1 - n_first) / rate_hz
        self._rate_hz = rate_hz
        self._info: VideoInfo | None = None

    @property
    def info(self) -> VideoInfo:
        """The pictures' facts; opens one file the first time."""
        if self._info is None:
            height, width = self._decode(self._first).shape[:2]
            self._info = VideoInfo(len(self._times_s), self._duration_s, self._rate_hz, height, width)
        return self._info

    @property
    def frame_times_s(self) -> npt.NDArray[np.float64]:
        """When each frame is first shown, ascending, float64 [n_frames]."""
        return self._times_s

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times, uint8 [T, H, W, C] (C: 3, or 2 for flow).

        Raises DecodeError for a missing, damaged or differently sized file, SegmentOutsideVideoError past the end.
        """
        times = check_times(times_s, self._duration_s, self._where)
        n_channels = 3 if len(self._files) == 1 else len(self._files)
        if times.size == 0:
            return np.empty((0, self.info.height, self.info.width, n_channels), dtype=np.uint8)
        numbers, inverse = np.unique(find_shown_frames(self._times_s, times) + self._first, return_inverse=True)
        absent = np.intersect1d(numbers, self._missing)
        if absent.size:
            raise DecodeError(
                f"{self._where}: {self._files[0].name(int(absent[0]))} is missing "
                f"({self._missing.size} of {len(self._times_s)} frames are, from number {int(self._missing[0])} on); "
                "extract the frames again"
            )
        frames: npt.NDArray[np.uint8] | None = None
        for nth, number in enumerate(numbers):
            image = self._decode(int(number))
            if frames is None:
                frames = np.empty((times.size, *image.shape), dtype=np.uint8)
            elif image.shape != frames.shape[1:]:
                raise self._explain_size(int(number), image.shape, frames.shape[1:])
            for place in np.flatnonzero(inverse == nth):
                frames[place] = image
        assert frames is not None
        return frames

    def close(self) -> None:
        """Return back the file handles."""
        for files in self._files:
            files.close()

    def __enter__(self) -> NumberedFrameReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _decode(self, number: int) -> npt.NDArray[np.uint8]:
        if len(self._files) == 1:
            return _decode_image(self._files[0], number, "RGB")
        channels = [_decode_image(files, number, "L") for files in self._files]
        if channels[0].shape != channels[1].shape:
            raise self._explain_size(number, channels[1].shape, channels[0].shape)
        return np.stack(channels, axis=-1)

    def _explain_size(self, number: int, found: tuple[int, ...], expected: tuple[int, ...]) -> DecodeError:
        return DecodeError(
            f"{self._where}: {self._files[-1].name(number)} is {found[1]}x{found[0]}, others are "
            f"{expected[1]}x{expected[0]}; extract the frames again at one size"
        )


def _decode_image(files: NumberedFiles, number: int, mode: str) -> npt.NDArray[np.uint8]:
    """Decode one image file to uint8 [H, W, 3] (RGB) or [H, W] (L)."""
    data = files.read(number)
    try:
        with Image.open(io.BytesIO(data), formats=FRAME_FORMATS) as image:
            return np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{files.name(number)} ({len(data)} bytes) can't be decoded: {error}") from error
