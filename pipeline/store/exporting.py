"""Writes a store's done rows in the forms that other tools read: npz, h5, Parquet, and EPIC-100's pickle."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.reading import iterate_done_blocks
from echoshift.pipeline.suggestions import suggest

ExportForm = Literal["npz", "h5", "parquet", "epic100"]
EPIC100_NAMES = {"rgb": "RGB", "flow": "Flow", "audio": "Audio"}


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported: one output of the done rows, with the part of the index that goes with them."""

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
    writers: dict[ExportForm, Callable[[Path, _Source], None]] = {
        "npz": _write_npz,
        "h5": _write_h5,
        "parquet": _write_parquet,
        "epic100": _write_epic100,
    }
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
        arrays: dict[str, np.ndarray] = {"segment_ids": source.ids, "times": source.times, "n_valid": source.n_valid}
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
    schema = pa.schema(
        [
            ("segment_id", pa.string()),
            ("clip", pa.int32()),
            ("start_s", pa.float64()),
            ("stop_s", pa.float64()),
            ("features", pa.list_(pa.float32(), n_values)),
        ]
    )
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
    values = np.empty(source.shape, np.float32)
    first = 0
    for block in iterate_done_blocks(source.store, source.output):
        values[first : first + len(block.rows)] = block.values
        first += len(block.rows)
    features = {_name_modality(source.store): values}
    with path.open("wb") as file:
        pickle.dump({"features": features, "narration_ids": source.ids}, file)


def _name_modality(store: FeatureStore) -> str:
    if store.spec.frame is not None:
        return EPIC100_NAMES[store.spec.frame.input]
    if store.spec.audio is not None:
        return "Audio"
    imported = store.spec.imported
    if imported is None or imported.modality is None:
        raise StoreError(f"{store.path} was imported without --modality; EPIC-100's pickle names one")
    return EPIC100_NAMES[imported.modality]
