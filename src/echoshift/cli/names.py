"""`echoshift list`: the names that commands take."""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from echoshift.cli.completion import (
    complete_dataset,
    list_grid_titles,
    list_preset_stages,
)
from echoshift.cli.options import ManifestsOption
from echoshift.cli.terminal import JsonOption, print_json, print_table
from echoshift.pipeline.errors import RunError, suggest
from echoshift.pipeline.places import MANIFESTS_DIR, list_cards


@dataclass(frozen=True, slots=True)
class SettingKey:
    """One setting.

    Attributes:
        key: such as training.lr.
        kind: the type in words, such as `float`, `text` or `list`.
        default: the field's, None also where it has none.
    """

    key: str
    kind: str
    default: Any


def list_setting_keys(model: type[BaseModel], prefix: str = "") -> list[SettingKey]:
    """List the settings below a model, tables within tables, in the order of their fields; `prefix` ends in a dot."""
    keys: list[SettingKey] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += list_setting_keys(annotation, f"{prefix}{name}.")
            continue
        default = None if field.default is PydanticUndefined else field.default
        if field.default_factory is not None:
            default = field.default_factory()  # type: ignore[call-arg]
        keys.append(SettingKey(f"{prefix}{name}", _name_kind(annotation), default))
    return keys


def _name_kind(annotation: Any) -> str:
    words = []
    union = get_origin(annotation) in (Union, types.UnionType)
    for part in get_args(annotation) if union else (annotation,):
        origin = get_origin(part)
        if origin is Literal:
            words.append(" | ".join(map(str, get_args(part))))
        elif part is type(None):
            words.append("none")
        elif part is str:
            words.append("text")
        elif origin in (tuple, list) or part in (tuple, list):
            words.append("list")
        elif origin is not None:
            words.append("table")
        else:
            words.append(getattr(part, "__name__", str(part)))
    return " | ".join(dict.fromkeys(words))


Kind = Literal["datasets", "encoders", "recipes", "weights", "shifts", "presets", "methods", "grids", "settings"]


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
    print_table(what, columns, [["-" if cell is None else cell for cell in row.values()] for row in rows])


def _list_rows(what: Kind, dataset: str, of: str, manifests: Path) -> list[dict[str, object]]:
    """List a row a name, its columns by name."""
    if what == "datasets":
        from echoshift.pipeline.cards import read_dataset_card

        cards = [read_dataset_card(name, manifests) for name in list_cards(manifests)]
        return [{"name": c.name, "title": c.title, "task": c.task, "n_classes": len(c.classes)} for c in cards]
    if what == "encoders":
        from echoshift.extract.encoders.registry import list_encoders

        entries = list_encoders().values()
        return [{"name": e.name, "modality": e.modality, "outputs": ", ".join(e.default_outputs)} for e in entries]
    if what == "recipes":
        from echoshift.extract.recipes import PRESETS

        return [{"name": preset.name, "summary": preset.summary} for preset in PRESETS.values()]
    if what == "weights":
        from echoshift.extract.weights.catalogue import read_catalogue

        return [{"name": e.name, "encoder": e.encoder, "licence": e.licence} for e in read_catalogue().values()]
    if what == "shifts":
        from echoshift.pipeline.cards import read_dataset_card

        cards = [read_dataset_card(name, manifests) for name in ([dataset] if dataset else list_cards(manifests))]
        return [{"name": shift.name, "dataset": card.name} for card in cards for shift in card.shifts]
    if what == "presets":
        return [{"name": name, "stages": ", ".join(stages)} for name, stages in list_preset_stages().items()]
    if what == "methods":
        from echoshift.train.alignment.method import list_methods

        return [{"name": name, "how": f"align --set alignment.method={name}"} for name in list_methods()]
    if what == "grids":
        return [{"name": name, "title": title} for name, title in list_grid_titles()]
    return _list_settings(of)


def _list_settings(of: str) -> list[dict[str, object]]:
    from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec
    from echoshift.train.alignment.config import AlignmentStageConfig
    from echoshift.train.stage1.config import Stage1Config
    from echoshift.train.stage2.config import Stage2Config

    models: dict[str, dict[str, type[BaseModel]]] = {
        "extract": {"clip.": ClipSpec, "frame.": FrameSpec, "audio.": AudioSpec},
        "stage1": {"": Stage1Config},
        "stage2": {"": Stage2Config},
        "align": {"": AlignmentStageConfig},
    }
    if of and of not in models:
        raise RunError(f"no settings of {of!r}; {suggest(of, models)}")
    return [
        {"of": command, "key": key.key, "kind": key.kind, "default": key.default}
        for command, parts in models.items()
        if of in ("", command)
        for prefix, model in parts.items()
        for key in list_setting_keys(model, prefix)
    ]
