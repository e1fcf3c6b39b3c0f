"""Draws class activation maps over a clip's frames, with its sound (Planamente et al., Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echoshift.train.pictures.activation_maps import ActivationMap
from echoshift.train.pictures.figures import AUDIO_COLOUR, QUIET_COLOUR, Picture, house_style, make_figure
from echoshift.train.segment_view.view import SegmentSound

N_SHOWN = 6
_OPACITY = 0.65


def overlay_map(pictures: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lay a map over pictures, uint8 [T, H, W, 3]: the more it says, the less of the picture's own colour is left.

    The largest value of the clip is the end of the scale; a map of zeros leaves the pictures as they are.
    """
    from matplotlib import colormaps

    top = float(values.max())
    scaled = values / top if top > 0 else np.zeros_like(values)
    colours = colormaps["inferno"](scaled)[..., :3] * 255
    opacity = (_OPACITY * scaled)[..., None]
    mixed: np.ndarray = np.rint(pictures * (1 - opacity) + colours * opacity).astype(np.uint8)
    return mixed


def draw_activation_maps(
    maps: Sequence[ActivationMap], sound: SegmentSound | None, what: str, n_shown: int = N_SHOWN
) -> Picture:
    """Draw the clip's frames, its sound beneath, and one row of maps a run; `what` names the data set."""
    first = maps[0]
    n_frames = len(first.pictures)
    shown = np.unique(np.linspace(0, n_frames - 1, min(n_shown, n_frames)).round().astype(int))
    with house_style():
        row_in = 9.6 / len(shown) * first.pictures.shape[1] / first.pictures.shape[2]
        heights = [row_in + 0.25, *[row_in + 0.3] * len(maps), 1.1]
        figure = make_figure(9.8, sum(heights) + 0.5)
        labels = ", ".join(first.segment.labels) or "no label"
        figure.suptitle(f"{first.segment.segment_id} ({labels}), {what}", x=0.01, ha="left", fontsize=10)
        rows = np.atleast_1d(np.array(figure.subfigures(len(heights), 1, height_ratios=heights), dtype=object))
        _draw_row(
            rows[0],
            first.pictures[shown],
            "what the network sees",
            [f"{time_s:.2f} s" for time_s in first.times_s[shown]],
        )
        for row, each in zip(rows[1:-1], maps, strict=True):
            title = f"{each.run}: {each.class_name}, {100 * each.probability:.0f} %"
            if not each.values.any():
                title += " (nothing in the clip speaks for it)"
            _draw_row(row, overlay_map(each.pictures, each.values)[shown], title, [""] * len(shown))
        _draw_sound(rows[-1].subplots(), sound, first.times_s)
    numbers = {each.run: {"values": each.values, "class": each.class_name, "layer": each.layer} for each in maps}
    words = "; ".join(f"{each.run} sees {each.class_name}, {100 * each.probability:.0f} percent" for each in maps)
    description = f"Class activation maps over a clip of {first.segment.segment_id} ({labels}), {what}. {words}."
    return Picture(figure, numbers, description)


def _draw_row(part: object, pictures: np.ndarray, title: str, names: Sequence[str]) -> None:
    from matplotlib.figure import SubFigure

    assert isinstance(part, SubFigure), "subfigures gives them"
    part.suptitle(title, x=0.01, ha="left", fontsize=9)
    axes = np.atleast_1d(np.array(part.subplots(1, len(pictures)), dtype=object))
    for axis, picture, name in zip(axes, pictures, names, strict=True):
        axis.imshow(picture, interpolation="bilinear")
        axis.set_title(name, fontsize=8, loc="center")
        axis.set_axis_off()


def _draw_sound(axis: object, sound: SegmentSound | None, times_s: np.ndarray) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes), "subplots gives axes"
    if sound is None:
        axis.text(0, 0.5, "no sound", transform=axis.transAxes, color=QUIET_COLOUR)
        axis.set_axis_off()
        return
    parts = np.array_split(sound.samples, min(2000, len(sound.samples)))
    places_s = np.linspace(sound.start_s, sound.stop_s, len(parts))
    axis.fill_between(places_s, [p.min() for p in parts], [p.max() for p in parts], color=AUDIO_COLOUR, linewidth=0.4)
    axis.axvspan(float(times_s.min()), float(times_s.max()), color=QUIET_COLOUR, alpha=0.15, linewidth=0)
    axis.set_xlim(sound.start_s, sound.stop_s)
    axis.set_xlabel("seconds of the video; grey: the clip")
    axis.set_yticks([])
