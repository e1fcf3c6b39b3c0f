"""Reads what a user changes of a configuration: TOML files and `key=value` with dots."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.suggestions import suggest

Settings = dict[str, Any]
Config = TypeVar("Config", bound=BaseModel)


def read_settings(path: Path) -> Settings:
    """Read a TOML file; raises RunError naming it where it is missing or isn't TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise RunError(f"there is no configuration {path}; write one, or leave out --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} isn't valid TOML: {error}") from error


def parse_override(text: str) -> Settings:
    """Turn `training.lr=1e-3` into {"training": {"lr": 0.001}}; values as in TOML, anything else is text."""
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise RunError(f"override {text!r} isn't key=value, such as training.lr=1e-3")
    parsed: Any = _parse_value(value.strip())
    for name in reversed(names):
        parsed = {name: parsed}
    return dict(parsed)


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Lay settings over others, table by table; nothing is changed in place."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        is_table = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_settings(under, value) if is_table else value  # type: ignore[arg-type]
    return merged


def make_config(kind: type[Config], settings: Mapping[str, Any], place: str) -> Config:
    """Make a configuration; raises RunError naming the place and each key at fault, with the nearest that exists."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        faults = [_describe_fault(kind, fault["type"], fault["loc"], fault["msg"]) for fault in error.errors()]
        raise RunError(f"{place}: {'; '.join(faults)}") from error


def _describe_fault(kind: type[BaseModel], fault: str, place: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, place)) or "configuration"
    if fault != "extra_forbidden":
        return f"{key}: {message.removeprefix('Value error, ')}"
    model: Any = kind
    for name in place[:-1]:
        model = getattr(model.model_fields.get(name), "annotation", None)
        if model is None or not hasattr(model, "model_fields"):
            return f"{key}: no such key"
    return f"{key}: no such key; {suggest(str(place[-1]), model.model_fields, listed_by='echoshift list settings')}"


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text
