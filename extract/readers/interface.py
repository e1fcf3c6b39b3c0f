"""What every reader of frames offers, and the clock that all readers share.

Time zero is the container's start time (what players show and `ffmpeg -ss` counts from), for frames and audio alike;
frames that lie loose start at zero by their number. The frame at time t is the last one shown at or before t + 1 ms
(1 ms: containers such as Matroska round their time stamps to that); before the first frame it is the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from echoshift.pipeline.errors import SegmentOutsideVideoError

TIME_TOLERANCE_S = 1e-3


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The facts of a video's frames.

    Attributes:
        n_frames: shown frames.
        duration_s: when the last frame ends, on the shared clock.
        rate_hz: mean frame rate.
        height, width: of the frames as returned, after rotation.
        rotation_deg: clockwise turn that was applied to show the frames upright: 0, 90, 180 or 270.
    """

    n_frames: int
    duration_s: float
    rate_hz: float
    height: int
    width: int
    rotation_deg: int = 0


class FrameReader:
    """The frames of one video by time; is used by one thread, and closed by `close` or a `with` block.

    `frame_times_s` is when each frame is first shown, ascending, float64 [n_frames].
    """

    frame_times_s: npt.NDArray[np.float64]

    @cached_property
    def info(self) -> VideoInfo:
        """The video's facts."""
        raise NotImplementedError

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times (any order, repeats allowed), uint8 [T, H, W, C].

        C is 3 (RGB), or 2 for flow (u, v). Raises DecodeError if a frame can't be decoded whole, and
        SegmentOutsideVideoError for a time more than 1 ms past the last frame's end.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the file and the decoder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def find_shown_frames(frame_times_s: npt.NDArray[np.float64], times_s: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Find the index of the frame shown at each time, int64 of the shape of `times_s`."""
    times = np.asarray(times_s, dtype=np.float64)
    return np.maximum(np.searchsorted(frame_times_s, times + TIME_TOLERANCE_S, side="right") - 1, 0)


def check_times(times_s: npt.ArrayLike, duration_s: float, path: Path) -> npt.NDArray[np.float64]:
    """Check that times lie before the end, float64 [T]; raises SegmentOutsideVideoError if one is past it (or NaN)."""
    times = np.asarray(times_s, dtype=np.float64).reshape(-1)
    outside = ~(times <= duration_s + TIME_TOLERANCE_S)
    if outside.any():
        raise SegmentOutsideVideoError(
            f"{path} ends at {duration_s:.3f} s, a frame is asked for at {times[outside][0]:.3f} s; "
            "check the segment's times"
        )
    return times
