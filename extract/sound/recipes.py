"""Holds the spectrogram recipes of the papers (METHODS, section 3); needs no torch to be imported."""

from __future__ import annotations

from pipeline.specs import AudioSpec

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
