"""Makes a FeatureSpec from an encoder's defaults, its weights, and what the user overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from echoshift.extract.encoders.registry import EncoderEntry, find_encoder, is_trunk_output
from echoshift.extract.presets import apply_preset, find_preset
from echoshift.extract.weights.load import WeightsRecord
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import FeatureSpec, OutputSpec
from echoshift.pipeline.suggestions import suggest

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
    no such part, and over sound that no clip has a say in. Raises SpecError naming the override or output.
    """
    entry = find_encoder(encoder)
    parts: dict[str, dict[str, Any]] = {
        part: dict(getattr(entry, part)) for part in SPEC_PARTS if getattr(entry, part) is not None
    }
    if preset:
        apply_preset(find_preset(preset), entry, parts)
    for override in sorted(overrides, key=lambda o: "clip." in o):  # whether clips matter to sound is known last
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
