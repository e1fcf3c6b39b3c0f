"""Puts a stage's configuration together: defaults, preset, what a dataset needs, the user's file and overrides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.suggestions import suggest
from echoshift.train.overrides import Settings, make_config, merge_settings, parse_override, read_settings

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class PresetFiles(Generic[Config]):
    """A stage's files: `presets/NAME.toml` and `datasets/NAME.toml` in its folder.

    A dataset's file has the tables `any`, one of each preset's name, others that are asked for, such as `flow`, and
    such for one preset alone, `released-flow`.
    """

    stage: str
    kind: type[Config]
    folder: Path
    other_tables: frozenset[str] = frozenset()

    def list_presets(self) -> list[str]:
        """List the presets by name."""
        return sorted(path.stem for path in (self.folder / "presets").glob("*.toml"))

    def resolve(
        self,
        card: DatasetCard,
        preset: str,
        file: Path | None,
        overrides: Sequence[str],
        *,
        foreign: frozenset[str] = frozenset(),
        tables: Iterable[str] = (),
    ) -> Config:
        """Make the configuration for a dataset; what comes later wins.

        1. the fields' defaults; 2. the preset; 3. what the dataset needs: the tables `any`, the preset's name,
        `tables`, and those of the preset (PRESET-TABLE); 4. the user's TOML file, without the parts that are
        `foreign`, another stage's; 5. overrides `key=value`. Raises RunError naming place and key.
        """
        settings = read_settings(self._find_preset(preset))
        tables = list(tables)
        wanted = ["any", preset, *tables, *(f"{preset}-{table}" for table in tables)]
        for table in self._read_dataset_tables(card, wanted):
            settings = merge_settings(settings, table)
        if file is not None:
            own = {part: values for part, values in read_settings(file).items() if part not in foreign}
            settings = merge_settings(settings, own)
        for override in overrides:
            settings = merge_settings(settings, parse_override(override))
        return make_config(self.kind, settings, f"configuration of {self.stage} ({file or preset})")

    def _find_preset(self, name: str) -> Path:
        if name not in self.list_presets():
            hint = suggest(name, self.list_presets(), listed_by="echoshift list presets")
            raise RunError(f"there is no preset {name!r} of {self.stage}; {hint}")
        return self.folder / "presets" / f"{name}.toml"

    def _read_dataset_tables(self, card: DatasetCard, wanted: Sequence[str]) -> list[Settings]:
        path = self.folder / "datasets" / f"{card.name}.toml"
        if not path.is_file():
            return []
        tables = read_settings(path)
        presets = self.list_presets()
        combined = {f"{preset}-{table}" for preset in presets for table in self.other_tables}
        known = ("any", *sorted(self.other_tables), *presets, *sorted(combined))
        for name in tables:
            if name not in known:
                raise RunError(f"{path}: unknown table {name!r}; {suggest(name, known)}")
        return [tables[name] for name in wanted if name in tables]
