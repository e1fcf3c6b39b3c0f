"""Draws the view of a segment as one picture: frames, spectrogram, waveform, gates, predictions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from echoshift.train.pictures.figures import (
    AUDIO_COLOUR,
    PALETTE,
    QUIET_COLOUR,
    TRUE_COLOUR,
    VISUAL_COLOUR,
    house_style,
    make_figure,
)
from echoshift.train.segment_view.describing import SPEAKERS, describe_hearer
from echoshift.train.segment_view.view import Part, SegmentPrediction, SegmentView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH_IN = 11.0
_ROW_IN = 0.21
_SENTENCE_IN = 0.4
_N_GATE_BINS = 25
_N_DRAWN_SAMPLES = 2000
_MAX_ROWS = 40
_MAX_CLASSES = 12


def draw_segment(view: SegmentView) -> Figure:
    """Draw a view; a part that isn't there is its sentence. Of more than 40 predictions the first 40 are drawn."""
    shown = view.predictions[:_MAX_ROWS]
    of_sound_in = [1.75 if view.spectrogram else _SENTENCE_IN, 1.15 if view.sound else _SENTENCE_IN]
    heights = [
        1.75 if view.frames else _SENTENCE_IN,
        sum(of_sound_in),
        1.6 if view.gate else _SENTENCE_IN,
        max(1.0, 0.5 + _ROW_IN * len(shown)) if shown else _SENTENCE_IN,
    ]
    with house_style():
        figure = make_figure(_WIDTH_IN, sum(heights) + 0.9)
        figure.suptitle(_make_title(view), x=0.01, ha="left", fontsize=11)
        rows: Any = figure.subfigures(4, 1, height_ratios=heights)
        _draw_frames(rows[0], view)
        is_shared = view.sound is not None and view.spectrogram is not None
        of_sound = rows[1].subplots(2, 1, sharex=is_shared, height_ratios=of_sound_in)
        _draw_spectrogram(of_sound[0], view)
        _draw_waveform(of_sound[1], view)
        _draw_gates(rows[2], view)
        _draw_predictions(rows[3].subplots(), view, shown)
    return figure


def _make_title(view: SegmentView) -> str:
    segment = view.segment
    synthetic = " (synthetic)" if view.synthetic else ""
    return (
        f"{segment.segment_id}: {', '.join(segment.labels) or 'no label'}\n{view.dataset}{synthetic}, "
        f"{segment.domain}, {segment.split}; {segment.video_id}, {segment.start_s:g} to {segment.stop_s:g} s"
    )


def _draw_frames(part: Any, view: SegmentView) -> None:
    if not view.frames:
        _say(part.subplots(), view, "frames")
        return
    from PIL import Image

    axes = np.atleast_1d(part.subplots(1, len(view.frames)))
    for axis, frame in zip(axes, view.frames, strict=True):
        axis.imshow(np.asarray(Image.open(io.BytesIO(frame.jpeg))), interpolation="bilinear")
        axis.set_title(f"{frame.time_s:.2f} s", fontsize=8, loc="center")
        axis.set_axis_off()


def _draw_spectrogram(axis: Any, view: SegmentView) -> None:
    spectrogram = view.spectrogram
    if spectrogram is None:
        _say(axis, view, "spectrogram")
        return
    values = spectrogram.values[:, : spectrogram.n_own_frames]
    low, high = np.percentile(values, (1.0, 99.5))
    top = values.shape[0] if spectrogram.is_mel else spectrogram.top_hz / 1000
    extent = (spectrogram.start_s, spectrogram.stop_s, 0, top)
    axis.imshow(values, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, extent=extent)
    axis.set_ylabel("mel band" if spectrogram.is_mel else "kHz")
    axis.set_title(f"log spectrogram, {describe_hearer(view)}")
    axis.set_xlim(view.segment.start_s, max(spectrogram.stop_s, view.segment.start_s + 1e-3))
    axis.tick_params(labelbottom=view.sound is None)


