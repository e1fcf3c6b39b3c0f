"""Export to npz, h5, Parquet and EPIC-100's pickle; import of features computed elsewhere."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echoshift.pipeline.errors import StoreError, suggest
from echoshift.pipeline.restricted_pickle import read_restricted_pickle
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, ImportSpec, OutputSpec
from echoshift.pipeline.store.failures import append_run
from echoshift.pipeline.store.interface import Backend, FeatureStore, ShardIndex, iterate_done_blocks
from echoshift.pipeline.store.layout import (
    DONE,
    PENDING,
    Shard,
    compute_digests,
    describe_writer,
    order_segments,
    plan_new_rows,
    plan_rows_per_shard,
    plan_shards,
)
from echoshift.pipeline.store.location import Location, Place
from echoshift.pipeline.store.open import create_store, has_store, hold_store, name_store, open_store

ExportForm = Literal["npz", "h5", "parquet", "epic100"]
Modality = Literal["rgb", "flow", "audio"]
EPIC100_NAMES: dict[Modality, str] = {"rgb": "RGB", "flow": "Flow", "audio": "Audio"}


@dataclass(frozen=True, slots=True)
class _Source:
    """One output of the done rows and their part of the index."""

    store: FeatureStore
    output: str
    rows: np.ndarray
    times: np.ndarray
    n_valid: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all values, [n, clip, …]."""
        clip_shape = next(o.shape for o in self.store.spec.outputs if o.name == self.output)
        return (len(self.rows), self.store.layout.n_clips, *clip_shape)

    @property
    def ids(self) -> np.ndarray:
        """The ids as an array of text, [n]."""
        return np.asarray([self.store.segment_ids[row] for row in self.rows.tolist()])


def export_store(store: FeatureStore, output: str, target: Path, form: ExportForm) -> int:
    """Write one output of every done row and return how many; the file appears whole or not at all.

    - npz: `features` [n, clip, ...], `segment_ids`, `times` [n, clip, 2], `n_valid` [n].
    - h5: `<segment_id>/features` [clip, ...] and `<segment_id>/times` [clip, 2], only the clips that exist.
    - parquet: a row a clip: segment_id, clip, start_s, stop_s, features (list of float32, flattened).
    - epic100: a pickle {'features': {'RGB'|'Flow'|'Audio': [n, clip, D]}, 'narration_ids': [n]}.
    Features pass through memory some 32 MB at a time, but for the pickle, which is made in memory as a whole. Nothing
    may write to the store meanwhile. Raises StoreError when nothing is done, or the output is not there.
    """
    names = [o.name for o in store.spec.outputs]
    if output not in names:
        raise StoreError(f"{store.path} has no output {output!r}; {suggest(output, names, there='it has')}")
    rows = np.flatnonzero(store.read_array("state") == DONE)
    if not len(rows):
        raise StoreError(f"{store.path} has no done row to export; run `echoshift extract` first")
    source = _Source(store, output, rows, store.read_array("times")[rows], store.read_array("n_valid")[rows])
    fresh = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    writers = {"npz": _write_npz, "h5": _write_h5, "parquet": _write_parquet, "epic100": _write_epic100}
    writers[form](fresh, source)
    fresh.replace(target)
    return len(rows)


def _write_npz(path: Path, source: _Source) -> None:
    header = {"descr": np.dtype(source.store.spec.dtype).str, "fortran_order": False, "shape": source.shape}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in iterate_done_blocks(source.store, source.output):
                file.write(np.ascontiguousarray(block.values).data)
        arrays = {"segment_ids": source.ids, "times": source.times, "n_valid": source.n_valid}
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def _write_h5(path: Path, source: _Source) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        i = 0
        for block in iterate_done_blocks(source.store, source.output):
            for row, values in zip(block.rows.tolist(), block.values, strict=True):
                group = file.create_group(source.store.segment_ids[row])
                group.create_dataset("features", data=values[: source.n_valid[i]])
                group.create_dataset("times", data=source.times[i, : source.n_valid[i]])
                i += 1


