"""How a command answers a program: the option --json, and any report as one JSON document on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Annotated, Any

import typer

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there; numbers unrounded.")
]


def print_json(document: object) -> None:
    """Print a document: on a terminal indented, elsewhere in one line. Raises TypeError as `make_jsonable`."""
    indent = 2 if sys.stdout.isatty() else None
    typer.echo(json.dumps(make_jsonable(document), indent=indent, ensure_ascii=False, allow_nan=False))


def make_jsonable(value: object) -> Any:
    """Put a value into what JSON can hold, without rounding.

    Dataclasses and pydantic models become objects of their fields, paths and locations text, times ISO 8601, sets
    sorted lists, NumPy's scalars and arrays numbers and lists. What has no finite number is null, as JSON has no NaN.
    Raises TypeError naming the type of anything else, so that nothing goes out as its repr.
    """
    if value is None or isinstance(value, bool | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return make_jsonable(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    model_fields = getattr(type(value), "model_fields", None)  # a pydantic model, told without importing pydantic
    if model_fields is not None:
        return {name: make_jsonable(getattr(value, name)) for name in model_fields}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: make_jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(make_jsonable(key)): make_jsonable(each) for key, each in value.items()}
    if isinstance(value, Set):
        return sorted((make_jsonable(each) for each in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [make_jsonable(each) for each in value]
    if hasattr(value, "tolist"):  # an array, or a scalar that is none of Python's numbers
        return make_jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in JSON")
