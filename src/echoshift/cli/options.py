"""The options that several commands share, and what is made of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from echoshift.cli.completion import (
    complete_dataset,
    complete_encoder_weights,
    complete_encoders,
    complete_preset,
    complete_recipe,
    complete_shifts,
)
from echoshift.cli.terminal import make_notifier
from echoshift.pipeline.errors import RunError, SpecError, suggest

if TYPE_CHECKING:
    from types import FrameType

    from echoshift.extract.weights.load import WeightsRecord
    from echoshift.pipeline.cards import DatasetCard, Shift
    from echoshift.pipeline.dask import ClusterRequest
    from echoshift.pipeline.segments import Manifest
    from echoshift.pipeline.specs import FeatureSpec
    from echoshift.train.grids import Stage
    from echoshift.train.settings import RunSettings
    from echoshift.train.splits import DataPlaces

BackendName = Literal["zarr", "hdf5"]


DtypeName = Literal["float16", "float32"]


PrecisionName = Literal["fp32", "bf16", "fp16"]


DecoderName = Literal["pyav", "decord"]


FlowName = Literal["auto", "images", "tvl1", "dis"]


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
    if choices.decoder == "decord":
        from echoshift.extract.readers.decord_video import ensure_decord

        ensure_decord()  # before any work, not at the first video
    options = StoreOptions(choices.dtype, choices.precision, choices.decoder)
    specs = []
    for name in names:
        record = resolve_weights(chosen_weights.get(name) or default_weights(name), name)
        overrides = list(choices.overrides or [])
        if find_encoder(name).modality == "flow":
            flow = choose_flow(card, manifest, media_root) if choices.flow == "auto" else choices.flow
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


DatasetChoice = Annotated[
    str,
    typer.Argument(
        help="A dataset with a card and a manifest; default: the one last extracted.", autocompletion=complete_dataset
    ),
]
ShiftChoice = Annotated[
    str,
    typer.Option(
        help="Shifts of the card, such as D1-D2, separated by blanks, or all.", autocompletion=complete_shifts
    ),
]
SeedChoice = Annotated[int, typer.Option(help="Decides everything that is random.", min=0)]
MediaChoice = Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")]
PresetChoice = Annotated[
    str,
    typer.Option(
        help="paper (the text), released (what the released code computes) or, Stage 2, quick (a laptop's).",
        autocompletion=complete_preset,
    ),
]
ConfigChoice = Annotated[Path | None, typer.Option(help="A TOML file over the preset.")]
OverrideChoice = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="part.field=value, such as training.n_epochs=5; wins over all else; `echoshift list settings`.",
    ),
]
RerunChoice = Annotated[
    list[str] | None, typer.Option(help="A step to do again, such as clusters, whatever is done already.")
]
RunsOption = Annotated[Path, typer.Option(help="Where runs lie.", envvar="ECHOSHIFT_RUNS")]
DEFAULT_RUNS = Path("runs")


@dataclass(frozen=True, slots=True)
class RunChoices:
    """What the command line says of data and configuration."""

    dataset: str
    media: Path | None
    cache: str
    manifest: Path | None
    manifests: Path
    device: str
    preset: str
    config: Path | None
    overrides: list[str] | None


@dataclass(frozen=True, slots=True)
class AnswerChoices:
    """What the command line says of the answer: without progress and notices, as JSON."""

    quiet: bool
    as_json: bool


def find_last_dataset(cache: str) -> str:
    """Return the dataset of the store in a cache that was last extracted to; raises RunError where there is none."""
    from echoshift.pipeline.store.location import locate
    from echoshift.pipeline.store.open import list_stores, open_store

    found: list[tuple[str, str]] = []
    for path in list_stores(cache):
        attributes = open_store(path).attributes
        lines = (locate(path).beside(".runs.jsonl").read_text() or "").splitlines()
        when = json.loads(lines[-1])["when"] if lines else attributes["created"]["when"]
        found.append((when, str(attributes["dataset"])))
    if not found:
        raise RunError(f"no dataset named, and nothing extracted in {cache}; name one, or extract first")
    return max(found)[1]


def choose_dataset(choices: RunChoices, notify: Callable[[str], None]) -> str:
    """Return the named dataset, or the one last extracted, of which `notify` is told."""
    if choices.dataset:
        return choices.dataset
    dataset = find_last_dataset(choices.cache)
    notify(f"no dataset named: {dataset}, the one last extracted")
    return dataset


def open_places(choices: RunChoices, notify: Callable[[str], None] | None = None) -> DataPlaces:
    """Read card and manifest, and say where everything lies; `notify` is told of a dataset that wasn't named."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import locate_manifest, read_manifest
    from echoshift.train.splits import DataPlaces

    dataset = choose_dataset(choices, notify or make_notifier(quiet=False))
    card: DatasetCard = read_dataset_card(dataset, choices.manifests)
    manifest: Manifest = read_manifest(choices.manifest or locate_manifest(dataset, choices.manifests), card)
    media = choices.media or choices.manifests.parent / dataset
    if choices.media is not None and not choices.media.is_dir():
        raise RunError(f"no media folder {choices.media}")
    return DataPlaces(card, manifest, media, choices.cache, choices.device)


