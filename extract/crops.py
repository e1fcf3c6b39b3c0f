"""Plans which part of a picture each view of a clip shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from echoshift.extract.random_draws import draw, draw_integer
from echoshift.pipeline.specs import ClipSpec, FrameSpec

N_TRIES = 10


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of a picture, in pixels after its short side was resized to `short_side`.

    A part that isn't crop x crop of the FrameSpec is resized to that; a mirrored one is turned left to right then.
    """

    short_side: int
    top: int
    left: int
    height: int
    width: int
    is_mirrored: bool = False


def plan_resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Compute the (height, width) of a picture whose short side is resized to `short_side`.

    The long side is floor(long * short_side / short), in integers (torchvision's rule, and pytorchvideo's up to the
    rounding of its floats).
    """
    if height <= width:
        return short_side, short_side * width // height
    return short_side * height // width, short_side


def plan_centre_crop(height: int, width: int, crop: int) -> tuple[int, int]:
    """Compute the (top, left) of the centre crop: half of what is left over, rounded down."""
    return (height - crop) // 2, (width - crop) // 2


def plan_crop(
    spec: FrameSpec, clips: ClipSpec, segment_id: str, clip: int, view: int, number: int, height: int, width: int
) -> Crop:
    """Plan crop `number` of one view of one clip, of pictures of height x width (METHODS section 2).

    What is drawn depends on `clips.seed`, the segment and the view, and on the clip where `spec.crop_for` says so.
    """
    name = (clips.seed, segment_id, view, clip if spec.crop_for == "clip" else -1)
    is_mirrored = spec.flip > 0 and draw(*name, "flip") < spec.flip
    short_side = spec.short_side
    if spec.crops == "random" and spec.short_sides is not None:
        smallest, largest = spec.short_sides
        short_side = draw_integer(smallest, largest, *name, "short side")
    height, width = plan_resized_shape(height, width, short_side)
    if spec.crops == "random-resized":
        return Crop(short_side, *_plan_random_box(spec, name, height, width), is_mirrored)
    top, left = plan_centre_crop(height, width, spec.crop)
    if spec.crops == "three" and width >= height:
        left = (0, left, width - spec.crop)[number]
    elif spec.crops == "three":
        top = (0, top, height - spec.crop)[number]
    elif spec.crops == "random":
        top = draw_integer(0, height - spec.crop, *name, "top")
        left = draw_integer(0, width - spec.crop, *name, "left")
    return Crop(short_side, top, left, spec.crop, spec.crop, is_mirrored)


def _plan_random_box(
    spec: FrameSpec, name: tuple[int, str, int, int], height: int, width: int
) -> tuple[int, int, int, int]:
    """Plan (top, left, height, width) of a random-resized crop, by the rule of torchvision's RandomResizedCrop."""
    low, high = spec.area
    log_low, log_high = (math.log(ratio) for ratio in spec.aspect)
    for trial in range(N_TRIES):
        area = height * width * (low + (high - low) * draw(*name, f"area {trial}"))
        aspect = math.exp(log_low + (log_high - log_low) * draw(*name, f"aspect {trial}"))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = draw_integer(0, height - box_height, *name, "top")
            return top, draw_integer(0, width - box_width, *name, "left"), box_height, box_width
    box_width = min(width, round(height * spec.aspect[1]))
    box_height = min(height, round(width / spec.aspect[0]))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return top, left, box_height, box_width
