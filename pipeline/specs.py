"""Specifications of features, whose fingerprint names a store."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator


class SpecModel(BaseModel):
    """Base of every specification and card: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipSpec(SpecModel):
    """Frames of a segment that make up its clips.

    `rate_hz` is the time base: frame j of a segment is the one shown at start_s + j / rate_hz; None means the video's
    own frames. A clip takes `n_frames` frames, every `stride`-th, and spans n_frames * stride frames of the time base.
    `uniform` places `n_clips` clips evenly (A's released code; METHODS section 2): a = (n - span + 1) / k,
    offset int(i * a + a / 2), indices modulo n where the segment is shorter than the span. `random` places one clip
    anywhere in each of `n_clips` equal parts: offset int((i + u) * a), u in [0, 1). `windows` slides by `step` frames
    and keeps whole windows only.

    `n_views` counts draws of a segment, and `seed` decides everything that is drawn (where random clips lie,
    random crops, flips), together with the segment's id and the numbers of view and clip, and nothing else.
    """

    n_frames: int = Field(gt=0)
    stride: int = Field(default=1, gt=0)
    rate_hz: float | None = Field(default=None, gt=0)
    sampling: Literal["uniform", "random", "windows"] = "uniform"
    n_clips: int = Field(default=1, gt=0)
    step: int | None = Field(default=None, gt=0)
    n_views: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_sampling(self) -> ClipSpec:
        if self.sampling == "windows" and (self.step is None or self.n_clips != 1):
            raise ValueError("windows need `step` and take no `n_clips`")
        if self.sampling != "windows" and self.step is not None:
            raise ValueError("`step` goes with sampling = 'windows'")
        return self

    @property
    def span(self) -> int:
        """The number of frames of the time base that a clip covers."""
        return self.n_frames * self.stride