def choose_shifts(card: DatasetCard, manifest: Manifest, names: str) -> list[Shift]:
    """Find shifts by name, separated by blanks or commas; `all`: those of one source that the manifest has."""
    from echoshift.train.splits import find_shift, read_shift_names

    if not names.strip(" ,"):
        raise RunError(f"no shift named; say all, or which of {', '.join(s.name for s in card.shifts) or 'none'}")
    if names.strip() != "all":
        return [find_shift(card, name) for name in read_shift_names(card, names)]
    shifts = [shift for shift in list_present_shifts(card, manifest) if len(shift.source) == 1]
    if not shifts:
        raise RunError(
            f"the manifest of {card.name} holds none of the card's shifts; import all domains, or say --shift"
        )
    return shifts


def list_present_shifts(card: DatasetCard, manifest: Manifest) -> list[Shift]:
    """List the card's shifts of which the manifest has segments."""
    there = {segment.domain for segment in manifest}
    return [shift for shift in card.shifts if {*shift.source, shift.target} <= there]


def resolve_choices(stage: Stage, card: DatasetCard, choices: RunChoices, more: tuple[str, ...] = ()) -> RunSettings:
    """Make the settings of a run; `more` are a grid row's overrides, which win."""
    from echoshift.train.settings import resolve_settings

    return resolve_settings(stage, card, choices.preset, choices.config, [*(choices.overrides or []), *more])


def plan_cluster(
    workers: int | None, scheduler: str | None, *, slurm: bool, slurm_options: Sequence[str], device: str
) -> ClusterRequest | None:
    """Decide who computes: None for this process; raises SpecError when options contradict each other."""
    from echoshift.pipeline.dask import ClusterRequest

    if slurm_options and not slurm:
        raise SpecError("--slurm-option goes with --slurm")
    if scheduler is not None:
        if workers is not None or slurm:
            raise SpecError("--scheduler uses the workers that are there; leave out --workers and --slurm")
        return ClusterRequest("scheduler", address=scheduler)
    if slurm:
        if workers is None:
            raise SpecError("--slurm needs --workers, the number of workers to ask SLURM for")
        return ClusterRequest("slurm", workers, slurm_options=parse_slurm_options(slurm_options))
    if workers is None:
        return None
    return ClusterRequest("local", workers, gpus=list_gpus(device))


def parse_slurm_options(pairs: Sequence[str]) -> dict[str, object]:
    """Parse KEY=VALUE; values are read as Dask reads its environment: `cores=8`, `job_extra_directives=["-G1"]`."""
    from dask.config import interpret_value

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise SpecError(f"--slurm-option {pair!r} is not KEY=VALUE")
        options[key] = interpret_value(value)
    return options


def list_gpus(device: str) -> tuple[str, ...]:
    """List what workers may have in CUDA_VISIBLE_DEVICES: this process' GPUs for auto and cuda, () for any other."""
    if device not in ("auto", "cuda"):
        return ()
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    n_gpus = torch.cuda.device_count()
    return tuple(visible[:n_gpus]) if visible else tuple(map(str, range(n_gpus)))


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Make SIGTERM, which SLURM and shutdowns send, end a run like Ctrl-C: what is open is closed, exit code 130."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