def _write_parquet(path: Path, source: _Source) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n_values = int(np.prod(source.shape[2:], dtype=np.int64))
    times_s = [("start_s", pa.float64()), ("stop_s", pa.float64())]
    features = ("features", pa.list_(pa.float32(), n_values))
    schema = pa.schema([("segment_id", pa.string()), ("clip", pa.int32()), *times_s, features])
    with pq.ParquetWriter(path, schema) as writer:
        first = 0
        for block in iterate_done_blocks(source.store, source.output):
            times = source.times[first : first + len(block.rows)][block.exists]
            first += len(block.rows)
            row, clip = np.nonzero(block.exists)
            flat = block.values[block.exists].astype(np.float32).reshape(len(row), n_values)
            columns: list[Any] = [
                pa.array([source.store.segment_ids[r] for r in block.rows[row].tolist()], pa.string()),
                pa.array(clip.astype(np.int32)),
                pa.array(times[:, 0]),
                pa.array(times[:, 1]),
                pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), n_values),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_epic100(path: Path, source: _Source) -> None:
    if len(source.shape) != 3:
        raise StoreError(f"EPIC-100's pickle holds vectors, {source.output} has the shape {source.shape[2:]} a clip")
    spec = source.store.spec
    modality = spec.frame.input if spec.frame else spec.imported.modality if spec.imported else "audio"
    if modality is None:
        raise StoreError(f"{source.store.path} was imported without --modality; EPIC-100's pickle names one")
    values = np.empty(source.shape, np.float32)
    first = 0
    for block in iterate_done_blocks(source.store, source.output):
        values[first : first + len(block.rows)] = block.values
        first += len(block.rows)
    with path.open("wb") as file:
        pickle.dump({"features": {EPIC100_NAMES[modality]: values}, "narration_ids": source.ids}, file)


ImportForm = Literal["npz", "epic100"]
_DAMAGE = (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile)


ImportedSegment = tuple[np.ndarray, np.ndarray]
"""One segment's features [clip, …] and the seconds its clips cover, [clip, 2], NaN where nothing is known."""


@dataclass(frozen=True, slots=True)
class ImportSource:
    """Segments of a source, unique and in its order, and a way to read each; `n_clips` is the most of a segment."""

    place: str
    spec: ImportSpec
    segment_ids: tuple[str, ...]
    n_clips: int
    clip_shape: tuple[int, ...]
    dtype: Literal["float16", "float32"]
    read: Callable[[str], ImportedSegment]


def open_import_source(path: Path, form: ImportForm, modality: str | None = None) -> ImportSource:
    """Open a source and look at all of it; features themselves are read later, segment by segment.

    - npz, a folder: SEGMENT_ID.npz with `features` [clip, …] or [D] and, if known, `times` [clip, 2]; or SEGMENT_ID.npy
      with the features alone. A `/` in an id is a folder.
    - npz, a file as `export` writes it: `features` [n, clip, …], `segment_ids`, `times` [n, clip, 2], `n_valid` [n].
    - epic100: a pickle {'features': {'RGB'|'Flow'|'Audio': [n, clip, D]}, 'narration_ids': [n]}; nothing in it is run.
      `modality` picks one of the three, and may be left out where there is one only.
    Nothing that pickles could run is accepted in any of them. Raises StoreError naming the file for what doesn't fit.
    """
    if not path.exists():
        raise StoreError(f"nothing to import at {path}")
    if form == "npz":
        kind = None if modality is None else _find_modality(path, modality)
        return _open_folder(path, kind) if path.is_dir() else _open_export(path, kind)
    return _open_epic100(path, modality)


def _find_modality(path: Path, modality: str) -> Modality:
    found = next((known for known in EPIC100_NAMES if known == modality.lower()), None)
    if found is None:
        raise StoreError(f"{path}: no modality {modality!r}; {suggest(modality, EPIC100_NAMES.values())}")
    return found


