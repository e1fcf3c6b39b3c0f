"""Reads features that were computed elsewhere: npz and npy files, the npz that an export writes, EPIC-100's pickle."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.restricted_pickle import read_restricted_pickle
from echoshift.pipeline.specs import ImportSpec
from echoshift.pipeline.suggestions import suggest

ImportForm = Literal["npz", "epic100"]
Modality = Literal["rgb", "flow", "audio"]
EPIC100_MODALITIES: dict[str, Modality] = {"RGB": "rgb", "Flow": "flow", "Audio": "audio"}
_DAMAGE = (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class ImportedSegment:
    """One segment's features [clip, …] and the seconds its clips cover, [clip, 2], NaN where nothing is known."""

    features: np.ndarray
    times: np.ndarray


@dataclass(frozen=True, slots=True)
class ImportSource:
    """What a source holds: its segments, in its order, and a way to read each.

    Attributes:
        spec: form, content and modality.
        segment_ids: unique.
        n_clips: the most clips of a segment.
        clip_shape: of one clip's features, the same for all segments.
        dtype: of the store: float16 stays, float32 stays, float64 becomes float32.
        read: reads one segment by id.
    """

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
    known = {name.lower(): value for name, value in EPIC100_MODALITIES.items()}
    if modality.lower() not in known:
        raise StoreError(f"{path}: no modality {modality!r}; {suggest(modality, EPIC100_MODALITIES)}")
    return known[modality.lower()]


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
        features = _read_file(path).features
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
    return ImportedSegment(features, _unknown_times(len(features)) if times is None else times.astype(np.float64))


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
        return ImportedSegment(np.asarray(features[row, : n_valid[row]]), times[row, : n_valid[row]])

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
        read=lambda segment_id: ImportedSegment(array[row_of[segment_id]], _unknown_times(n_clips)),
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


def _unknown_times(n_clips: int) -> np.ndarray:
    return np.full((n_clips, 2), np.nan)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
