"""Reads pictures that lie in one uncompressed .tar a video, one image file a frame, without unpacking it."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from echoshift.extract.readers.numbered_images import NumberedFrameReader, compile_frame_pattern
from echoshift.pipeline.errors import DecodeError, MediaNotFoundError


class TarFiles:
    """The image files of one tar by number (protocol `NumberedFiles`); members may lie in any folder.

    With `folder` only members whose own folder has that name count (flow: `u`, `v`).
    Raises MediaNotFoundError without the file; DecodeError if it is no plain tar, is cut short, or has a number twice.
    """

    def __init__(self, path: Path, pattern: str, folder: str | None = None) -> None:
        self._path, self._pattern, self._folder = path, pattern, folder
        found = _index_members(path, pattern, folder)
        self.numbers: npt.NDArray[np.int64] = np.array(sorted(found), dtype=np.int64)
        self._spans = np.array([found[int(number)] for number in self.numbers], dtype=np.int64).reshape(-1, 2)
        self._file = path.open("rb")

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
        """Return back the file handle."""
        self._file.close()


class FrameTarReader(NumberedFrameReader):
    """Reads the frames of one tar by time, uint8 RGB (protocol `FrameReader`); its index is built once, when made."""

    def __init__(self, path: Path, pattern: str, rate_hz: float, n_first: float = 1) -> None:
        files = TarFiles(path, pattern)
        try:
            super().__init__((files,), path, rate_hz, n_first)
        except BaseException:
            files.close()
            raise


def _index_members(path: Path, pattern: str, folder: str | None) -> dict[int, tuple[int, int]]:
    """Map a frame's number to the (offset, size) of its bytes."""
    regex = compile_frame_pattern(pattern)
    found: dict[int, tuple[int, int]] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                vars(tar)["members"].clear()  # tarfile keeps every header otherwise
                name = PurePosixPath(member.name)
                match = regex.fullmatch(name.name)
                if match is None or not member.isreg() or (folder is not None and name.parent.name != folder):
                    continue
                number = int(match[1])
                if pattern % number != match[0]:
                    continue
                if number in found:
                    raise DecodeError(f"{path} holds {match[0]} twice, in different folders; make one tar a video")
                found[number] = (member.offset_data, member.size)
    except FileNotFoundError as error:
        raise MediaNotFoundError(f"{path}: no such file") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DecodeError(f"{path} is no whole, uncompressed tar: {error}; fetch or make it again") from error
    return found
