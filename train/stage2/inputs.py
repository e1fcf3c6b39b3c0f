"""What Stage 2 and alignment read: features that Stage 1 left, that were named, or that lie in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from echoshift.pipeline.cards import Shift
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.specs import fingerprint
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.features import StreamInputs
from echoshift.train.runs import RESULTS, RunRecord, hash_config, read_runs
from echoshift.train.splits import DataPlaces
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage2.config import StreamConfig
from echoshift.train.steps import RECORD, hash_json

if TYPE_CHECKING:
    from echoshift.train.settings import RunSettings

TABLE = "table.parquet"


@dataclass(frozen=True, slots=True)
class NeededStage1:
    """One run of Stage 1 that a run on cached features reads."""

    config: Stage1Config
    shift: Shift
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Tell runs apart: hash of the configuration, shift, seed."""
        return hash_config(self.config.describe()), self.shift.name, self.seed


def list_needed(
    settings: RunSettings, shift: Shift, seed: int, runs_dir: Path, records: Sequence[RunRecord] | None = None
) -> list[NeededStage1]:
    """List the runs of Stage 1 that a run lacks; `records` are those of the results file, if read."""
    known = read_runs(runs_dir / RESULTS) if records is None else records
    runs = [NeededStage1(stream.stage1, shift, seed) for stream in settings.streams if stream.reads_stage1]
    return list({run.key: run for run in runs if _find_record(runs_dir, known, *run.key) is None}.values())


def find_inputs(
    places: DataPlaces, settings: RunSettings, shift: Shift, seed: int, runs_dir: Path
) -> dict[str, StreamInputs]:
    """Find what each stream reads, by its name: files that were named, what Stage 1 left, or the cache.

    Raises RunError naming what is missing, and how to make it.
    """
    records = read_runs(runs_dir / RESULTS) if any(stream.reads_stage1 for stream in settings.streams) else []
    found = {}
    for settings_of in settings.streams:
        stream, stage1 = settings_of.stream, settings_of.stage1
        if stream.features:
            inputs = name_files(stream, shift.name, seed)
        elif settings_of.reads_stage1:
            inputs = find_stage1_outputs(runs_dir, records, hash_config(stage1.describe()), shift.name, seed)
        else:
            inputs = find_cached(places.cache_dir, places.card.name, stage1.visual.encoder, stage1.sound.encoder)
        found[stream.name] = inputs
    return found


def find_stage1_outputs(
    runs_dir: Path, records: Iterable[RunRecord], config_hash: str, shift: str, seed: int
) -> StreamInputs:
    """Find what the last run of Stage 1 with these settings left; raises RunError saying what to run."""
    record = _find_record(runs_dir, records, config_hash, shift, seed)
    if record is None:
        raise RunError(
            f"{shift}, seed {seed}: Stage 1 with these settings has left nothing in {runs_dir}; run "
            f"`echoshift stage1 --shift {shift} --seed {seed}` with the same settings"
        )

    def find_store(name: str) -> Path | None:
        return _find_store(runs_dir, record.steps[name]) if name in record.steps else None

    features = find_store("features")
    assert features is not None, "_find_record looked"
    named = ("table", "features", "train_features")
    return StreamInputs(
        key=hash_json({name: record.steps[name] for name in named if name in record.steps}),
        features=features,
        table=_find_table(runs_dir, record),
        train_features=find_store("train_features"),
        features_without_sound=find_store("features_without_sound"),
        without_sound_key=record.steps.get("features_without_sound", ""),
    )


def name_files(stream: StreamConfig, shift: str, seed: int) -> StreamInputs:
    """Name the files of a stream that were made elsewhere; `{shift}` and `{seed}` in paths are filled in.

    Raises RunError for one that isn't there, and where neither a table nor a store of sound says what is heard.
    """

    def locate(path: str) -> Path | None:
        if not path:
            return None
        found = Path(path.format(shift=shift, seed=seed)).absolute()
        if not found.exists():
            raise RunError(f"stream {stream.name}: no file {found}")
        return found

    features, table, sound = locate(stream.features), locate(stream.table), locate(stream.sound)
    assert features is not None, "a stream without features of its own reads Stage 1's"
    if table is None and sound is None:
        raise RunError(f"stream {stream.name}: name a `table` of Stage 1 or a store of `sound` beside {features}")
    train_features = locate(stream.train_features)
    named = [_name_store(path) for path in (features, sound, train_features) if path is not None]
    if table is not None:
        named.append(hashlib.sha256(table.read_bytes()).hexdigest())
    return StreamInputs(hash_json(named), features, table, sound, train_features)


def find_cached(cache: Place, dataset: str, visual: str, sound: str) -> StreamInputs:
    """Find the stores of pooled features of a dataset that two encoders filled; a stream of them has no table.

    Of audio with views and clean audio it is the clean one. Raises RunError where none is found, or more than one,
    saying how to name it.
    """
    found = {}
    for encoder in (visual, sound):
        stores = [
            path
            for path in list_stores(cache)
            if (store := open_store(path)).attributes["dataset"] == dataset
            and store.spec.encoder == encoder
            and "pooled" in [output.name for output in store.spec.outputs]
        ]
        # Views of sound are for training Stage 1; where clean sound has a store of its own, that one is meant.
        stores = [path for path in stores if open_store(path).spec.n_sound_views == 1] or stores
        if len(stores) != 1:
            there = f"{len(stores)}: {', '.join(map(str, stores))}" if stores else "none"
            raise RunError(
                f"pooled features of {dataset} by {encoder} are wanted from one store, and {cache} has {there}; "
                + ("name them: networks=[{features=…, sound=…}]" if stores else f"extract them (--encoders {encoder})")
            )
        found[encoder] = Path(str(stores[0]))
    return StreamInputs(
        hash_json([_name_store(found[visual]), _name_store(found[sound])]), found[visual], sound=found[sound]
    )


def _find_record(
    runs_dir: Path, records: Iterable[RunRecord], config_hash: str, shift: str, seed: int
) -> RunRecord | None:
    """Find the last record whose table and features are still there."""
    for record in reversed(list(records)):
        if (record.stage, record.config_hash, record.shift, record.seed) != ("stage1", config_hash, shift, seed):
            continue
        if not {"table", "features"} <= set(record.steps):
            continue
        features = runs_dir / "steps" / f"features-{record.steps['features']}" / RECORD
        if _find_table(runs_dir, record).is_file() and features.is_file():
            return record
    return None


def _find_table(runs_dir: Path, record: RunRecord) -> Path:
    return runs_dir / "steps" / f"table-{record.steps['table']}" / TABLE


def _find_store(runs_dir: Path, key: str) -> Path:
    folder = runs_dir / "steps" / f"features-{key}"
    try:
        return folder / str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["outcome"]["store"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder} holds no store of features: {error}; run Stage 1 again") from error


def _name_store(path: Path) -> str:
    """Name a store by its specification and what its rows were made from."""
    store = open_store(path)
    digests = hashlib.sha256(store.read_array("digest").tobytes() + store.read_array("state").tobytes())
    return f"{fingerprint(store.spec)} {digests.hexdigest()}"
