"""Reads pictures that lie in a folder as one image file a frame (EPIC's `frame_%010d.jpg`)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from echoshift.extract.readers.numbered_images import NumberedFrameReader, compile_frame_pattern
from echoshift.pipeline.errors import DecodeError, MediaNotFoundError


class FolderFiles:
    """The image files of one folder by number (protocol `NumberedFiles`)."""

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
        path = self.get_path(number)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DecodeError(f"{path} can't be read: {error.strerror}") from error

    def name(self, number: int) -> str:
        """Return a file's path."""
        return str(self.get_path(number))

    def get_path(self, number: int) -> Path:
        """Return the path of a frame's file, whether it is there or not."""
        return self._folder / (self._pattern % number)

    def close(self) -> None:
        """Have nothing to give back: each file is opened on its own."""


class FrameFolderReader(NumberedFrameReader):
    """Reads the frames of one folder by time, uint8 RGB (protocol `FrameReader`).

    Raises MediaNotFoundError without the folder, DecodeError if no file matches the pattern.
    """

    def __init__(self, folder: Path, pattern: str, rate_hz: float, n_first: float = 1) -> None:
        super().__init__((FolderFiles(folder, pattern),), folder, rate_hz, n_first)
