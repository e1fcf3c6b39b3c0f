"""Holds the options that say what is extracted, and makes specifications of them; shared by the commands that do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.completion import (
    complete_dataset,
    complete_encoder_weights,
    complete_encoders,
    complete_recipe,
    complete_spec_setting,
)
from echoshift.pipeline.errors import SpecError, suggest

if TYPE_CHECKING:
    from echoshift.extract.weights.load import WeightsRecord
    from echoshift.pipeline.cards import DatasetCard
    from echoshift.pipeline.segments import Manifest
    from echoshift.pipeline.specs import FeatureSpec


class BackendName(StrEnum):
    """Lists the backends of a store."""

    zarr = "zarr"
    hdf5 = "hdf5"


class DtypeName(StrEnum):
    """Lists the types features are stored in."""

    float16 = "float16"
    float32 = "float32"


class PrecisionName(StrEnum):
    """Lists the precisions networks run in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DecoderName(StrEnum):
    """Lists the decoders of video files."""

    pyav = "pyav"
    decord = "decord"


class FlowName(StrEnum):
    """Lists where flow can come from."""

    auto = "auto"
    images = "images"
    tvl1 = "tvl1"
    dis = "dis"


DatasetArgument = Annotated[
    str,
    typer.Argument(help="A dataset with a card and a manifest in data/manifests.", autocompletion=complete_dataset),
]
MediaOption = Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")]
EncodersOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Names, separated by blanks or commas; default: those of the card.", autocompletion=complete_encoders
    ),
]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="ENCODER=REF; REF is a name of `weights ls`, a .safetensors file, or random:SEED.",
        autocompletion=complete_encoder_weights,
    ),
]
OutputsOption = Annotated[
    list[str] | None,
    typer.Option(help="[ENCODER=]NAME,NAME; beside names of outputs: default, trunk (for Stage 1) and all."),
]
PresetOption = Annotated[
    str,
    typer.Option(
        help="A recipe of the papers, such as zhang-stage1-train; `echoshift list recipes` shows them.",
        autocompletion=complete_recipe,
    ),
]
FlowOption = Annotated[
    FlowName, typer.Option(help="Where flow comes from; auto: u/ and v/ images where there are any, else tvl1.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="[ENCODER.]part.field=value, such as clip.n_clips=10 or frame.crop=224.",
        autocompletion=complete_spec_setting,
    ),
]
BackendOption = Annotated[BackendName, typer.Option(help="How the store lies on disk.")]
CacheOption = Annotated[str, typer.Option(help="Where stores lie: a folder or a URL.", envvar="ECHOSHIFT_CACHE")]
ManifestOption = Annotated[Path | None, typer.Option(help="Another manifest than data/manifests/DATASET.csv.")]
ManifestsOption = Annotated[Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="Type of the stored features.")]
PrecisionOption = Annotated[PrecisionName, typer.Option(help="Precision of the networks.")]
DecoderOption = Annotated[DecoderName, typer.Option(help="pyav is exact; decord returns wrong frames on some files.")]
RowsPerShardOption = Annotated[
    int | None,
    typer.Option(
        help="Rows committed at a time, the most a kill can cost; counts for a new store; default: by bytes.", min=1
    ),
]
RetryFailedOption = Annotated[bool, typer.Option("--retry-failed", help="Try failed segments again.")]
DEFAULT_CACHE = "cache"


@dataclass(frozen=True, slots=True)
class SpecChoices:
    """What the command line says about features: encoders, weights, outputs, recipe, types."""

    encoders: list[str] | None
    weights: list[str] | None
    outputs: list[str] | None
    preset: str
    overrides: list[str] | None
    flow: FlowName
    dtype: DtypeName
    precision: PrecisionName
    decoder: DecoderName


def resolve_specs(
    card: DatasetCard, manifest: Manifest, media_root: Path, choices: SpecChoices
) -> tuple[tuple[FeatureSpec, WeightsRecord], ...]:
    """Make each chosen encoder's specification, with its weights; raises SpecError or WeightsError by name."""
    from echoshift.extract.encoders.registry import find_encoder
    from echoshift.extract.feature_specs import StoreOptions, choose_flow, make_feature_spec
    from echoshift.extract.weights.load import default_weights, resolve_weights

    names = list_names(choices.encoders or []) or list(card.encoders)
    if not names:
        raise SpecError(f"the card of {card.name} names no encoders; give --encoders")
    chosen_weights = _parse_pairs("--weights", choices.weights or [], names)
    chosen_outputs = _parse_outputs(choices.outputs or [], names)
    if choices.decoder == DecoderName.decord:
        from echoshift.extract.readers.decord_video import ensure_decord

        ensure_decord()  # before any work, not at the first video
    options = StoreOptions(choices.dtype.value, choices.precision.value, choices.decoder.value)
    specs = []
    for name in names:
        record = resolve_weights(chosen_weights.get(name) or default_weights(name), name)
        overrides = list(choices.overrides or [])
        if find_encoder(name).modality == "flow":
            flow = choose_flow(card, manifest, media_root) if choices.flow == FlowName.auto else choices.flow.value
            overrides.insert(0, f"{name}.frame.flow={flow}")  # a --set after it has the last word
        spec = make_feature_spec(
            name, record, options, outputs=chosen_outputs[name], preset=choices.preset, overrides=overrides
        )
        specs.append((spec, record))
    return tuple(specs)


def list_names(options: list[str]) -> list[str]:
    """List the names that options hold, separated by blanks or commas, each once."""
    return list(dict.fromkeys(name for option in options for name in option.replace(",", " ").split()))


def _parse_outputs(options: list[str], encoders: list[str]) -> dict[str, list[str]]:
    for_all = [name for option in options if "=" not in option for name in option.split(",") if name]
    pairs = _parse_pairs("--outputs", [option for option in options if "=" in option], encoders)
    return {
        encoder: [o for o in pairs[encoder].split(",") if o] if encoder in pairs else for_all for encoder in encoders
    }


def find_media_root(dataset: str, media: Path | None, manifests: Path) -> Path:
    """Return the folder of a dataset's videos, --media or data/DATASET; raises SpecError when it isn't there."""
    root = media or manifests.parent / dataset
    if not root.is_dir():
        raise SpecError(f"no media folder {root}; say where the videos of {dataset} lie with --media (make: MEDIA=)")
    return root


def _parse_pairs(option: str, pairs: list[str], encoders: list[str]) -> dict[str, str]:
    parsed = {}
    for pair in pairs:
        encoder, equals, value = pair.partition("=")
        if not equals or encoder not in encoders:
            hint = suggest(encoder, encoders)
            raise SpecError(f"{option} {pair!r} is not ENCODER=…, ENCODER one of those extracted; {hint}")
        parsed[encoder] = value
    return parsed
