"""`echoshift list`: shows the names that commands take: datasets, encoders, recipes, grids, settings and so on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.completion import complete_dataset, list_spec_settings
from echoshift.cli.json_answers import JsonOption, print_json
from echoshift.cli.spec_options import ManifestsOption
from echoshift.cli.terminal import print_table
from echoshift.cli.train_completion import STAGES, list_grid_titles, list_preset_stages, list_stage_settings
from echoshift.pipeline.errors import RunError, suggest
from echoshift.pipeline.places import MANIFESTS_DIR, list_cards

if TYPE_CHECKING:
    from echoshift.cli.setting_keys import SettingKey


class Kind(StrEnum):
    """Lists what can be listed."""

    datasets = "datasets"
    encoders = "encoders"
    recipes = "recipes"
    weights = "weights"
    shifts = "shifts"
    presets = "presets"
    methods = "methods"
    grids = "grids"
    settings = "settings"


_COMMANDS = {"extract": "extract", **{"align" if stage == "alignment" else stage: stage for stage in STAGES}}


def list_(
    what: Annotated[Kind, typer.Argument(help="Which names.")],
    dataset: Annotated[
        str, typer.Argument(help="Of `shifts`: this dataset's alone.", autocompletion=complete_dataset)
    ] = "",
    of: Annotated[str, typer.Option(help="Of `settings`: extract, stage1, stage2 or align; default: all.")] = "",
    manifests: ManifestsOption = MANIFESTS_DIR,
    as_json: JsonOption = False,
) -> None:
    """List the names that commands take."""
    rows = _list_rows(what, dataset, of, manifests)
    if as_json:
        print_json(rows)
        return
    columns = tuple(rows[0]) if rows else ("name",)
    print_table(what.value, columns, [["-" if cell is None else cell for cell in row.values()] for row in rows])


def _list_rows(what: Kind, dataset: str, of: str, manifests: Path) -> list[dict[str, object]]:
    """List a row a name, its columns by name."""
    if what == Kind.datasets:
        from echoshift.pipeline.cards import read_dataset_card

        cards = [read_dataset_card(name, manifests) for name in list_cards(manifests)]
        return [{"name": c.name, "title": c.title, "task": c.task, "n_classes": len(c.classes)} for c in cards]
    if what == Kind.encoders:
        from echoshift.extract.encoders.registry import list_encoders

        entries = list_encoders().values()
        return [{"name": e.name, "modality": e.modality, "outputs": ", ".join(e.default_outputs)} for e in entries]
    if what == Kind.recipes:
        from echoshift.extract.recipes import PRESETS

        return [{"name": preset.name, "summary": preset.summary} for preset in PRESETS.values()]
    if what == Kind.weights:
        from echoshift.extract.weights.catalogue import read_catalogue

        return [{"name": e.name, "encoder": e.encoder, "licence": e.licence} for e in read_catalogue().values()]
    if what == Kind.shifts:
        from echoshift.pipeline.cards import read_dataset_card

        cards = [read_dataset_card(name, manifests) for name in ([dataset] if dataset else list_cards(manifests))]
        return [{"name": shift.name, "dataset": card.name} for card in cards for shift in card.shifts]
    if what == Kind.presets:
        return [{"name": name, "stages": ", ".join(stages)} for name, stages in list_preset_stages().items()]
    if what == Kind.methods:
        from echoshift.train.alignment.method import list_methods

        return [{"name": name, "how": f"align --set alignment.method={name}"} for name in list_methods()]
    if what == Kind.grids:
        return [{"name": name, "title": title} for name, title in list_grid_titles()]
    return _list_settings(of)


def _list_settings(of: str) -> list[dict[str, object]]:
    if of and of not in _COMMANDS:
        raise RunError(f"no settings of {of!r}; {suggest(of, _COMMANDS)}")
    rows: list[dict[str, object]] = []
    for command, name in _COMMANDS.items():
        if of in ("", command):
            keys: list[SettingKey] = list_spec_settings() if name == "extract" else list_stage_settings(name)
            rows += [{"of": command, "key": key.key, "kind": key.kind, "default": key.default} for key in keys]
    return rows
