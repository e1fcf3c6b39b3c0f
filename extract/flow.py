"""Computes optical flow between frames with OpenCV, clipped and quantised as flow networks were trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2 as opencv
import numpy as np
import numpy.typing as npt

from echoshift.extract.clips import plan_resized_shape
from echoshift.extract.readers.interface import FrameReader, find_shown_frames

cv2: Any = opencv  # its annotations lack the contributed modules
Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FlowMethod:
    """A way of computing flow: the algorithm, the short side of its frames, and the bound, +-`bound_px` pixels.

    TV-L1 is OpenCV's `DualTVL1OpticalFlow` with its defaults, DIS its `DISOpticalFlow` with the preset MEDIUM.
    """

    name: Literal["tvl1", "dis"]
    short_side: int
    bound_px: float


class FlowComputer:
    """One method of computing flow; is used by one thread."""

    def __init__(self, method: FlowMethod) -> None:
        self._method = method
        cv2.setNumThreads(1)  # DIS works in stripes, one a thread: its result would depend on their number
        self._algorithm: Any = (
            cv2.optflow.DualTVL1OpticalFlow_create()
            if method.name == "tvl1"
            else cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        )

    def shrink(self, frame: npt.NDArray[np.uint8]) -> Gray:
        """Turn an RGB frame [H, W, 3] into gray of the method's size, uint8 [h, w]."""
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        height, width = plan_resized_shape(gray.shape[0], gray.shape[1], self._method.short_side)
        if gray.shape == (height, width):
            return np.asarray(gray, dtype=np.uint8)
        shrinks = height < gray.shape[0]
        resized = cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return np.asarray(resized, dtype=np.uint8)

    def compute(self, before: Gray, after: Gray) -> npt.NDArray[np.uint8]:
        """Compute the flow from one gray frame to the next, quantised, uint8 [h, w, 2] with channels u, v."""
        return quantise_flow(self._algorithm.calc(before, after, None), self._method.bound_px)


def quantise_flow(flow_px: npt.NDArray[np.float32], bound_px: float) -> npt.NDArray[np.uint8]:
    """Clip flow to +-bound_px and map it evenly to 0..255, so that no motion is 128 (rounded from 127.5)."""
    clipped = np.clip(flow_px, -bound_px, bound_px)
    return np.rint(clipped * (127.5 / bound_px) + 127.5).astype(np.uint8)


def pair_frames(
    reader: FrameReader, times_s: np.ndarray, shown: np.ndarray, rate_hz: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Find between which two frames the flow at each time is computed: the one shown then, and the one after it.

    The one after is shown 1 / rate_hz later, and is at least the next one; at the end of the video the last one and
    the one before it are taken.
    """
    last = len(reader.frame_times_s) - 1
    step_s = 0.0 if rate_hz is None else 1 / rate_hz
    after = np.maximum(find_shown_frames(reader.frame_times_s, times_s + step_s), shown + 1)
    after = np.minimum(after, last)
    before = np.where(after > shown, shown, np.maximum(after - 1, 0))
    return before, after


class FlowMaker:
    """The flow of one row's clips, computed from frames that come in order of time, each pair of them once."""

    def __init__(self, method: FlowMethod) -> None:
        self.method = method
        self._computer = FlowComputer(method)
        self._numbers: dict[tuple[int, int], int] = {}
        self._by_after: dict[int, list[tuple[int, int]]] = {}
        self._last_use: dict[int, int] = {}
        self._held: dict[int, Gray] = {}

    @property
    def needed(self) -> np.ndarray:
        """The frames that are needed, int64, ascending."""
        return np.array(sorted(self._last_use), dtype=np.int64)

    def add(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Take the pairs of some clips, int64 [n, n_frames] each, and return the number of each one's flow."""
        numbers = np.empty(before.shape, dtype=np.int64)
        for place, pair in zip(np.ndindex(before.shape), zip(before.flat, after.flat, strict=True), strict=True):
            first, second = int(pair[0]), int(pair[1])
            if (first, second) not in self._numbers:
                self._numbers[(first, second)] = len(self._numbers)
                self._by_after.setdefault(second, []).append((first, second))
                for frame in (first, second):
                    self._last_use[frame] = max(self._last_use.get(frame, 0), second)
            numbers[place] = self._numbers[(first, second)]
        return numbers

    def feed(self, frames: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Take frames; return the flow of the pairs that they complete, uint8 [n, h, w, 2], and its numbers [n]."""
        made: dict[int, np.ndarray] = {}
        for frame, number in zip(frames, numbers.tolist(), strict=True):
            if number not in self._last_use:
                continue
            self._held[number] = self._computer.shrink(frame)
            for pair in self._by_after.get(number, ()):
                made[self._numbers[pair]] = self._computer.compute(self._held[pair[0]], self._held[number])
            self._held = {n: gray for n, gray in self._held.items() if self._last_use[n] > number}
        if not made:
            return None
        order = sorted(made)
        return np.stack([made[n] for n in order]), np.array(order, dtype=np.int64)
