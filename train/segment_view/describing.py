"""Writes a segment's view as JSON, and as lines for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from echoshift.train.segment_view.view import ClassScore, GateGroup, SegmentPrediction, SegmentView

_BLOCKS = "▁▂▃▄▅▆▇█"
SPEAKERS = {
    "sound": "sound, p_a",
    "pictures": "pictures, p_v",
    "recogniser": "recogniser",
    "alignment": "both modalities",
}


def make_view_json(view: SegmentView) -> dict[str, Any]:
    """Make JSON of a view: everything but the pictures, the samples and the values of the spectrogram."""
    segment, sound, spectrogram, gate = view.segment, view.sound, view.spectrogram, view.gate
    return {
        "dataset": view.dataset,
        "synthetic": view.synthetic,
        "segment": {
            "segment_id": segment.segment_id,
            "video_id": segment.video_id,
            "start_s": segment.start_s,
            "stop_s": segment.stop_s,
            "labels": list(segment.labels),
            "domain": segment.domain,
            "split": segment.split,
        },
        "frames": [
            {"time_s": frame.time_s, "number": frame.number, "width_px": frame.width_px, "height_px": frame.height_px}
            for frame in view.frames
        ],
        "sound": None
        if sound is None
        else {
            "rate_hz": sound.rate_hz,
            "n_samples": len(sound.samples),
            "start_s": sound.start_s,
            "stop_s": sound.stop_s,
            "loudness_dbfs": sound.loudness_dbfs,
        },
        "spectrogram": None
        if spectrogram is None
        else {
            "encoder": spectrogram.encoder,
            "recipe": spectrogram.recipe,
            "n_bands": spectrogram.values.shape[0],
            "n_frames": spectrogram.values.shape[1],
            "n_own_frames": spectrogram.n_own_frames,
            "start_s": spectrogram.start_s,
            "stop_s": spectrogram.stop_s,
        },
        "gate": None
        if gate is None
        else {
            "run": gate.run,
            "checkpoint": str(gate.checkpoint),
            "hears": gate.hears,
            "groups": [_describe_group(group) for group in gate.groups],
        },
        "predictions": [_describe_prediction(prediction, view.classes) for prediction in view.predictions],
        "missing": dict(view.missing),
    }


def list_facts(view: SegmentView) -> list[str]:
    """List what a segment is, and what of it can be seen and heard, a line each."""
    segment = view.segment
    labels = ", ".join(segment.labels) or "none"
    lines = [
        f"{segment.segment_id}: {labels}",
        f"  {view.dataset}, {segment.domain}, {segment.split}; {segment.video_id}, {segment.start_s:g} s to "
        f"{segment.stop_s:g} s ({segment.duration_s:.2f} s)",
    ]
    if view.frames:
        shown = ", ".join(f"{frame.time_s:.3f} s (no. {frame.number})" for frame in view.frames)
        lines.append(f"  frames: {shown}")
    if view.sound is not None:
        lines.append(
            f"  sound: {view.sound.stop_s - view.sound.start_s:.2f} s, {view.sound.loudness_dbfs:.1f} dBFS  "
            f"{draw_loudness(view.sound.samples)}"
        )
    if view.spectrogram is not None:
        n_bands, n_frames = view.spectrogram.values.shape
        lines.append(f"  spectrogram: {n_bands} x {n_frames}, {describe_hearer(view)}")
    lines += [f"  {part}: {view.missing[part]}" for part in ("frames", "sound", "spectrogram") if part in view.missing]
    return lines


def list_gates(view: SegmentView) -> list[str]:
    """List the gates of a view's attention by path, a line each, or why there are none."""
    if view.gate is None:
        return [view.missing["gate"]] if "gate" in view.missing else []
    lines = [f"gates of {view.gate.run}" + ("" if view.gate.hears else ", those of every segment without sound")]
    for group in view.gate.groups:
        opened = ", ".join(f"{channel.number} ({channel.value:.2f})" for channel in group.most_open)
        closed = ", ".join(f"{channel.number} ({channel.value:.2f})" for channel in group.most_closed)
        lines.append(
            f"  {group.name}: {len(group.values)} channels, mean {group.mean:.3f}, spread {group.spread:.3f}  "
            f"{draw_histogram(group.values)}"
        )
        lines.append(f"    most open {opened}; most closed {closed}")
    return lines


def describe_hearer(view: SegmentView) -> str:
    """Describe whose input the spectrogram is, and how much of it isn't the segment's own."""
    spectrogram = view.spectrogram
    assert spectrogram is not None, "asked for where there is one"
    whose = f"as {spectrogram.encoder} hears it" if spectrogram.encoder else f"recipe {spectrogram.recipe}"
    n_frames = spectrogram.values.shape[1]
    if spectrogram.n_own_frames < n_frames:
        then = "are of zeros" if spectrogram.recipe == "planamente2021" else "repeat the segment"
        return f"{whose}; its last {n_frames - spectrogram.n_own_frames} frames {then}"
    return whose


def write_score(score: ClassScore) -> str:
    """Write a class with its probability in percent; a star marks the true one."""
    return f"{score.name}{'*' if score.is_true else ''} {100 * score.probability:.1f}"


def draw_loudness(samples: np.ndarray, n_columns: int = 32) -> str:
    """Draw the level over time in characters: 60 dB below the loudest column is the lowest."""
    parts = np.array_split(np.asarray(samples, dtype=np.float64), n_columns)
    power = np.array([np.mean(part**2) if len(part) else 0.0 for part in parts])
    level_db = 10 * np.log10(np.maximum(power / max(power.max(), 1e-30), 1e-6))
    return "".join(_BLOCKS[round((db + 60) / 60 * (len(_BLOCKS) - 1))] for db in level_db)


def draw_histogram(values: np.ndarray, n_bins: int = 16) -> str:
    """Draw a histogram of values between 0 and 1 in characters; a blank is an empty bin."""
    counts, _ = np.histogram(values, bins=n_bins, range=(0, 1))
    top = max(int(counts.max()), 1)
    return "".join(" " if n == 0 else _BLOCKS[round(n / top * (len(_BLOCKS) - 1))] for n in counts)


def _describe_group(group: GateGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "mean": group.mean,
        "spread": group.spread,
        "values": group.values.tolist(),
        "most_open": [channel.number for channel in group.most_open],
        "most_closed": [channel.number for channel in group.most_closed],
    }


def _describe_prediction(prediction: SegmentPrediction, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "run": prediction.run,
        "stage": prediction.stage,
        "shift": prediction.shift,
        "seed": prediction.seed,
        "row": prediction.row,
        "selection": prediction.selection,
        "speaker": prediction.speaker,
        "role": prediction.role,
        "probabilities": dict(zip(classes, map(float, prediction.probabilities), strict=True)),
        "top": [score.name for score in prediction.top],
        "is_right": prediction.is_right,
        "pseudo_label": prediction.pseudo_label or None,
    }
