"""Lists the keys that `--set` takes, as the fields of a configuration's models say."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


@dataclass(frozen=True, slots=True)
class SettingKey:
    """One setting.

    Attributes:
        key: such as training.lr.
        kind: the type in words, such as `float`, `text` or `list`.
        default: the field's, None also where it has none.
        choices: what it may be, where that is a closed list; () otherwise.
    """

    key: str
    kind: str
    default: Any
    choices: tuple[str, ...]


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
        keys.append(SettingKey(f"{prefix}{name}", _name_kind(annotation), default, _list_choices(annotation)))
    return keys


def _list_parts(annotation: Any) -> tuple[Any, ...]:
    """Take a union apart; anything else is its own only part."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _list_choices(annotation: Any) -> tuple[str, ...]:
    choices: list[str] = []
    for part in _list_parts(annotation):
        if get_origin(part) is Literal:
            choices += map(str, get_args(part))
        elif part is bool:
            choices += ("true", "false")
    return tuple(choices)


def _name_kind(annotation: Any) -> str:
    words = []
    for part in _list_parts(annotation):
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
