"""Finds what other distributions add to echoshift by entry points, and says where it came from."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from echoshift.pipeline.errors import PluginError

ENCODER_GROUP = "echoshift.encoders"
METHOD_GROUP = "echoshift.methods"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One thing from outside.

    Attributes:
        name: of the entry point.
        found: what the entry point names.
        source: distribution, version, `module:attribute` and the sha256 of the module's file, for stores and records.
    """

    name: str
    found: Any
    source: str


def list_plugin_names(group: str) -> tuple[str, ...]:
    """List the names that distributions on the path add to a group, sorted; run none of their code."""
    return tuple(sorted({entry.name for entry in _find_entries(group, tuple(sys.path))}))


def load_plugin(group: str, name: str) -> Plugin | None:
    """Load what a distribution adds by this name; None where none does.

    Raises PluginError, with the distribution's name, where two of them do, and where its code can't be imported.
    """
    return _load(group, name, tuple(sys.path))


def describe_plugin_versions() -> dict[str, str]:
    """Return the version of every distribution that adds an encoder: they have a part in a feature's value."""
    entries = _find_entries(ENCODER_GROUP, tuple(sys.path))
    return {entry.dist.name: entry.dist.version for entry in entries if entry.dist is not None}


@lru_cache(maxsize=8)
def _find_entries(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read the entry points of all distributions on `path`, which is sys.path: a changed one is read again."""
    return tuple(entry_points(group=group))


@lru_cache(maxsize=32)
def _load(group: str, name: str, path: tuple[str, ...]) -> Plugin | None:
    entries = [entry for entry in _find_entries(group, path) if entry.name == name]
    if not entries:
        return None
    if len(entries) > 1:
        places = ", ".join(_name_place(entry) for entry in entries)
        raise PluginError(f"{len(entries)} distributions add {name!r} to {group}: {places}; uninstall all but one")
    [entry] = entries
    place = _name_place(entry)
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise PluginError(f"{place}: {name!r} of {group} isn't a name of letters, digits, _ and -; rename it")
    try:
        found = entry.load()
    except Exception as error:  # a stranger's module may raise anything
        raise PluginError(f"{place}, {name!r} of {group}, can't be loaded: {type(error).__name__}: {error}") from error
    return Plugin(name, found, f"{place}{_describe_file(entry.module)}")


def _name_place(entry: EntryPoint) -> str:
    distribution = "a distribution without a name" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    return f"{distribution} ({entry.value})"


def _describe_file(module: str) -> str:
    file = getattr(sys.modules[module], "__file__", None)
    return f", file's sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()}" if file else ""
