"""Holds the options that say what is extracted, and makes specifications of them; shared by the commands that do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import SpecError
from pipeline.store.layout import N_ROWS_PER_SHARD

if TYPE_CHECKING:
    from extract.weights.resolve import WeightsRecord
    from pipeline.cards import DatasetCard
    from pipeline.specs import FeatureSpec


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


DatasetArgument = Annotated[str, typer.Argument(help="A dataset with a card and a manifest in data/manifests.")]
MediaOption = Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")]
EncodersOption = Annotated[str, typer.Option(help="Names, separated by blanks; default: those of the card.")]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option(help="ENCODER=REF; REF is a name of `weights ls`, a .safetensors file, or random:SEED."),
]
OutputsOption = Annotated[list[str] | None, typer.Option(help="ENCODER=NAME,NAME instead of the encoder's default.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="[ENCODER.]part.field=value, such as clip.n_clips=10 or frame.crop=224."),
]
BackendOption = Annotated[BackendName, typer.Option(help="How the store lies on disk.")]
CacheOption = Annotated[Path, typer.Option(help="Where stores lie.", envvar="ECHOSHIFT_CACHE")]
ManifestOption = Annotated[Path | None, typer.Option(help="Another manifest than data/manifests/DATASET.csv.")]
ManifestsOption = Annotated[Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="Type of the stored features.")]
PrecisionOption = Annotated[PrecisionName, typer.Option(help="Precision of the networks.")]
DecoderOption = Annotated[DecoderName, typer.Option(help="pyav is exact; decord returns wrong frames on some files.")]
RowsPerShardOption = Annotated[
    int, typer.Option(help="Rows committed at a time, the most a kill can cost; counts for a new store.", min=1)
]
RetryFailedOption = Annotated[bool, typer.Option("--retry-failed", help="Try failed segments again.")]
DEFAULT_CACHE = Path("cache")
DEFAULT_ROWS_PER_SHARD = N_ROWS_PER_SHARD


@dataclass(frozen=True, slots=True)
class SpecChoices:
    """Is what the command line says about features: encoders, weights, outputs, overrides, types."""

    encoders: str
    weights: list[str] | None
    outputs: list[str] | None
    overrides: list[str] | None
    dtype: DtypeName
    precision: PrecisionName
    decoder: DecoderName


def resolve_specs(card: DatasetCard, choices: SpecChoices) -> tuple[tuple[FeatureSpec, WeightsRecord], ...]:
    """Makes each chosen encoder's specification, with its weights; raises SpecError or WeightsError by name."""
    from extract.feature_specs import StoreOptions, make_feature_spec
    from extract.weights.resolve import default_weights, resolve_weights

    names = choices.encoders.split() or list(card.encoders)
    if not names:
        raise SpecError(f"the card of {card.name} names no encoders; give --encoders")
    chosen_weights = _parse_pairs("--weights", choices.weights or [], names)
    chosen_outputs = _parse_pairs("--outputs", choices.outputs or [], names)
    options = StoreOptions(choices.dtype.value, choices.precision.value, choices.decoder.value)
    specs = []
    for name in names:
        record = resolve_weights(chosen_weights.get(name) or default_weights(name), name)
        wanted = [o for o in chosen_outputs.get(name, "").split(",") if o]
        spec = make_feature_spec(name, record, options, outputs=wanted, overrides=choices.overrides or [])
        specs.append((spec, record))
    return tuple(specs)


def find_media_root(dataset: str, media: Path | None, manifests: Path) -> Path:
    """Gives the folder of a dataset's videos, --media or data/DATASET; raises SpecError when it isn't there."""
    root = media or manifests.parent / dataset
    if not root.is_dir():
        raise SpecError(f"no media folder {root}; say where the videos of {dataset} lie with --media (make: MEDIA=)")
    return root


def _parse_pairs(option: str, pairs: list[str], encoders: list[str]) -> dict[str, str]:
    parsed = {}
    for pair in pairs:
        encoder, equals, value = pair.partition("=")
        if not equals or encoder not in encoders:
            raise SpecError(f"{option} {pair!r} is not ENCODER=…, ENCODER one of {', '.join(encoders)}")
        parsed[encoder] = value
    return parsed