def _open_folder(folder: Path, modality: Modality | None) -> ImportSource:
    files: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".npz", ".npy")):
        segment_id = path.relative_to(folder).with_suffix("").as_posix()
        if segment_id in files:
            raise StoreError(f"{path}: {files[segment_id].name} holds segment {segment_id} too; remove one of them")
        files[segment_id] = path
    if not files:
        raise StoreError(f"{folder} holds no .npz and no .npy file")
    content = hashlib.sha256()
    n_clips, first = 0, None
    for segment_id, path in files.items():
        content.update(f"{segment_id}{path.suffix}\n{_hash_file(path)}\n".encode())
        features = _read_file(path)[0]
        n_clips = max(n_clips, len(features))
        first = first or (path, features.shape[1:], features.dtype)
        if features.shape[1:] != first[1]:
            raise StoreError(f"{path}: {features.shape[1:]} a clip, but {first[1]} in {first[0].name}")
        if features.dtype != first[2]:
            raise StoreError(f"{path}: {features.dtype}, but {first[2]} in {first[0].name}")
    assert first is not None, "there is a file"
    return ImportSource(
        place=str(folder),
        spec=ImportSpec(form="npz", source_sha256=content.hexdigest(), modality=modality),
        segment_ids=tuple(files),
        n_clips=n_clips,
        clip_shape=first[1],
        dtype=_choose_dtype(folder, first[2]),
        read=lambda segment_id: _read_file(files[segment_id]),
    )


def _read_file(path: Path) -> ImportedSegment:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            features, times = loaded, None
        else:
            with loaded:
                features, times = loaded["features"], loaded.get("times")
    except _DAMAGE as error:
        raise StoreError(f"{path} holds no array `features` that can be read without running code: {error}") from error
    if features.ndim == 1:
        features = features[None]
    if features.ndim < 2 or not features.size:
        raise StoreError(f"{path}: features of shape {features.shape}; they are [clip, …] or [D]")
    if times is not None and times.shape != (len(features), 2):
        raise StoreError(f"{path}: times of shape {times.shape} for {len(features)} clips; they are [clip, 2]")
    return features, np.full((len(features), 2), np.nan) if times is None else times.astype(np.float64)


def _open_export(path: Path, modality: Modality | None) -> ImportSource:
    try:
        features = _map_member(path, "features")
        with np.load(path, allow_pickle=False) as archive:
            ids, times, n_valid = (archive[name] for name in ("segment_ids", "times", "n_valid"))
    except _DAMAGE as error:
        raise StoreError(f"{path} is not an npz as `echoshift store export` writes it: {error}") from error
    n = len(ids)
    if features.ndim < 3 or features.shape[0] != n or times.shape != (*features.shape[:2], 2) or n_valid.shape != (n,):
        raise StoreError(f"{path}: features {features.shape}, times {times.shape} and {n} ids don't go together")
    if ((n_valid < 1) | (n_valid > features.shape[1])).any():
        raise StoreError(f"{path}: n_valid must be 1 to {features.shape[1]}, the number of clips")
    row_of = _index_ids(path, ids.tolist())

    def read(segment_id: str) -> ImportedSegment:
        row = row_of[segment_id]
        return np.asarray(features[row, : n_valid[row]]), times[row, : n_valid[row]]

    spec = ImportSpec(form="npz", source_sha256=_hash_file(path), modality=modality)
    shape, dtype = tuple(features.shape[2:]), _choose_dtype(path, features.dtype)
    return ImportSource(str(path), spec, tuple(row_of), features.shape[1], shape, dtype, read)


