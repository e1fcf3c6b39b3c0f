"""Computes optical flow between pictures with OpenCV, clipped and quantised as flow networks were trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2 as opencv
import numpy as np
import numpy.typing as npt

from echoshift.extract.crops import plan_resized_shape

cv2: Any = opencv  # its annotations lack the contributed modules
Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FlowMethod:
    """How flow is computed: by which method, at which short side, clipped to +-`bound_px` pixels.

    TV-L1 is OpenCV's `DualTVL1OpticalFlow` with its defaults, DIS its `DISOpticalFlow` with the preset MEDIUM.
    """

    name: Literal["tvl1", "dis"]
    short_side: int
    bound_px: float


class FlowComputer:
    """Computes flow by one method; is used by one thread."""

    def __init__(self, method: FlowMethod) -> None:
        self._method = method
        cv2.setNumThreads(1)  # DIS works in stripes, one a thread: its result would depend on their number
        self._algorithm: Any = (
            cv2.optflow.DualTVL1OpticalFlow_create()
            if method.name == "tvl1"
            else cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        )

    def shrink(self, picture: npt.NDArray[np.uint8]) -> Gray:
        """Turn an RGB picture [H, W, 3] into gray of the method's size, uint8 [h, w]."""
        gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        height, width = plan_resized_shape(gray.shape[0], gray.shape[1], self._method.short_side)
        if gray.shape == (height, width):
            return np.asarray(gray, dtype=np.uint8)
        shrinks = height < gray.shape[0]
        resized = cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return np.asarray(resized, dtype=np.uint8)

    def compute(self, before: Gray, after: Gray) -> npt.NDArray[np.uint8]:
        """Compute the flow from one gray picture to the next, quantised, uint8 [h, w, 2] with channels u, v."""
        return quantise_flow(self._algorithm.calc(before, after, None), self._method.bound_px)


def quantise_flow(flow_px: npt.NDArray[np.float32], bound_px: float) -> npt.NDArray[np.uint8]:
    """Clip flow to +-bound_px and maps it evenly to 0..255, so that no motion is 128 (rounded from 127.5)."""
    clipped = np.clip(flow_px, -bound_px, bound_px)
    return np.rint(clipped * (127.5 / bound_px) + 127.5).astype(np.uint8)
