"""What is shown of a segment; whatever isn't there is a sentence, never a value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from echoshift.pipeline.segments import Segment
from echoshift.train.runs import SelectionRule

Part = Literal["frames", "sound", "spectrogram", "gate", "predictions"]
Speaker = Literal["sound", "pictures", "recogniser", "alignment"]


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """One picture of the segment as a JPEG of at most 320 pixels in width.

    Attributes:
        time_s: when it is first shown, in seconds from the start of the video.
        number: its index in the file.
    """

    jpeg: bytes
    time_s: float
    number: int
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSound:
    """The first 10 s at most of the segment's sound, mono.

    Attributes:
        wav: 16-bit PCM.
        samples: the same before it was rounded, float32 [n] in about -1..1.
        start_s, stop_s: seconds from the start of the video.
        loudness_dbfs: mean power in dB of full scale.
    """

    wav: bytes
    samples: np.ndarray
    rate_hz: int
    start_s: float
    stop_s: float
    loudness_dbfs: float


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSpectrogram:
    """The log spectrogram that an audio encoder sees.

    Attributes:
        values: float32 [n_bands, n_frames], lowest band first, exactly the network's input.
        png: the part that isn't repeated, lowest band at the bottom, 8-bit colours.
        encoder: whose input it is; "" where nothing was extracted and the recipe's own settings are shown.
        start_s, stop_s: what the window covers, in seconds from the start of the video.
        n_own_frames: frames before the sound, shorter than the window, begins again or ends; n_frames where it doesn't.
        top_hz: frequency of the highest band.
        is_mel: whether the bands lie evenly on the mel scale rather than in Hz.
    """

    values: np.ndarray
    png: bytes
    encoder: str
    recipe: str
    start_s: float
    stop_s: float
    n_own_frames: int
    top_hz: float
    is_mel: bool


@dataclass(frozen=True, slots=True)
class Channel:
    """One channel's number and its gate."""

    number: int
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class GateGroup:
    """The gates of one path's channels, such as `trunk_slow`.

    Attributes:
        values: float32 [n_channels], 0 closed, 1 open.
        mean, spread: of the values; the spread is the standard deviation of the population.
        most_open, most_closed: a few channels, the extreme one first.
    """

    name: str
    values: np.ndarray
    mean: float
    spread: float
    most_open: tuple[Channel, ...]
    most_closed: tuple[Channel, ...]


@dataclass(frozen=True, slots=True)
class SegmentGate:
    """What the audio-based attention of one checkpoint makes of the segment's sound.

    Attributes:
        run: names the run, such as `stage1 studio-workshop, seed 0`.
        hears: whether there is sound; without it, the gate is the one that all silent segments share.
    """

    run: str
    checkpoint: Path
    hears: bool
    groups: tuple[GateGroup, ...]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class with its probability, and whether the manifest says that it is in the segment."""

    name: str
    probability: float
    is_true: bool


@dataclass(frozen=True, slots=True, eq=False)
class SegmentPrediction:
    """What one run says of the segment.

    Attributes:
        run: names the run, such as `stage2 studio-workshop, seed 0, + z`.
        speaker: who says it: Stage 1's audio classifier (p_a), its visual encoder (p_v), a recogniser of Stage 2, or a
            method of alignment.
        role: what the segment is to the run, such as `source train` or `target test`.
        probabilities: float32 [K]; with the rule `mean_last` the mean over the last checkpoints.
        top: the classes of highest probability, highest first.
        is_right: whether the highest is the true one; None where a segment may have several.
        pseudo_label: what Stage 1 takes the segment for; "" where it says nothing.
    """

    run: str
    stage: str
    shift: str
    seed: int
    row: str
    selection: SelectionRule
    speaker: Speaker
    role: str
    probabilities: np.ndarray
    top: tuple[ClassScore, ...]
    is_right: bool | None
    pseudo_label: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentView:
    """Everything that is shown of one segment.

    Attributes:
        classes: of the dataset, in index order.
        synthetic: whether the dataset is.
        sound, spectrogram, gate: None where there is none.
        predictions: run by run, Stage 1 first.
        missing: by part, the sentence that says why it isn't there, or not whole.
    """

    dataset: str
    synthetic: bool
    segment: Segment
    classes: tuple[str, ...]
    frames: tuple[ShownFrame, ...]
    sound: SegmentSound | None
    spectrogram: SegmentSpectrogram | None
    gate: SegmentGate | None
    predictions: tuple[SegmentPrediction, ...]
    missing: dict[Part, str]
