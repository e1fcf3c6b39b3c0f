"""Finds what Stage 1, or whoever else made features, left for Stage 2, and reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.specs import fingerprint
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.opening import list_stores, open_store
from echoshift.train.cached.feature_bank import Rows
from echoshift.train.cached.feature_rows import FeatureRows, Sound, read_sound, read_visual
from echoshift.train.cached.larger_than_memory import count_row_bytes, open_rows
from echoshift.train.prediction_table import PredictionTable, read_prediction_table
from echoshift.train.runs import RunRecord
from echoshift.train.stage2.config import StreamConfig
from echoshift.train.steps import RECORD, hash_json

TABLE = "table.parquet"


@dataclass(frozen=True, slots=True)
class StreamInputs:
    """The files that one stream reads.

    Attributes:
        key: names what is in those that are trained on.
        without_sound_key: names what is in `features_without_sound`.
        features: a store of all segments.
        table: Stage 1's table; None where the features come from elsewhere and have none.
        sound: a store of sound, where there is no table.
        train_features: a store of augmented views of the train splits; None: training takes those of `features`.
        features_without_sound: a store of the target's test split, made as if there were no sound.
    """

    key: str
    features: Path
    table: Path | None = None
    sound: Path | None = None
    train_features: Path | None = None
    features_without_sound: Path | None = None
    without_sound_key: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StreamFeatures:
    """A stream's features in memory: rows that are trained on and rows that are tested; they may be the same."""

    train: Rows
    test: Rows


def has_stage1_outputs(runs_dir: Path, records: Iterable[RunRecord], config_hash: str, shift: str, seed: int) -> bool:
    """Return whether a run of Stage 1 with these settings left its table and features."""
    return _find_record(runs_dir, records, config_hash, shift, seed) is not None


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
            raise RunError(f"stream {stream.name}: there is no {found}")
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

    Of sound with views and clean sound it is the clean one. Raises RunError where there is none, or more than one,
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


def stays_stored(inputs: StreamInputs, n_segments: int, max_bytes: int) -> bool:
    """Return whether the features that are trained on take more than `max_bytes`, so that they are read by shards."""
    return n_segments * count_row_bytes(open_store(inputs.train_features or inputs.features)) > max_bytes


def hears_clips(inputs: StreamInputs) -> bool:
    """Return whether the store of sound has the sound around each clip of the pictures (recipe B), not a segment's."""
    if inputs.table is not None or inputs.sound is None:
        return False
    seen, heard = open_store(inputs.features), open_store(inputs.sound)
    return heard.layout.n_clips // heard.spec.n_sound_views == seen.layout.n_clips // seen.spec.n_entries_per_clip > 1


def open_stream(
    inputs: StreamInputs, segment_ids: Sequence[str], train_ids: Sequence[str], max_bytes: int
) -> StreamFeatures:
    """Read a stream's features of segments; those of `train_ids` once more where training has views of its own.

    What would take more than `max_bytes` (half of it where there are two stores) stays in its store. Raises StoreError
    or RunError naming the first segment that isn't there.
    """
    table = None if inputs.table is None else read_prediction_table(inputs.table)
    if inputs.train_features is not None and train_ids:
        max_bytes //= 2
    test = _read_rows(inputs, inputs.features, table, segment_ids, max_bytes)
    if inputs.train_features is None or not train_ids:
        return StreamFeatures(test, test)
    return StreamFeatures(_read_rows(inputs, inputs.train_features, table, train_ids, max_bytes), test)


def _read_rows(
    inputs: StreamInputs, features: Path, table: PredictionTable | None, segment_ids: Sequence[str], max_bytes: int
) -> Rows:
    store = open_store(features)
    if table is not None:
        sound = _read_heard(table, segment_ids)
    else:
        assert inputs.sound is not None, "name_files looked"
        n_clips = store.layout.n_clips // store.spec.n_entries_per_clip
        sound = read_sound(open_store(inputs.sound), segment_ids, n_clips)
    if len(segment_ids) * count_row_bytes(store) > max_bytes:
        return open_rows(store, segment_ids, sound.audio, sound.has_audio, max_bytes, sound.clip_audio)
    return FeatureRows(tuple(segment_ids), read_visual(store, segment_ids), *sound)


def _read_heard(table: PredictionTable, segment_ids: Sequence[str]) -> Sound:
    rows = table.find(segment_ids)
    has_audio = table.has_audio[rows]
    audio = np.where(has_audio[:, None], table.audio_features[rows], np.float32(0))
    return Sound(torch.from_numpy(audio), torch.from_numpy(has_audio))


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
