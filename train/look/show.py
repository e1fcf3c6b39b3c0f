"""One segment's view as a figure, as lines and as JSON: what `echoshift show` writes and prints."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from echoshift.train.look.figures import (
    AUDIO_COLOUR,
    FRAMES_COLOUR,
    PALETTE,
    QUIET_COLOUR,
    TRUE_COLOUR,
    make_figure,
    plot_style,
)
from echoshift.train.look.segment import Part, SegmentView, ShownPrediction
from echoshift.train.look.segment_media import SegmentAudio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEAKERS = {"audio": "audio, p_a", "frames": "frames, p_v", "recogniser": "recogniser", "alignment": "both modalities"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_ROW_IN, _SENTENCE_IN = 0.21, 0.4
_N_DRAWN_SAMPLES = 2000
_MAX_ROWS, _MAX_CLASSES = 40, 12
_SEGMENT_FIELDS = ("segment_id", "video_id", "start_s", "stop_s", "labels", "domain", "split")


def describe_view(view: SegmentView) -> dict[str, Any]:
    """Describe a view for JSON: everything but the frames, the samples and the values of the spectrogram."""
    audio, spectrogram = view.audio, view.spectrogram
    n_bands, n_frames = (0, 0) if spectrogram is None else spectrogram.values.shape
    return {
        "dataset": view.dataset,
        "synthetic": view.synthetic,
        "segment": {name: getattr(view.segment, name) for name in _SEGMENT_FIELDS},
        "frames": [_describe(frame, "jpeg") for frame in view.frames],
        "audio": audio and {**_describe(audio, "wav", "samples"), "n_samples": len(audio.samples)},
        "spectrogram": spectrogram
        and {**_describe(spectrogram, "values", "png"), "n_bands": n_bands, "n_frames": n_frames},
        "gate": view.gate and {**_describe(view.gate), "groups": [_describe(group) for group in view.gate.groups]},
        "predictions": [
            {
                **_describe(said),
                "probabilities": dict(zip(view.classes, map(float, said.probabilities), strict=True)),
                "top": [score.name for score in said.top],
                "pseudo_label": said.pseudo_label or None,
            }
            for said in view.predictions
        ],
        "missing": dict(view.missing),
    }


def _describe(part: Any, *left_out: str) -> dict[str, Any]:
    return {each.name: getattr(part, each.name) for each in fields(part) if each.name not in left_out}


def list_facts(view: SegmentView) -> list[str]:
    """List what a segment is, and what of it can be seen and heard, a line each."""
    segment, audio, spectrogram = view.segment, view.audio, view.spectrogram
    lines = [
        f"{segment.segment_id}: {', '.join(segment.labels) or 'none'}",
        f"  {view.dataset}, {segment.domain}, {segment.split}; {segment.video_id}, {segment.start_s:g} s to "
        f"{segment.stop_s:g} s ({segment.duration_s:.2f} s)",
    ]
    if view.frames:
        shown = ", ".join(f"{frame.time_s:.3f} s (no. {frame.number})" for frame in view.frames)
        lines.append(f"  frames: {shown}")
    if audio is not None:
        duration_s, level = audio.stop_s - audio.start_s, draw_loudness(audio.samples)
        lines.append(f"  audio: {duration_s:.2f} s, {audio.loudness_dbfs:.1f} dBFS  {level}")
    if spectrogram is not None:
        n_bands, n_frames = spectrogram.values.shape
        lines.append(f"  spectrogram: {n_bands} x {n_frames}, {describe_spectrogram(view)}")
    lines += [f"  {part}: {why}" for part, why in view.missing.items() if part in ("frames", "audio", "spectrogram")]
    return lines


def list_gates(view: SegmentView) -> list[str]:
    """List the gates of a view's attention by path, a line each, or why there are none."""
    if view.gate is None:
        return [view.missing["gate"]] if "gate" in view.missing else []
    lines = [f"gates of {view.gate.run}" + ("" if view.gate.hears else ", those of every segment without sound")]
    for group in view.gate.groups:
        opened, closed = (
            ", ".join(f"{channel} ({group.values[channel]:.2f})" for channel in channels)
            for channels in (group.most_open, group.most_closed)
        )
        lines.append(
            f"  {group.name}: {len(group.values)} channels, mean {group.mean:.3f}, spread {group.spread:.3f}  "
            f"{draw_counts(group.values)}"
        )
        lines.append(f"    most open {opened}; most closed {closed}")
    return lines


