"""Defines what features are: the specifications whose fingerprint names a store."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SpecModel(BaseModel):
    """Is what every specification has in common: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipSpec(SpecModel):
    """Says which frames of a segment make up its clips.

    `rate_hz` is the time base: frame j of a segment is the one shown at start_s + j / rate_hz; None means the video's
    own frames. A clip takes `n_frames` frames, every `stride`-th, and spans n_frames * stride frames of the time base.
    `uniform` places `n_clips` clips evenly (A's released code; METHODS section 2): a = (n - span + 1) / k,
    offset int(i * a + a / 2), indices modulo n where the segment is shorter than the span. `windows` slides by `step`
    frames and keeps whole windows only.
    """

    n_frames: int = Field(gt=0)
    stride: int = Field(default=1, gt=0)
    rate_hz: float | None = Field(default=None, gt=0)
    sampling: Literal["uniform", "windows"] = "uniform"
    n_clips: int = Field(default=1, gt=0)
    step: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_sampling(self) -> ClipSpec:
        if self.sampling == "windows" and (self.step is None or self.n_clips != 1):
            raise ValueError("windows need `step` and take no `n_clips`")
        if self.sampling == "uniform" and self.step is not None:
            raise ValueError("`step` goes with sampling = 'windows'")
        return self

    @property
    def span(self) -> int:
        """Gives how many frames of the time base a clip covers."""
        return self.n_frames * self.stride


class FrameSpec(SpecModel):
    """Says how a decoded picture becomes the network's input.

    The short side is resized to `short_side` (torch bilinear, antialiased, half-pixel centres), the centre `crop` is
    cut out, and (x - mean) / std taken a channel, with x in 0..255.
    """

    input: Literal["rgb", "flow"] = "rgb"
    short_side: int = Field(gt=0)
    crop: int = Field(gt=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Literal["torch-bilinear-antialias"] = "torch-bilinear-antialias"

    @model_validator(mode="after")
    def _check_shape(self) -> FrameSpec:
        n_channels = 3 if self.input == "rgb" else 2
        if len(self.mean) != n_channels or len(self.std) != n_channels:
            raise ValueError(f"{self.input} takes {n_channels} means and standard deviations")
        if self.crop > self.short_side:
            raise ValueError("`crop` can't be larger than `short_side`")
        return self


class AudioSpec(SpecModel):
    """Says which samples a row covers and how they become a log spectrogram (METHODS section 3).

    `span` = `segment`: one window, the segment's own span, at most `duration_s`; shorter ones are tiled.
    `span` = `clip`: one window of `duration_s` centred on each clip, zeros beyond the ends of the file.
    `n_mels`, `f_min_hz` and `f_max_hz` belong to the mel recipe `chen2020` and to no other.
    """

    recipe: Literal["zhang2022", "planamente2021", "chen2020"]
    span: Literal["segment", "clip"]
    rate_hz: int = Field(gt=0)
    duration_s: float = Field(gt=0)
    n_window: int = Field(gt=0)
    n_hop: int = Field(gt=0)
    n_fft: int = Field(gt=0)
    log_floor: float = Field(gt=0)
    standardise: bool
    n_mels: int | None = Field(default=None, gt=0)
    f_min_hz: float | None = Field(default=None, ge=0)
    f_max_hz: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_mels(self) -> AudioSpec:
        mel_fields = (self.n_mels, self.f_min_hz, self.f_max_hz)
        if self.recipe != "chen2020":
            if any(value is not None for value in mel_fields):
                raise ValueError(f"{self.recipe} has no mel bands: leave out `n_mels`, `f_min_hz` and `f_max_hz`")
            return self
        if self.n_mels is None or self.f_min_hz is None or self.f_max_hz is None:
            raise ValueError("chen2020 needs `n_mels`, `f_min_hz` and `f_max_hz`")
        if not self.f_min_hz < self.f_max_hz <= self.rate_hz / 2:
            raise ValueError("`f_min_hz` lies below `f_max_hz`, and that at most at half of `rate_hz`")
        return self

    @property
    def n_samples(self) -> int:
        """Gives how many samples a window has."""
        return round(self.duration_s * self.rate_hz)


class OutputSpec(SpecModel):
    """Is one named output of an encoder with its shape for one clip."""

    name: str
    shape: tuple[int, ...]


class FeatureSpec(SpecModel):
    """Is everything that decides a feature's value; `fingerprint` names its store, any change of a field another one.

    `weights` is the sha256 of the network's tensors. `revision` is the encoder's, raised when its numerics change.
    Exactly one of `frame` and `audio` is set.
    """

    encoder: str
    weights: str
    clip: ClipSpec
    frame: FrameSpec | None = None
    audio: AudioSpec | None = None
    outputs: tuple[OutputSpec, ...] = Field(min_length=1)
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    decoder: Literal["pyav", "decord"] = "pyav"
    revision: int = 1

    @model_validator(mode="after")
    def _check_kind(self) -> FeatureSpec:
        if (self.frame is None) == (self.audio is None):
            raise ValueError("a spec has either `frame` or `audio`")
        if len({output.name for output in self.outputs}) != len(self.outputs):
            raise ValueError("an output is named twice")
        return self


def fingerprint(spec: FeatureSpec) -> str:
    """Computes the 12 hex digits that name the spec's store: sha256 of its canonical JSON."""
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