def _map_member(path: Path, name: str) -> np.ndarray:
    """Map an array of an uncompressed npz into memory; a compressed one is read whole."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[version](file)
            n_header_bytes = file.tell()
    if member.compress_type != zipfile.ZIP_STORED or dtype.hasobject or fortran:
        with np.load(path, allow_pickle=False) as loaded:
            return np.asarray(loaded[name])
    with path.open("rb") as raw:
        # The local header repeats the name, and has an extra field of its own length.
        raw.seek(member.header_offset + 26)
        lengths = np.frombuffer(raw.read(4), "<u2")
        start = member.header_offset + 30 + int(lengths.sum()) + n_header_bytes
    return np.memmap(path, dtype, "r", start, shape)


def _open_epic100(path: Path, modality: str | None) -> ImportSource:
    content = read_restricted_pickle(path)
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, dict) or "narration_ids" not in content:
        raise StoreError(f"{path}: no {{'features': {{…}}, 'narration_ids': …}} as EPIC-100's pickles hold")
    if modality is None and len(features) != 1:
        raise StoreError(f"{path} holds {', '.join(map(str, features))}; say which with --modality")
    name = modality or str(next(iter(features)))
    kind = _find_modality(path, name)
    values = next((v for k, v in features.items() if str(k).lower() == name.lower()), None)
    if values is None:
        raise StoreError(f"{path} has no features for {name}; {suggest(name, map(str, features), there='it has')}")
    array = values[:, None] if isinstance(values, np.ndarray) and values.ndim == 2 else values
    row_of = _index_ids(path, [_to_text(i) for i in content["narration_ids"]])
    if not isinstance(array, np.ndarray) or array.ndim != 3 or len(array) != len(row_of) or not array.size:
        shape = getattr(values, "shape", type(values).__name__)
        raise StoreError(f"{path}: features of {name} are {shape} for {len(row_of)} ids; they are [n, clip, D]")
    n_clips = array.shape[1]
    return ImportSource(
        place=str(path),
        spec=ImportSpec(form="epic100", source_sha256=_hash_file(path), modality=kind),
        segment_ids=tuple(row_of),
        n_clips=n_clips,
        clip_shape=tuple(array.shape[2:]),
        dtype=_choose_dtype(path, array.dtype),
        read=lambda segment_id: (array[row_of[segment_id]], np.full((n_clips, 2), np.nan)),
    )


def _to_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _index_ids(path: Path, ids: list[Any]) -> dict[str, int]:
    row_of: dict[str, int] = {}
    for row, segment_id in enumerate(map(_to_text, ids)):
        if segment_id in row_of:
            raise StoreError(f"{path}: segment {segment_id} is there twice, at {row_of[segment_id]} and {row}")
        row_of[segment_id] = row
    return row_of


def _choose_dtype(path: Path, dtype: np.dtype[Any]) -> Literal["float16", "float32"]:
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise StoreError(f"{path}: features of type {dtype}; they are float16, float32 or float64")
    return "float16" if dtype.itemsize == 2 else "float32"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """The outcome of an import: rows done and pending in the store, rows written now, and what was left out.

    `unknown_ids` are segments of the source that the manifest doesn't have.
    """

    path: str
    n_done: int
    n_pending: int
    n_written: int
    unknown_ids: tuple[str, ...]


def make_import_spec(source: ImportSource, encoder: str, output: str) -> FeatureSpec:
    """Make the specification of a source's features; its fingerprint changes with every byte of the source."""
    if not encoder or set(encoder) & set("/\\ ") or encoder.startswith("."):
        raise StoreError(f"encoder {encoder!r} is part of the store's file name; use letters, digits, - and _")
    return FeatureSpec(
        encoder=encoder,
        weights=f"imported:{source.spec.source_sha256}",
        clip=ClipSpec(n_frames=1, n_clips=source.n_clips),
        imported=source.spec,
        outputs=(OutputSpec(name=output, shape=source.clip_shape),),
        dtype=source.dtype,
    )


def compute_import_digests(segment_ids: list[str], segments: dict[str, Segment], spec: FeatureSpec) -> np.ndarray:
    """Compute the digests that an imported store's rows should have, uint8 [row, 16].

    The source's content takes the place of the media's identity: a row is stale when its segment's times
    have changed in the manifest, and never because of media.
    """
    rows = [segments.get(segment_id) for segment_id in segment_ids]
    return compute_digests(rows, {s.segment_id: spec.weights for s in rows if s is not None})