def list_predictions(view: SegmentView, n_top: int) -> tuple[list[str], list[list[str]]]:
    """List what runs take a segment for: the header and a row a prediction; a star marks the label."""
    header = ["run", "who says it", "is to it", *(f"{i}." for i in range(1, n_top + 1)), "result", "pseudo-label"]
    rows = []
    for said in view.predictions:
        top = [f"{score.name}{'*' if score.is_true else ''} {100 * score.probability:.1f}" for score in said.top]
        result = {True: "right", False: "wrong", None: ""}[said.is_right]
        top += [""] * (n_top - len(top))
        rows.append([said.run, SPEAKERS[said.speaker], said.role, *top, result, said.pseudo_label])
    return header, rows


def describe_spectrogram(view: SegmentView) -> str:
    """Describe whose input the spectrogram is, and how much of it isn't the segment's own."""
    spectrogram = view.spectrogram
    assert spectrogram is not None, "asked for where there is one"
    whose = f"as {spectrogram.encoder} hears it" if spectrogram.encoder else f"recipe {spectrogram.recipe}"
    n_other = spectrogram.values.shape[1] - spectrogram.n_own_frames
    if not n_other:
        return whose
    then = "are of zeros" if spectrogram.recipe == "planamente2021" else "repeat the segment"
    return f"{whose}; its last {n_other} frames {then}"


def draw_loudness(samples: np.ndarray, n_columns: int = 32) -> str:
    """Draw the level over time in characters: 60 dB below the loudest column is the lowest."""
    parts = np.array_split(np.asarray(samples, dtype=np.float64), n_columns)
    power = np.array([np.mean(part**2) if len(part) else 0.0 for part in parts])
    level_db = 10 * np.log10(np.maximum(power / max(power.max(), 1e-30), 1e-6))
    return "".join(_BLOCKS[round((db + 60) / 60 * (len(_BLOCKS) - 1))] for db in level_db)


def draw_counts(values: np.ndarray, n_bins: int = 16) -> str:
    """Draw a histogram of values between 0 and 1 in characters; a blank is an empty bin."""
    counts, _ = np.histogram(values, bins=n_bins, range=(0, 1))
    top = max(int(counts.max()), 1)
    return "".join(" " if n == 0 else _BLOCKS[round(n / top * (len(_BLOCKS) - 1))] for n in counts)


def draw_segment(view: SegmentView) -> Figure:
    """Draw a view; a part that isn't there is its sentence. Of more than 40 predictions the first 40 are drawn."""
    shown = view.predictions[:_MAX_ROWS]
    of_audio_in = [1.75 if view.spectrogram else _SENTENCE_IN, 1.15 if view.audio else _SENTENCE_IN]
    heights = [
        1.75 if view.frames else _SENTENCE_IN,
        sum(of_audio_in),
        1.6 if view.gate else _SENTENCE_IN,
        max(1.0, 0.5 + _ROW_IN * len(shown)) if shown else _SENTENCE_IN,
    ]
    segment = view.segment
    title = (
        f"{segment.segment_id}: {', '.join(segment.labels) or 'no label'}\n{view.dataset}"
        f"{' (synthetic)' if view.synthetic else ''}, {segment.domain}, {segment.split}; {segment.video_id}, "
        f"{segment.start_s:g} to {segment.stop_s:g} s"
    )
    with plot_style():
        figure = make_figure(11.0, sum(heights) + 0.9, title)
        rows: Any = figure.subfigures(4, 1, height_ratios=heights)
        _draw_frames(rows[0], view)
        is_shared = view.audio is not None and view.spectrogram is not None
        axes = rows[1].subplots(2, 1, sharex=is_shared, height_ratios=of_audio_in)
        _draw_spectrogram(axes[0], view)
        if view.audio is None:
            _say(axes[1], view, "audio")
        else:
            draw_waveform(axes[1], view.audio)
            axes[1].set_title(f"audio, {view.audio.loudness_dbfs:.1f} dBFS")
        _draw_gates(rows[2], view)
        _draw_predictions(rows[3].subplots(), view, shown)
    return figure


def draw_waveform(axis: Any, audio: SegmentAudio) -> None:
    """Draw the lowest and highest sample of each of up to 2,000 stretches."""
    parts = np.array_split(audio.samples, min(_N_DRAWN_SAMPLES, len(audio.samples)))
    times_s = np.linspace(audio.start_s, audio.stop_s, len(parts))
    axis.fill_between(times_s, [p.min() for p in parts], [p.max() for p in parts], color=AUDIO_COLOUR, linewidth=0.4)
    axis.set_xlim(audio.start_s, audio.stop_s)
    axis.set_xlabel("seconds of the video")