class FrameSpec(SpecModel):
    """Steps from a decoded frame to the network's input.

    The short side is resized to `short_side` (torch bilinear, antialiased, half-pixel centres), one or more crops of
    crop x crop are cut out, and (x - mean) / std taken a channel, with x in 0..255. `crops` says which:

    - `centre`: one.
    - `three`: at the start, the middle and the end of the long side, in this order.
    - `random`: one anywhere; the short side is drawn evenly from `short_sides` first, where that is given.
    - `random-resized`: a box of `area` times the frame, of an aspect ratio (width / height) drawn evenly in its
      logarithm from `aspect`, resized to crop x crop (ten tries, then the largest centred box).

    `crop_for` says whether the clips of a view share what is drawn. `flip` is the probability of a mirrored view; the
    horizontal component of flow turns its sign.
    `flow` is where flow comes from: `images` (u/ and v/), or computed from the frames by OpenCV's TV-L1 or DIS at the
    size `short_side`, clipped to +-`flow_bound` pixels and quantised evenly to 0..255.
    """

    input: Literal["rgb", "flow"] = "rgb"
    short_side: int = Field(gt=0)
    crop: int = Field(gt=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Literal["torch-bilinear-antialias"] = "torch-bilinear-antialias"
    crops: Literal["centre", "three", "random", "random-resized"] = "centre"
    short_sides: tuple[int, int] | None = None
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    crop_for: Literal["view", "clip"] = "view"
    flip: float = Field(default=0.0, ge=0, le=1)
    flow: Literal["images", "tvl1", "dis"] = "images"
    flow_bound: float = Field(default=20.0, gt=0)

    @model_validator(mode="after")
    def _check_shape(self) -> FrameSpec:
        n_channels = 3 if self.input == "rgb" else 2
        if len(self.mean) != n_channels or len(self.std) != n_channels:
            raise ValueError(f"{self.input} takes {n_channels} means and standard deviations")
        if self.short_sides is not None and (
            self.crops != "random" or not 0 < self.short_sides[0] <= self.short_sides[1]
        ):
            raise ValueError("`short_sides` goes with crops = 'random', lower one first")
        smallest = self.short_side if self.short_sides is None else self.short_sides[0]
        if self.crops != "random-resized" and self.crop > smallest:
            raise ValueError("`crop` can't be larger than `short_side`")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError("`area` lies within 0..1, `aspect` above 0, lower one first")
        if self.input == "rgb" and self.flow != "images":
            raise ValueError("`flow` goes with input = 'flow'")
        return self

    @property
    def n_crops(self) -> int:
        """The number of crops cut out of a frame."""
        return 3 if self.crops == "three" else 1

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        return self.crops in ("random", "random-resized") or 0 < self.flip < 1

    @property
    def source(self) -> Literal["rgb", "flow"]:
        """The media that are read: flow that is computed comes from RGB frames."""
        return "rgb" if self.input == "rgb" or self.flow != "images" else "flow"


class AudioSpec(SpecModel):
    """Samples that a row covers, and how they become a log spectrogram (METHODS section 3).

    `span` = `segment`: one window, the segment's own span, at most `duration_s`; shorter ones are tiled.
    `span` = `clip`: one window of `duration_s` centred on each clip, zeros beyond the ends of the file.
    `n_mels`, `f_min_hz` and `f_max_hz` belong to the mel recipe `chen2020` and to no other.
    `n_views` is how often each window's standardised spectrogram is stored: view 0 as it is, the others with uniform
    noise of +-`noise` on every value and `n_masked_bins` neighbouring bands set to 0 [A-code: 0.05 and 9]. With one
    view the three fields are left out of what is dumped: stores made before there were any keep their fingerprint.
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
    n_views: int = Field(default=1, gt=0)
    noise: float = Field(default=0.0, ge=0)
    n_masked_bins: int = Field(default=0, ge=0)

    @model_serializer(mode="wrap")
    def _leave_out_single_view(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if self.n_views == 1:
            for name in ("n_views", "noise", "n_masked_bins"):
                fields.pop(name, None)
        return fields

    @model_validator(mode="after")
    def _check_views(self) -> AudioSpec:
        is_augmented = self.noise > 0 or self.n_masked_bins > 0
        if self.n_views == 1 and is_augmented:
            raise ValueError("`noise` and `n_masked_bins` change the views after the first: set `n_views` to 2 or more")
        if self.n_views > 1 and not is_augmented:
            raise ValueError(
                f"{self.n_views} views of sound are all the same: set `noise` and `n_masked_bins`, such as 0.05 and 9"
            )
        if self.n_views > 1 and not self.standardise:
            raise ValueError(
                f"views of sound are of standardised spectrograms, whose mean is 0; those of {self.recipe} aren't: "
                f"leave out `n_views`, `noise` and `n_masked_bins`, or set `standardise`"
            )
        return self

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
        """The number of samples of a window."""
        return round(self.duration_s * self.rate_hz)


class OutputSpec(SpecModel):
    """One named output of an encoder with its shape for one clip."""

    name: str
    shape: tuple[int, ...]


class ImportSpec(SpecModel):
    """Where features come from that were computed elsewhere: nothing of how they were made is known.

    `source_sha256` is that of the file, or of a folder's files (pipeline/store/interchange.py).
    """

    form: Literal["npz", "epic100"]
    source_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    modality: Literal["rgb", "flow", "audio"] | None = None


class FeatureSpec(SpecModel):
    """Everything that decides a feature's value; `fingerprint` names its store, any change of a field another one.

    `weights` is the sha256 of the network's tensors. `revision` is the encoder's, raised when its numerics change.
    Exactly one of `frame`, `audio` and `imported` is set; of an imported store `weights` is "imported:" and the
    source's sha256, and of `clip` only `n_clips` means something: the most clips a segment has.
    """

    encoder: str
    weights: str
    clip: ClipSpec
    frame: FrameSpec | None = None
    audio: AudioSpec | None = None
    imported: ImportSpec | None = None
    outputs: tuple[OutputSpec, ...] = Field(min_length=1)
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    decoder: Literal["pyav", "decord"] = "pyav"
    revision: int = 1

    @model_validator(mode="after")
    def _check_kind(self) -> FeatureSpec:
        if [self.frame, self.audio, self.imported].count(None) != 2:
            raise ValueError("a spec has exactly one of `frame`, `audio` and `imported`")
        if len({output.name for output in self.outputs}) != len(self.outputs):
            raise ValueError("an output is named twice")
        is_random = self.clip.sampling == "random" or (self.frame is not None and self.frame.is_random)
        if self.clip.n_views > 1 and not is_random:
            raise ValueError("`n_views` views are all the same where neither clips nor crops nor flips are random")
        return self

    @property
    def n_entries_per_clip(self) -> int:
        """The number of entries of the second axis that come from one clip: its views, or its crops.

        Entry number (clip * n_views + view) * n_crops + crop; of audio, its own view takes the place of the crop.
        """
        return self.clip.n_views * (self.n_sound_views if self.frame is None else self.frame.n_crops)

    @property
    def n_sound_views(self) -> int:
        """The number of views of each window of audio, the first as it is; 1 in a spec without audio."""
        return 1 if self.audio is None else self.audio.n_views

    @property
    def holds_sound(self) -> bool:
        """Whether the store records for each row if audio was present."""
        return self.audio is not None or (self.imported is not None and self.imported.modality == "audio")


def fingerprint(spec: FeatureSpec) -> str:
    """Compute the 12 hex digits that name the spec's store: sha256 of its canonical JSON."""
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
