"""Reads frames, RGB or flow (u, v), that lie as numbered image files in a folder or in one uncompressed tar a video."""

from __future__ import annotations

import io
import os
import re
import tarfile
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoshift.extract.readers.interface import FrameReader, VideoInfo, check_times, find_shown_frames
from echoshift.pipeline.errors import DecodeError, MediaNotFoundError

FRAME_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""All that PIL may take a frame for, whatever its name says: EPS runs Ghostscript, others are plugged in."""
_NUMBER = re.compile(r"%(0\d+)?d")


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


class FolderFiles:
    """The image files of one folder by number; raises MediaNotFoundError without the folder."""

    def __init__(self, folder: Path, pattern: str) -> None:
        regex = compile_frame_pattern(pattern)
        self._folder, self._pattern = folder, pattern
        try:
            with os.scandir(folder) as entries:
                matches = [match for entry in entries if (match := regex.fullmatch(entry.name))]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MediaNotFoundError(f"{folder}: no such folder") from error
        # `frame_%d.jpg` doesn't write frame_007.jpg: only the names that the pattern itself makes count.
        numbers = [int(match[1]) for match in matches if pattern % int(match[1]) == match[0]]
        self.numbers: npt.NDArray[np.int64] = np.sort(np.array(numbers, dtype=np.int64))

    def read(self, number: int) -> bytes:
        """Read one file; raises DecodeError if it can't be read."""
        path = self._folder / (self._pattern % number)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DecodeError(f"{path} can't be read: {error.strerror}") from error

    def name(self, number: int) -> str:
        """Return a frame's path, whether its file is there or not."""
        return str(self._folder / (self._pattern % number))

    def close(self) -> None:
        """Have nothing to give back: each file is opened on its own."""


class TarFiles:
    """The image files of one tar by number, without unpacking it; members may lie in any folder.

    With `folder` only members whose own folder has that name count (flow: `u`, `v`).
    Raises MediaNotFoundError without the file; DecodeError if it is no plain tar, is cut short, or has a number twice.
    """

    def __init__(self, path: Path, pattern: str, folder: str | None = None) -> None:
        self._path, self._pattern, self._folder = path, pattern, folder
        found = self._index_members()
        self.numbers: npt.NDArray[np.int64] = np.array(sorted(found), dtype=np.int64)
        self._spans = np.array([found[int(number)] for number in self.numbers], dtype=np.int64).reshape(-1, 2)
        self._file = path.open("rb")

    def _index_members(self) -> dict[int, tuple[int, int]]:
        """Map a frame's number to the (offset, size) of its bytes."""
        regex = compile_frame_pattern(self._pattern)
        found: dict[int, tuple[int, int]] = {}
        try:
            with tarfile.open(self._path, mode="r:") as tar:
                for member in tar:
                    vars(tar)["members"].clear()  # tarfile keeps every header otherwise
                    name = PurePosixPath(member.name)
                    match = regex.fullmatch(name.name)
                    if match is None or not member.isreg() or self._folder not in (None, name.parent.name):
                        continue
                    number = int(match[1])
                    if self._pattern % number != match[0]:
                        continue
                    if number in found:
                        raise DecodeError(
                            f"{self._path} holds {match[0]} twice, in different folders; make one tar a video"
                        )
                    found[number] = (member.offset_data, member.size)
        except FileNotFoundError as error:
            raise MediaNotFoundError(f"{self._path}: no such file") from error
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DecodeError(f"{self._path} is no whole, uncompressed tar: {error}; fetch or make it again") from error
        return found

    def read(self, number: int) -> bytes:
        """Read one member; raises DecodeError if the tar holds less than it says."""
        offset, size = self._spans[np.searchsorted(self.numbers, number)].tolist()
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise DecodeError(f"{self.name(number)}: the tar ends inside it; fetch the tar again")
        return data

    def name(self, number: int) -> str:
        """Return a member's name with the tar's."""
        return f"{self._path}[{'' if self._folder is None else self._folder + '/'}{self._pattern % number}]"

    def close(self) -> None:
        """Close the tar."""
        self._file.close()


def open_frame_images(path: Path, pattern: str, rate_hz: float, n_first: float = 1) -> NumberedFrameReader:
    """Open the frames of a folder or a tar, uint8 RGB.

    Raises MediaNotFoundError without it, DecodeError if no file matches the pattern.
    """
    return _open(path, pattern, rate_hz, n_first, (None,))


def open_flow_images(path: Path, pattern: str, rate_hz: float, n_first: float = 1) -> NumberedFrameReader:
    """Open flow that lies as gray images in `u/` and `v/`, in a folder or a tar: uint8 with channels u, v.

    Raises as `open_frame_images`, and DecodeError if u and v don't have the same frames.
    """
    return _open(path, pattern, rate_hz, n_first, ("u", "v"))