def _draw_frames(part: Any, view: SegmentView) -> None:
    if not view.frames:
        _say(part.subplots(), view, "frames")
        return
    from PIL import Image

    for axis, frame in zip(np.atleast_1d(part.subplots(1, len(view.frames))), view.frames, strict=True):
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
    axis.set_title(f"log spectrogram, {describe_spectrogram(view)}")
    axis.set_xlim(view.segment.start_s, max(spectrogram.stop_s, view.segment.start_s + 1e-3))
    axis.tick_params(labelbottom=view.audio is None)


def _draw_gates(part: Any, view: SegmentView) -> None:
    gate = view.gate
    if gate is None:
        _say(part.subplots(), view, "gate")
        return
    of_silence = "" if gate.hears else "; no sound: those of every silent segment"
    part.suptitle(f"gates of {gate.run}{of_silence}", x=0.01, ha="left", fontsize=9.5)
    for axis, group in zip(np.atleast_1d(part.subplots(1, len(gate.groups))), gate.groups, strict=True):
        axis.hist(group.values, bins=25, range=(0, 1), color=FRAMES_COLOUR)
        axis.axvline(group.mean, color=PALETTE[5], linewidth=1)
        opened, closed = (", ".join(map(str, channels)) for channels in (group.most_open, group.most_closed))
        axis.set_title(f"{group.name}: {len(group.values)} channels, mean {group.mean:.2f}, spread {group.spread:.2f}")
        axis.set_xlabel(f"gate (most open: channels {opened}; most closed: {closed})", fontsize=8)
        axis.set_ylabel("channels")
        axis.set_xlim(0, 1)


def _draw_predictions(axis: Any, view: SegmentView, shown: Sequence[ShownPrediction]) -> None:
    """Draw one row a prediction and one column a class: the darker, the more probable; a frame marks the label."""
    if not shown:
        _say(axis, view, "predictions")
        return
    from matplotlib.patches import Rectangle

    columns = choose_classes(view, shown)
    classes = [view.classes[i] for i in columns]
    table = np.stack([said.probabilities for said in shown])[:, columns]
    n_rows, n_classes = table.shape
    axis.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    names = [f"{p.run}: {SPEAKERS[p.speaker]}" + (f" [{p.pseudo_label}]" if p.pseudo_label else "") for p in shown]
    axis.set_yticks(range(n_rows), names, fontsize=7)
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 12 else {}
    axis.set_xticks(range(n_classes), [textwrap.shorten(name, 40) for name in classes], fontsize=8, **slanted)
    frame: dict[str, Any] = {"fill": False, "edgecolor": TRUE_COLOUR, "linewidth": 2, "clip_on": False}
    for column, (tick, name) in enumerate(zip(axis.get_xticklabels(), classes, strict=True)):
        if name in view.segment.labels:
            axis.add_patch(Rectangle((column - 0.5, -0.5), 1, n_rows, **frame))
            tick.set(color=TRUE_COLOUR, fontweight="bold")
    more = "" if len(shown) == len(view.predictions) else f"; the first {len(shown)} of {len(view.predictions)} runs"
    more += "" if n_classes == len(view.classes) else f"; {n_classes} of {len(view.classes)} classes"
    axis.set_title(f"probabilities, percent; the frame is the label, [in brackets] the pseudo-label{more}")
    axis.tick_params(length=0)


def choose_classes(view: SegmentView, shown: Sequence[ShownPrediction]) -> list[int]:
    """Choose the classes that are drawn, in index order: the segment's own, and those that are most probable."""
    if len(view.classes) <= _MAX_CLASSES:
        return list(range(len(view.classes)))
    own = [i for i, name in enumerate(view.classes) if name in view.segment.labels][:_MAX_CLASSES]
    most = np.stack([said.probabilities for said in shown]).max(axis=0)
    others = [i for i in np.argsort(-most, kind="stable").tolist() if i not in own]
    return sorted([*own, *others[: _MAX_CLASSES - len(own)]])


def _say(axis: Any, view: SegmentView, part: Part) -> None:
    """Write the sentence that says why a part isn't there."""
    sentence = textwrap.fill(f"{part}: {view.missing.get(part, 'not read.')}", 130)
    axis.text(0, 0.5, sentence, transform=axis.transAxes, va="center", fontsize=8.5, color=QUIET_COLOUR)
    axis.set_axis_off()
