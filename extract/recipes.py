"""The published recipes of spectrograms and of clips, and the arithmetic of shapes; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from echoshift.pipeline.errors import SpecError, suggest
from echoshift.pipeline.specs import AudioSpec

ZHANG2022 = AudioSpec(
    recipe="zhang2022",
    span="segment",
    rate_hz=16000,
    duration_s=10.0,
    n_window=512,
    n_hop=159,
    n_fft=512,
    log_floor=1e-7,
    standardise=True,
)
"""A's spectrogram: 257 bands x 1004 frames of the segment's first ten seconds."""

PLANAMENTE2021 = AudioSpec(
    recipe="planamente2021",
    span="clip",
    rate_hz=24000,
    duration_s=1.279,
    n_window=240,
    n_hop=120,
    n_fft=511,
    log_floor=1e-6,
    standardise=False,
)
"""B's spectrogram: 256 bands x 256 frames of the 1.279 s around a clip."""

CHEN2020 = AudioSpec(
    recipe="chen2020",
    span="segment",
    rate_hz=22050,
    duration_s=10.0,
    n_window=1024,
    n_hop=256,
    n_fft=1024,
    log_floor=1e-5,
    standardise=False,
    n_mels=80,
    f_min_hz=125.0,
    f_max_hz=7600.0,
)
"""The log-mels of the VAS data (RegNet, Chen et al. 2020): 80 bands x 862 frames, of which the data keep 860."""


ZHANG2022_NOISE, ZHANG2022_N_MASKED_BINS = 0.05, 9
"""What A's training adds to a standardised spectrogram, and how many bands it sets to 0 [A-code]."""


def plan_spectrogram_shape(spec: AudioSpec) -> tuple[int, int]:
    """Compute (n_bands, n_frames) of the spec's spectrogram; raises SpecError where its lengths can't go together."""
    if spec.n_hop > spec.n_window or spec.n_window > spec.n_fft:
        raise SpecError(
            f"audio spec needs n_hop <= n_window <= n_fft, has {spec.n_hop}, {spec.n_window}, {spec.n_fft}: "
            f"correct them, or take the preset of {spec.recipe}"
        )
    if spec.n_samples < spec.n_window:
        raise SpecError(f"audio window of {spec.n_samples} samples is shorter than n_window = {spec.n_window}")
    n_bands = spec.n_fft // 2 + 1 if spec.n_mels is None else spec.n_mels
    if spec.n_masked_bins >= n_bands:
        raise SpecError(f"n_masked_bins = {spec.n_masked_bins} masks all of the {n_bands} bands; take fewer, such as 9")
    if spec.recipe == "zhang2022":
        n_frames = (spec.n_samples - spec.n_window) // spec.n_hop + 1
    else:
        n_frames = (spec.n_samples + 2 * (spec.n_fft // 2) - spec.n_fft) // spec.n_hop + 1
    return n_bands, n_frames


@dataclass(frozen=True, slots=True)
class Preset:
    """One recipe: what it changes of an encoder's own preprocessing.

    Attributes:
        clip, frame: fields of ClipSpec and FrameSpec with their values.
        crop: `whole` keeps the encoder's crop (256, or what the network was built for); `part` is the one it is trained
            with, 7/8 of the short side (224 of 256).
        audio: fields of AudioSpec; empty keeps the encoder's spectrogram.
    """

    name: str
    summary: str
    clip: Mapping[str, Any]
    frame: Mapping[str, Any] = field(default_factory=dict)
    crop: Literal["whole", "part"] = "whole"
    audio: Mapping[str, Any] = field(default_factory=dict)


_TRAIN = {"crops": "random-resized", "area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3), "flip": 0.5}
_CHARADES = {"n_frames": 64, "stride": 8, "rate_hz": 24.0}
# The paper says 16 frames; their distance is stated nowhere [?], 2 is what its code base takes at 60 Hz.
_RNA = {"n_frames": 16, "stride": 2}
_RNA_AUDIO = PLANAMENTE2021.model_dump()

_PRESETS = (
    Preset(
        "zhang-stage1-train",
        "1 random clip, random resized crop, mirrored half the time; clip.n_views=k for k views",
        {"sampling": "random", "n_clips": 1},
        _TRAIN,
        "part",
    ),
    Preset("zhang-stage1-val", "1 clip in the middle, centre crop", {"n_clips": 1}, crop="part"),
    Preset("zhang-encoder-test", "5 uniform clips x 3 crops", {"n_clips": 5}, {"crops": "three"}),
    Preset(
        "zhang-stage2-train",
        "5 clips, one random in each fifth, one random resized crop for all",
        {"sampling": "random", "n_clips": 5},
        {**_TRAIN, "crop_for": "view"},
        "part",
    ),
    Preset(
        "zhang-sound-train",
        "audio in 4 views, the first as it is, the others with noise and 9 bands masked; frames as they are",
        {},
        audio={"n_views": 4, "noise": ZHANG2022_NOISE, "n_masked_bins": ZHANG2022_N_MASKED_BINS},
    ),
    Preset("zhang-stage2-test", "5 uniform clips, centre crop", {"n_clips": 5}),
    Preset(
        "charades-train",
        "1 random clip of 64 x 8 frames at 24 Hz (21 s), random crop",
        {**_CHARADES, "sampling": "random", "n_clips": 1},
        {"crops": "random"},
        "part",
    ),
    Preset("charades-test", "10 uniform clips of 64 x 8 frames at 24 Hz, centre crop", {**_CHARADES, "n_clips": 10}),
    Preset(
        "rna-train",
        "1 random clip of 16 frames, random crop with scale jitter, mirrored half the time; audio around the clip",
        {**_RNA, "sampling": "random", "n_clips": 1},
        {"crops": "random", "short_sides": (256, 320), "flip": 0.5},
        "part",
        _RNA_AUDIO,
    ),
    Preset(
        "rna-test",
        "5 equidistant clips of 16 frames, centre crop; audio around each clip",
        {**_RNA, "n_clips": 5},
        crop="part",
        audio=_RNA_AUDIO,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _PRESETS})


def find_preset(name: str) -> Preset:
    """Find a preset; raises SpecError with the nearest name, or with all of them."""
    try:
        return PRESETS[name]
    except KeyError as error:
        hint = suggest(name, PRESETS, listed_by="echoshift list recipes")
        raise SpecError(f"there is no preset {name!r}; {hint}") from error