def _open(
    path: Path, pattern: str, rate_hz: float, n_first: float, folders: tuple[str | None, ...]
) -> NumberedFrameReader:
    files: list[FolderFiles | TarFiles] = []
    with ExitStack() as opened:
        for folder in folders:
            files.append(
                TarFiles(path, pattern, folder) if path.is_file() else FolderFiles(path / (folder or ""), pattern)
            )
            opened.callback(files[-1].close)
        first, last = files[0], files[-1]
        if not np.array_equal(first.numbers, last.numbers):
            odd = int(np.setxor1d(first.numbers, last.numbers)[0])
            lacking = last if odd in first.numbers else first
            raise DecodeError(
                f"{path} has {len(first.numbers)} frames of u and {len(last.numbers)} of v; the first that lacks its "
                f"partner is {lacking.name(odd)}: extract the flow again"
            )
        reader = NumberedFrameReader(tuple(files), path, rate_hz, n_first)
        opened.pop_all()
        return reader


class NumberedFrameReader(FrameReader):
    """The frames of numbered image files; frame n is shown from (n - n_first) / rate_hz on.

    One set of files gives RGB, two give one gray channel each (flow: u, v). Frames between the lowest and the highest
    number count as shown even where a file is missing; asking for such a frame is a DecodeError. n_first may lie
    between two numbers.
    """

    def __init__(self, files: tuple[FolderFiles | TarFiles, ...], where: Path, rate_hz: float, n_first: float) -> None:
        self._files, self._where = files, where
        numbers = files[0].numbers
        if len(numbers) == 0:
            raise DecodeError(f"{where} holds no file called like {files[0].name(int(n_first))}")
        self._first, last = int(numbers[0]), int(numbers[-1])
        self._missing = np.setdiff1d(np.arange(self._first, last + 1), numbers)
        self.frame_times_s = (np.arange(self._first, last + 1) - n_first).astype(np.float64) / rate_hz
        self._duration_s = (last + 1 - n_first) / rate_hz
        self._rate_hz = rate_hz

    @cached_property
    def info(self) -> VideoInfo:
        """The frames' facts; opens one file the first time."""
        height, width = self._decode(self._first).shape[:2]
        return VideoInfo(len(self.frame_times_s), self._duration_s, self._rate_hz, height, width)

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times, uint8 [T, H, W, C] (C: 3, or 2 for flow).

        Raises DecodeError for a missing, damaged or differently sized file, SegmentOutsideVideoError past the end.
        """
        times = check_times(times_s, self._duration_s, self._where)
        n_channels = 3 if len(self._files) == 1 else len(self._files)
        if times.size == 0:
            return np.empty((0, self.info.height, self.info.width, n_channels), dtype=np.uint8)
        numbers, inverse = np.unique(find_shown_frames(self.frame_times_s, times) + self._first, return_inverse=True)
        absent = np.intersect1d(numbers, self._missing)
        if absent.size:
            raise DecodeError(
                f"{self._where}: {self._files[0].name(int(absent[0]))} is missing "
                f"({self._missing.size} of {len(self.frame_times_s)} frames are, from number {int(self._missing[0])} "
                "on); extract the frames again"
            )
        frames: npt.NDArray[np.uint8] | None = None
        for nth, number in enumerate(numbers):
            image = self._decode(int(number))
            if frames is None:
                frames = np.empty((times.size, *image.shape), dtype=np.uint8)
            elif image.shape != frames.shape[1:]:
                self._refuse_size(int(number), image.shape, frames.shape[1:])
            for place in np.flatnonzero(inverse == nth):
                frames[place] = image
        assert frames is not None
        return frames

    def close(self) -> None:
        """Close the files."""
        for files in self._files:
            files.close()

    def _decode(self, number: int) -> npt.NDArray[np.uint8]:
        if len(self._files) == 1:
            return _decode_image(self._files[0], number, "RGB")
        channels = [_decode_image(files, number, "L") for files in self._files]
        if channels[0].shape != channels[1].shape:
            self._refuse_size(number, channels[1].shape, channels[0].shape)
        return np.stack(channels, axis=-1)

    def _refuse_size(self, number: int, found: tuple[int, ...], expected: tuple[int, ...]) -> NoReturn:
        raise DecodeError(
            f"{self._where}: {self._files[-1].name(number)} is {found[1]}x{found[0]}, others are "
            f"{expected[1]}x{expected[0]}; extract the frames again at one size"
        )


def _decode_image(files: FolderFiles | TarFiles, number: int, mode: str) -> npt.NDArray[np.uint8]:
    """Decode one image file to uint8 [H, W, 3] (RGB) or [H, W] (L)."""
    data = files.read(number)
    try:
        with Image.open(io.BytesIO(data), formats=FRAME_FORMATS) as image:
            return np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{files.name(number)} ({len(data)} bytes) can't be decoded: {error}") from error
