"""Reads optical flow that lies as gray images in `u/` and `v/`, in a folder or in one tar a video."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from echoshift.extract.readers.frame_folder import FolderFiles
from echoshift.extract.readers.frame_tar import TarFiles
from echoshift.extract.readers.numbered_images import NumberedFiles, NumberedFrameReader
from echoshift.pipeline.errors import DecodeError


class FlowImageReader(NumberedFrameReader):
    """Reads flow by time, uint8 [T, H, W, 2] with channels u, v (protocol `FrameReader`).

    `path` is a folder with `u/` and `v/`, or a .tar whose members lie in folders of those names.
    Raises DecodeError if u and v don't have the same frames.
    """

    def __init__(self, path: Path, pattern: str, rate_hz: float, n_first: float = 1) -> None:
        with ExitStack() as stack:
            u = _open_channel(path, pattern, "u")
            stack.callback(u.close)
            v = _open_channel(path, pattern, "v")
            stack.callback(v.close)
            if not np.array_equal(u.numbers, v.numbers):
                odd = int(np.setxor1d(u.numbers, v.numbers)[0])
                lacking = v if odd in u.numbers else u
                raise DecodeError(
                    f"{path} has {len(u.numbers)} frames of u and {len(v.numbers)} of v; the first that lacks its "
                    f"partner is {lacking.name(odd)}: extract the flow again"
                )
            super().__init__((u, v), path, rate_hz, n_first)
            stack.pop_all()


def _open_channel(path: Path, pattern: str, channel: str) -> NumberedFiles:
    return FolderFiles(path / channel, pattern) if path.is_dir() else TarFiles(path, pattern, folder=channel)