def _draw_waveform(axis: Any, view: SegmentView) -> None:
    sound = view.sound
    if sound is None:
        _say(axis, view, "sound")
        return
    n_columns = min(_N_DRAWN_SAMPLES, len(sound.samples))
    parts = np.array_split(sound.samples, n_columns)
    times_s = np.linspace(sound.start_s, sound.stop_s, n_columns)
    lows, highs = [part.min() for part in parts], [part.max() for part in parts]
    axis.fill_between(times_s, lows, highs, color=AUDIO_COLOUR, linewidth=0.4)
    axis.set_xlim(view.segment.start_s, sound.stop_s)
    axis.set_xlabel("seconds of the video")
    axis.set_title(f"sound, {sound.loudness_dbfs:.1f} dBFS")


def _draw_gates(part: Any, view: SegmentView) -> None:
    gate = view.gate
    if gate is None:
        _say(part.subplots(), view, "gate")
        return
    of_silence = "" if gate.hears else "; no sound: those of every silent segment"
    part.suptitle(f"gates of {gate.run}{of_silence}", x=0.01, ha="left", fontsize=9.5)
    for axis, group in zip(np.atleast_1d(part.subplots(1, len(gate.groups))), gate.groups, strict=True):
        axis.hist(group.values, bins=_N_GATE_BINS, range=(0, 1), color=VISUAL_COLOUR)
        axis.axvline(group.mean, color=PALETTE[5], linewidth=1)
        opened = ", ".join(str(channel.number) for channel in group.most_open)
        closed = ", ".join(str(channel.number) for channel in group.most_closed)
        axis.set_title(f"{group.name}: {len(group.values)} channels, mean {group.mean:.2f}, spread {group.spread:.2f}")
        axis.set_xlabel(f"gate (most open: channels {opened}; most closed: {closed})", fontsize=8)
        axis.set_ylabel("channels")
        axis.set_xlim(0, 1)


def _draw_predictions(axis: Any, view: SegmentView, shown: tuple[SegmentPrediction, ...]) -> None:
    """Draw one row a prediction and one column a class: the darker, the more probable; a frame marks the label."""
    if not shown:
        _say(axis, view, "predictions")
        return
    from matplotlib.patches import Rectangle

    columns = choose_classes(view, shown)
    classes = [view.classes[i] for i in columns]
    table = np.stack([prediction.probabilities for prediction in shown])[:, columns]
    n_rows, n_classes = table.shape
    axis.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    for column, name in enumerate(classes):
        if name in view.segment.labels:
            axis.add_patch(
                Rectangle(
                    (column - 0.5, -0.5), 1, n_rows, fill=False, edgecolor=TRUE_COLOUR, linewidth=2, clip_on=False
                )
            )
    names = [f"{p.run}: {SPEAKERS[p.speaker]}" + (f" [{p.pseudo_label}]" if p.pseudo_label else "") for p in shown]
    axis.set_yticks(range(n_rows), names, fontsize=7)
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 12 else {}
    axis.set_xticks(range(n_classes), [textwrap.shorten(name, 40) for name in classes], fontsize=8, **slanted)
    for tick, name in zip(axis.get_xticklabels(), classes, strict=True):
        if name in view.segment.labels:
            tick.set_color(TRUE_COLOUR)
            tick.set_fontweight("bold")
    more = "" if len(shown) == len(view.predictions) else f"; the first {len(shown)} of {len(view.predictions)} runs"
    more += "" if n_classes == len(view.classes) else f"; {n_classes} of {len(view.classes)} classes"
    axis.set_title(f"probabilities, percent; the frame is the label, [in brackets] the pseudo-label{more}")
    axis.tick_params(length=0)


def choose_classes(view: SegmentView, shown: Sequence[SegmentPrediction]) -> list[int]:
    """Choose the classes that are drawn, in index order: the segment's own, and those that predictions say most."""
    if len(view.classes) <= _MAX_CLASSES:
        return list(range(len(view.classes)))
    own = [i for i, name in enumerate(view.classes) if name in view.segment.labels][:_MAX_CLASSES]
    most = np.stack([prediction.probabilities for prediction in shown]).max(axis=0)
    others = [i for i in np.argsort(-most, kind="stable").tolist() if i not in own]
    return sorted([*own, *others[: _MAX_CLASSES - len(own)]])


def _say(axis: Any, view: SegmentView, part: Part) -> None:
    """Write the sentence that says why a part isn't there."""
    sentence = textwrap.fill(f"{part}: {view.missing.get(part, 'not read.')}", 130)
    axis.text(0, 0.5, sentence, transform=axis.transAxes, va="center", fontsize=8.5, color=QUIET_COLOUR)
    axis.set_axis_off()
