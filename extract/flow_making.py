"""Makes the flow that a row's clips need out of pictures that come in order of time, each pair of them once."""

from __future__ import annotations

import numpy as np

from echoshift.extract.optical_flow import FlowComputer
from echoshift.extract.readers.protocol import FrameReader, find_shown_frames
from echoshift.extract.shard_inputs import PictureSource, PictureStretch


def pair_pictures(
    reader: FrameReader, times_s: np.ndarray, shown: np.ndarray, rate_hz: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Find between which two pictures the flow at each time is computed: the one shown then, and the one after it.

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
    """Computes the flow that the clips of one row need from pictures that come in order of time."""

    def __init__(self, source: PictureSource) -> None:
        assert source.flow is not None, "flow that is read isn't made"
        self.source = source
        self._computer = FlowComputer(source.flow)
        self._numbers: dict[tuple[int, int], int] = {}
        self._by_after: dict[int, list[tuple[int, int]]] = {}
        self._last_use: dict[int, int] = {}
        self._held: dict[int, np.ndarray] = {}

    @property
    def needed(self) -> np.ndarray:
        """The pictures that are needed, int64, ascending."""
        return np.array(sorted(self._last_use), dtype=np.int64)

    def add(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Take the pairs of some clips, int64 [n, n_frames] each, and return the number of each one's flow."""
        numbers = np.empty(before.shape, dtype=np.int64)
        for place, pair in zip(np.ndindex(before.shape), zip(before.flat, after.flat, strict=True), strict=True):
            first, second = int(pair[0]), int(pair[1])
            if (first, second) not in self._numbers:
                self._numbers[(first, second)] = len(self._numbers)
                self._by_after.setdefault(second, []).append((first, second))
                for picture in (first, second):
                    self._last_use[picture] = max(self._last_use.get(picture, 0), second)
            numbers[place] = self._numbers[(first, second)]
        return numbers

    def feed(self, row: int, pictures: np.ndarray, numbers: np.ndarray) -> PictureStretch | None:
        """Take pictures and return the flow of the pairs that they complete."""
        made: dict[int, np.ndarray] = {}
        for picture, number in zip(pictures, numbers.tolist(), strict=True):
            if number not in self._last_use:
                continue
            self._held[number] = self._computer.shrink(picture)
            for pair in self._by_after.get(number, ()):
                made[self._numbers[pair]] = self._computer.compute(self._held[pair[0]], self._held[number])
            self._held = {n: gray for n, gray in self._held.items() if self._last_use[n] > number}
        if not made:
            return None
        order = sorted(made)
        return PictureStretch(row, self.source, np.stack([made[n] for n in order]), np.array(order, dtype=np.int64))
