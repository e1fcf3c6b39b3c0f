"""Holds the published recipes of spectrograms and the arithmetic of their shapes; needs no torch."""

from __future__ import annotations

from echoshift.pipeline.errors import SpecError
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
