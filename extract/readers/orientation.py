"""Turns decoded pictures upright by the display matrix of their container."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = tuple[int, int, int, int]
UPRIGHT: Matrix = (1, 0, 0, 1)


def get_orientation(frame: Any) -> Matrix:
    """Return the signs (a, b, c, d) of a frame's display matrix: a point (x, y) is shown at (a x + c y, b x + d y).

    x points right and y down; angles are rounded to multiples of 90 degrees.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return UPRIGHT
    values = np.frombuffer(side_data, dtype=np.int32)
    a, b, c, d = (int(values[i]) for i in (0, 1, 3, 4))
    if a == b == c == d == 0:
        return UPRIGHT
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1)
    return (0, 1 if b >= 0 else -1, 1 if c >= 0 else -1, 0)


def compute_rotation_deg(orientation: Matrix) -> int:
    """Compute the clockwise turn of an orientation: 0, 90, 180 or 270 (a mirrored picture may be flipped besides)."""
    a, b, _, _ = orientation
    return round(math.degrees(math.atan2(b, a))) % 360


def turn_upright(image: npt.NDArray[np.uint8], orientation: Matrix) -> npt.NDArray[np.uint8]:
    """Turn and mirrors a picture [H, W, C] as its orientation says; a view where possible."""
    a, b, c, d = orientation
    if b == 0:
        horizontal, vertical = a, d
    else:
        image = image.swapaxes(0, 1)
        horizontal, vertical = c, b
    return image[:: -1 if vertical < 0 else 1, :: -1 if horizontal < 0 else 1]
