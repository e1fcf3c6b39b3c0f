"""Makes a FeatureSpec from an encoder's defaults, its weights, and what the user overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from echoshift.extract.encoders.registry import EncoderEntry, find_encoder, is_trunk_output
from echoshift.extract.media import locate_media
from echoshift.extract.recipes import Preset, find_preset
from echoshift.extract.weights.load import WeightsRecord
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import MediaNotFoundError, SpecError, suggest
from echoshift.pipeline.segments import Manifest
from echoshift.pipeline.specs import FeatureSpec, OutputSpec

SPEC_PARTS = ("clip", "frame", "audio")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a run decides for all its stores alike."""

    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    decoder: Literal["pyav", "decord"] = "pyav"


def make_feature_spec(
    encoder: str,
    weights: WeightsRecord,
    options: StoreOptions,
    *,
    outputs: Sequence[str] = (),
    preset: str = "",
    overrides: Sequence[str] = (),
) -> FeatureSpec:
    """Make the specification of an encoder's store: the encoder's own preprocessing, then a preset's, then overrides.

    `outputs` are names, or `default`, `trunk` and `all` for those of a level (ARCHITECTURE, two cache levels).
    `overrides` are `part.field=value` with part clip, frame or audio, or `ENCODER.part.field=value` for one encoder
    alone, such as `clip.n_clips=10` or `i3d_rgb.clip.rate_hz=none`. One without an encoder passes over those that have
    no such part, and over audio that no clip has a say in. Raises SpecError naming the override or output.
    """
    entry = find_encoder(encoder)
    parts: dict[str, dict[str, Any]] = {
        part: dict(getattr(entry, part)) for part in SPEC_PARTS if getattr(entry, part) is not None
    }
    if preset:
        _apply_preset(find_preset(preset), entry, parts)
    for override in sorted(overrides, key=lambda o: "clip." in o):  # whether clips matter to audio is known last
        _apply_override(entry, parts, override)
    try:
        specs = {part: type(getattr(entry, part)).model_validate(fields) for part, fields in parts.items()}
    except ValidationError as error:
        raise _name_fault(encoder, error) from error
    shapes = entry.output_shapes(specs["clip"], specs.get("frame") or specs["audio"])
    chosen = _expand_outputs(outputs or ("default",), entry, tuple(shapes))
    for name in chosen:
        if name not in shapes:
            raise SpecError(f"{encoder} has no output {name!r}; {suggest(name, shapes, there='it has')}")
    try:
        return FeatureSpec(
            encoder=encoder,
            weights=weights.sha256,
            outputs=tuple(OutputSpec(name=name, shape=shapes[name]) for name in chosen),
            dtype=options.dtype,
            precision=options.precision,
            decoder=options.decoder,
            revision=entry.revision,
            **specs,
        )
    except ValidationError as error:  # what one part alone can't know
        raise _name_fault(encoder, error) from error


def _apply_preset(preset: Preset, entry: EncoderEntry, parts: dict[str, dict[str, Any]]) -> None:
    """Change the parts (clip, frame, audio) of an encoder's preprocessing to what a preset says.

    An encoder smaller than 256 gets short sides and crops in proportion. For flow, whose rate is half of the frames',
    the number of frames and their stride stay the encoder's own where the preset doesn't span a time in seconds.
    """
    clip = dict(preset.clip)
    if entry.modality == "flow":
        clip = {key: value for key, value in clip.items() if key not in ("n_frames", "stride", "rate_hz")}
    parts["clip"].update(clip)
    if "frame" in parts and entry.frame is not None:
        side = entry.frame.short_side
        parts["frame"].update(preset.frame)
        if "short_sides" in preset.frame:
            parts["frame"]["short_sides"] = tuple(side * s // 256 for s in preset.frame["short_sides"])
        if preset.crop == "part":
            parts["frame"]["crop"] = side * 7 // 8
    if "audio" in parts and preset.audio:
        parts["audio"].update(preset.audio)
    if "audio" in parts and parts["audio"]["span"] == "segment":
        parts["clip"].update(n_clips=1, sampling="uniform")


def _name_fault(encoder: str, error: ValidationError) -> SpecError:
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    return SpecError(f"{encoder}: {'.'.join(map(str, fault['loc'])) or 'override'}: {message}")


def _expand_outputs(names: Sequence[str], entry: EncoderEntry, known: tuple[str, ...]) -> tuple[str, ...]:
    levels = {
        "default": entry.default_outputs,
        "trunk": tuple(filter(is_trunk_output, known)),
        "all": known,
    }
    expanded = [(name,) if name in known else levels.get(name, (name,)) for name in names]
    return tuple(dict.fromkeys(output for outputs in expanded for output in outputs))


def _apply_override(entry: EncoderEntry, parts: dict[str, dict[str, Any]], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if len(names) == 3 and names[0] != entry.name:
        find_encoder(names[0])
        return
    if not equals or len(names) not in (2, 3):
        raise SpecError(f"override {override!r} is not [ENCODER.]part.field=value, part one of {', '.join(SPEC_PARTS)}")
    part, field = names[-2:]
    if part == "clip" and len(names) == 2 and parts.get("audio", {}).get("span") == "segment":
        return
    if part not in SPEC_PARTS:
        raise SpecError(f"override {override!r}: no part {part!r}; {suggest(part, SPEC_PARTS)}")
    if part not in parts:
        if len(names) == 3:
            raise SpecError(f"override {override!r}: {entry.name} has no {part!r}")
        return
    if field not in parts[part]:
        hint = suggest(field, parts[part], there="it has")
        raise SpecError(f"override {override!r}: {part} has no field {field!r}; {hint}")
    parts[part][field] = None if text.strip().lower() == "none" else text.strip()


COMPUTED: Literal["tvl1"] = "tvl1"  # what the published flow networks were trained on


def choose_flow(card: DatasetCard, manifest: Manifest, media_root: Path) -> Literal["images", "tvl1"]:
    """Return `images` if any segment's video has flow images below the media root, else the method of computing it.

    A video that lacks its images where others have them fails with that reason: flow from two sources would make
    features that can't be compared.
    """
    seen: set[tuple[str, str, str]] = set()
    for segment in manifest:
        video = (segment.video_id, segment.domain, segment.split)
        if video in seen:
            continue
        seen.add(video)
        try:
            locate_media(media_root, card.media, segment, "flow")
        except MediaNotFoundError:
            continue
        return "images"
    return COMPUTED
