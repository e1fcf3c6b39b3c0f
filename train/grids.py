"""Grids: tables of runs described in TOML files, and the runs that they plan."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import EchoshiftError, RunError, suggest
from echoshift.train.runs import hash_config

GRIDS_DIR = Path(__file__).resolve().parent / "grids"

ColumnGroup = Literal["silent", "rare"]
Stage = Literal["stage1", "stage2", "alignment"]


class GridModel(BaseModel):
    """Base of all parts of a grid: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedTable(GridModel):
    """The published table that a grid repeats, by the fields `paper` and `table` of cards' published numbers."""

    paper: str
    table: str


class GridRow(GridModel):
    """One row: a variant, as `part.field=value` overrides of the command line's configuration.

    `published` is the `method` under which cards list the row's published number, or "". `stage` is the stage of the
    row's runs where it differs from the grid's.
    """

    name: str = Field(min_length=1)
    stage: Stage | None = None
    overrides: tuple[str, ...] = ()
    published: str = ""

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals or not all(key.split(".")):
                raise ValueError(f"{override!r} is not part.field=value")
        _require_distinct("field", [override.partition("=")[0] for override in overrides])
        return overrides


class Grid(GridModel):
    """A table of runs: its rows, times shifts, times seeds.

    Attributes:
        name: the file's, without its ending.
        stage: stage of the runs, unless a row names another.
        task: the only task that the grid is for; None: both.
        baseline: the row that the others are tested against, "" for none.
        seeds, shifts: unless the command line says otherwise; no shifts: all of the card that `sources` admits.
        sources: how many source domains a shift has: `single`, `several`, or `any`. Published means are over those.
        columns: further columns of the table: `silent` (silent, audible) and `rare` (rare, frequent).
        published: the published table that it repeats.
    """

    name: str
    title: str
    stage: Stage
    task: Literal["single-label", "multi-label"] | None = None
    baseline: str = ""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    shifts: tuple[str, ...] = ()
    sources: Literal["single", "several", "any"] = "single"
    columns: tuple[ColumnGroup, ...] = ()
    published: PublishedTable | None = None
    rows: tuple[GridRow, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_rows(self) -> Grid:
        names = [row.name for row in self.rows]
        _require_distinct("row", names)
        if self.baseline and self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no row; {suggest(self.baseline, names)}")
        if self.published is None and any(row.published for row in self.rows):
            raise ValueError("rows name published methods, but `published` names no paper and table")
        return self


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a grid; `config` (JSON), stage, shift and seed decide what is trained."""

    row: str
    stage: Stage
    shift: str
    seed: int
    overrides: tuple[str, ...]
    config: Mapping[str, Any]
    config_hash: str


def list_grids() -> tuple[str, ...]:
    """List the names of the grids that come with echoshift."""
    return tuple(sorted(path.stem for path in GRIDS_DIR.glob("*.toml")))


def read_grid(name_or_path: str | Path) -> Grid:
    """Read a grid by its name, or from a file if that ends in .toml; raises RunError naming the file and the key."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = GRIDS_DIR / f"{name_or_path}.toml"
        if str(name_or_path) not in list_grids():
            raise RunError(f"there is no grid {str(name_or_path)!r}; {_suggest_grid(str(name_or_path))}")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise RunError(f"no grid file {path}; {_suggest_grid(path.stem)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid TOML: {error}") from error
    if "name" in fields:
        raise RunError(f"{path}: name: a grid is named by its file")
    try:
        return Grid.model_validate({"name": path.stem, **fields})
    except ValidationError as error:
        raise RunError(f"{path}: {'; '.join(_describe_fault(fault) for fault in error.errors())}") from error


def list_shifts(grid: Grid, card: DatasetCard) -> tuple[str, ...]:
    """List the names of a card's shifts that have as many source domains as the grid wants."""
    admitted = {"single": (True,), "several": (False,), "any": (True, False)}[grid.sources]
    return tuple(shift.name for shift in card.shifts if (len(shift.source) == 1) in admitted)


def plan_runs(
    grid: Grid,
    card: DatasetCard,
    resolve: Callable[[Stage, tuple[str, ...]], Mapping[str, Any]],
    *,
    seeds: Sequence[int] = (),
    shifts: Sequence[str] = (),
) -> list[PlannedRun]:
    """Plan a grid's runs seed by seed, and within a seed shift by shift, so that whole seeds finish early.

    `resolve` returns the whole configuration, as JSON, of a row's stage and overrides. `seeds` and `shifts` replace
    the grid's. Raises RunError for a grid of another task, a shift that the card lacks, and rows that are the same run;
    an error of `resolve` gets a note that names the row.
    """
    if grid.task not in (None, card.task):
        raise RunError(f"grid {grid.name} is for {grid.task} datasets; {card.name} is {card.task}")
    known = [shift.name for shift in card.shifts]
    shifts = tuple(shifts or grid.shifts or list_shifts(grid, card))
    if not shifts:
        raise RunError(f"{card.name} has no shift for grid {grid.name} (sources: {grid.sources}); add it to the card")
    for shift in shifts:
        if shift not in known:
            hint = suggest(shift, known, listed_by=f"echoshift list shifts {card.name}")
            raise RunError(f"{card.name} has no shift {shift!r}; {hint}")
    seeds = tuple(seeds or grid.seeds)
    for what, values in (("shift", shifts), ("seed", seeds)):
        try:
            _require_distinct(what, values)
        except ValueError as error:
            raise RunError(f"grid {grid.name}: {error}") from error
    configs = _resolve_rows(grid, resolve)
    return [
        PlannedRun(
            row=row.name,
            stage=row.stage or grid.stage,
            shift=shift,
            seed=seed,
            overrides=row.overrides,
            config=configs[row.name],
            config_hash=hash_config(configs[row.name]),
        )
        for seed in seeds
        for shift in shifts
        for row in grid.rows
    ]


def _resolve_rows(
    grid: Grid, resolve: Callable[[Stage, tuple[str, ...]], Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    configs: dict[str, Mapping[str, Any]] = {}
    names: dict[str, str] = {}
    for row in grid.rows:
        try:
            configs[row.name] = resolve(row.stage or grid.stage, row.overrides)
        except EchoshiftError as error:
            error.add_note(f"in row {row.name!r} of grid {grid.name}")
            raise
        twin = names.setdefault(hash_config(configs[row.name]), row.name)
        if twin != row.name:
            raise RunError(f"grid {grid.name}: rows {twin!r} and {row.name!r} are the same configuration")
    return configs


def _require_distinct(what: str, values: Sequence[object]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{what} {value!r} is listed twice")


def _suggest_grid(name: str) -> str:
    return suggest(name, list_grids(), listed_by="echoshift list grids")


def _describe_fault(fault: Mapping[str, Any]) -> str:
    *place, key = fault["loc"] or ("grid",)
    words = fault["msg"]
    if fault["type"] == "extra_forbidden":
        model: type[GridModel] = GridRow if place[:1] == ["rows"] else PublishedTable if place else Grid
        words = f"no such key; {suggest(str(key), (name for name in model.model_fields if name != 'name' or place))}"
    return f"{'.'.join(map(str, (*place, key)))}: {words}"
