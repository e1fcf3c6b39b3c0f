"""Reads the catalogue of checkpoints that can be installed by name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echoshift.extract.encoders.registry import ENCODERS
from echoshift.pipeline.errors import WeightsError
from echoshift.pipeline.suggestions import suggest

CATALOGUE_PATH = Path(__file__).with_name("catalogue.toml")

FormatName = Literal[
    "pytorchvideo",
    "pyslowfast",
    "mmaction2-slowfast",
    "mmaction2-slowonly",
    "piergiaj-i3d",
    "flax-i3d",
    "vggsound",
    "bn-inception",
]


class CatalogueEntry(BaseModel):
    """One checkpoint: where its file comes from, which network it fits and how its tensors are named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    encoder: str
    format: FormatName
    file: str
    licence: str
    classes: str
    url: str | None = None
    package: str | None = None
    version: str | None = None
    package_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    member: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    sha256_prefix: str | None = Field(default=None, pattern="^[0-9a-f]{8}$")
    preferred: bool = False
    note: str = ""

    @model_validator(mode="after")
    def _check_source(self) -> CatalogueEntry:
        parts = (self.package, self.version, self.package_sha256, self.member)
        if any(parts) and not all(parts):
            raise ValueError("package, version, package_sha256 and member belong together")
        if self.url and self.package:
            raise ValueError("a checkpoint comes from a url or from a package")
        if self.encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {self.encoder!r}; {suggest(self.encoder, ENCODERS)}")
        return self

    @property
    def source(self) -> str:
        """Where the file comes from, for people."""
        if self.package:
            return f"package {self.package}=={self.version}, {self.member}"
        return self.url or f"your own {self.file}"


class _Catalogue(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[CatalogueEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> _Catalogue:
        names = [entry.name for entry in self.weights]
        preferred = [entry.encoder for entry in self.weights if entry.preferred]
        for what, values in (("name", names), ("preferred entry of encoder", preferred)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is listed twice")
        return self


def read_catalogue_file(path: Path) -> Mapping[str, CatalogueEntry]:
    """Read a catalogue by name; raises WeightsError with the file and the field at fault."""
    try:
        catalogue = _Catalogue.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise WeightsError(f"the catalogue {path} can't be read: {error}") from error
    return MappingProxyType({entry.name: entry for entry in catalogue.weights})


@cache
def read_catalogue() -> Mapping[str, CatalogueEntry]:
    """Read the catalogue that comes with echoshift."""
    return read_catalogue_file(CATALOGUE_PATH)


def find_catalogue_entry(name: str) -> CatalogueEntry:
    """Find a checkpoint by name; raises WeightsError with the nearest name, or with all of them."""
    catalogue = read_catalogue()
    try:
        return catalogue[name]
    except KeyError as error:
        hint = suggest(name, catalogue, listed_by="echoshift weights ls", there="the catalogue has")
        raise WeightsError(f"there are no weights {name!r}; {hint}") from error