def import_features(
    source: ImportSource,
    manifest: Manifest,
    cache_dir: Place,
    *,
    encoder: str,
    output: str = "pooled",
    backend: Backend = "zarr",
    allow_unknown: bool = False,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ImportSummary:
    """Write a source's features as done rows of a store; the same call goes on where one was killed.

    Segments of the manifest that the source doesn't have stay pending. Raises StoreError when the source has segments
    that the manifest doesn't have, unless `allow_unknown` leaves them out, or when they have none in common.
    """
    spec = make_import_spec(source, encoder, output)
    segments = {segment.segment_id: segment for segment in manifest}
    given = set(source.segment_ids)
    unknown = tuple(segment_id for segment_id in source.segment_ids if segment_id not in segments)
    if len(unknown) == len(given):
        raise StoreError(
            f"{source.place}: none of its {len(given)} segments (first: {unknown[0]}) is in the manifest of "
            f"{manifest.dataset}; is it the right dataset?"
        )
    if unknown and not allow_unknown:
        raise StoreError(
            f"{source.place}: segment {unknown[0]} is not in the manifest of {manifest.dataset}, nor are "
            f"{len(unknown) - 1} others; --allow-unknown leaves them out"
        )
    path = name_store(cache_dir, manifest.dataset, spec, backend)
    with hold_store(path):
        store = _open_or_create(path, spec, manifest, segments, source)
        digests = compute_import_digests(list(store.segment_ids), segments, spec)
        here = np.asarray([s in given and s in segments for s in store.segment_ids], dtype=bool)
        wanted = store.missing(digests) & here
        n_written = 0
        for shard in plan_shards(store.layout):
            rows = slice(shard.start_row, shard.stop_row)
            if wanted[rows].any():
                store.begin_shard(shard)
                store.commit_shard(shard, _write_shard(store, source, shard, here[rows], digests[rows]))
                n_written += int(here[rows].sum())
            notify(shard.n_rows)
        if n_written:
            append_run(store.path, {**describe_writer(), "imported_from": source.place, "n_rows": n_written})
        state = store.read_array("state")
    return ImportSummary(store.path, int((state == DONE).sum()), int((state == PENDING).sum()), n_written, unknown)


def _open_or_create(
    path: Location, spec: FeatureSpec, manifest: Manifest, segments: dict[str, Segment], source: ImportSource
) -> FeatureStore:
    if has_store(path):
        store = open_store(path)
        new_ids = plan_new_rows(store.segment_ids, segments.values())
        if new_ids:
            store.extend(new_ids, source.n_clips)
        return store
    return create_store(
        path,
        manifest.dataset,
        spec,
        [segment.segment_id for segment in order_segments(segments.values())],
        n_clips=source.n_clips,
        manifest_sha256=manifest.sha256,
        weights_source=f"imported from {source.place}",
        n_rows_per_shard=plan_rows_per_shard(spec, len(segments), source.n_clips),
    )


def _write_shard(
    store: FeatureStore, source: ImportSource, shard: Shard, here: np.ndarray, digests: np.ndarray
) -> ShardIndex:
    n, k = shard.n_rows, store.layout.n_clips
    output = store.spec.outputs[0]
    values = np.zeros((n, k, *output.shape), store.spec.dtype)
    times, n_valid = np.full((n, k, 2), np.nan), np.zeros(n, np.int32)
    has_audio = np.zeros(n, np.uint8)
    for i in np.flatnonzero(here).tolist():
        features, of_clips = source.read(store.segment_ids[shard.start_row + i])
        n_valid[i] = len(features)
        with np.errstate(over="ignore"):
            values[i, : n_valid[i]] = features
        times[i, : n_valid[i]] = of_clips
        has_audio[i] = not np.isnan(features).all()
    store.write_outputs(output.name, shard.start_row, values)
    sound = store.spec.holds_sound
    return ShardIndex(
        times=times,
        frames=np.full((n, k, 2), -1, np.int64),
        n_valid=n_valid,
        digest=np.where(here[:, None], digests, 0).astype(np.uint8),
        state=np.where(here, DONE, PENDING).astype(np.uint8),
        has_audio=has_audio if sound else None,
        loudness_dbfs=np.where(has_audio, np.nan, -np.inf).astype(np.float32) if sound else None,
    )
