"""Holds the options that say what is trained, where and how; shared by the commands that do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.completion import complete_dataset
from echoshift.cli.terminal import make_notifier
from echoshift.cli.train_completion import complete_preset, complete_setting, complete_shifts
from echoshift.pipeline.errors import RunError

if TYPE_CHECKING:
    from echoshift.pipeline.cards import DatasetCard, Shift
    from echoshift.pipeline.segments import Manifest
    from echoshift.train.data_places import DataPlaces
    from echoshift.train.grids import Stage
    from echoshift.train.settings import RunSettings

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
        autocompletion=complete_setting,
    ),
]
RerunChoice = Annotated[
    list[str] | None, typer.Option(help="A step to do anew, such as clusters, whatever is done already.")
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
    from echoshift.train.data_places import DataPlaces

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
