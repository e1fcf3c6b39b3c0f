"""Writes a store's done rows in the forms that other tools read: npz, h5, Parquet, and EPIC-100's pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import StoreError
from pipeline.store.interface import FeatureStore
from pipeline.store.layout import DONE

ExportForm = Literal["npz", "h5", "parquet", "epic100"]
EPIC100_MODALITY = {"rgb": "RGB", "flow": "Flow"}


def export_store(store: FeatureStore, output: str, target: Path, form: ExportForm) -> int:
    """Writes one output of every done row and returns how many; the file appears whole or not at all.

    - npz: `features` [n, clip, ...], `segment_ids`, `times` [n, clip, 2], `n_valid` [n].
    - h5: `<segment_id>/features` [clip, ...] and `<segment_id>/times` [clip, 2], only the clips that exist.
    - parquet: a row a clip: segment_id, clip, start_s, stop_s, features (list of float32, flattened).
    - epic100: a pickle {'features': {'RGB'|'Flow'|'Audio': [n, clip, D]}, 'narration_ids': [n]}.
    Raises StoreError when nothing is done, or the output is not there.
    """
    if output not in {o.name for o in store.spec.outputs}:
        names = ", ".join(o.name for o in store.spec.outputs)
        raise StoreError(f"{store.path} has no output {output!r}; it has {names}")
    rows = np.flatnonzero(store.read_array("state") == DONE)
    if not len(rows):
        raise StoreError(f"{store.path} has no done row to export; run `echoshift extract` first")
    ids = [store.segment_ids[row] for row in rows.tolist()]
    fresh = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    values = store.read_all(output)[rows]
    times, n_valid = store.read_array("times")[rows], store.read_array("n_valid")[rows]
    if form == "npz":
        with fresh.open("wb") as file:
            np.savez(file, features=values, segment_ids=np.asarray(ids), times=times, n_valid=n_valid)
    elif form == "h5":
        _write_h5(fresh, ids, values, times, n_valid)
    elif form == "parquet":
        _write_parquet(fresh, ids, values, times, n_valid)
    else:
        modality = "Audio" if store.spec.frame is None else EPIC100_MODALITY[store.spec.frame.input]
        if values.ndim != 3:
            raise StoreError(f"EPIC-100's pickle holds vectors, {output} has the shape {values.shape[2:]} a clip")
        features = {modality: values.astype(np.float32)}
        fresh.write_bytes(pickle.dumps({"features": features, "narration_ids": np.asarray(ids)}))
    fresh.replace(target)
    return len(rows)


def _write_h5(path: Path, ids: list[str], values: np.ndarray, times: np.ndarray, n_valid: np.ndarray) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for i, segment_id in enumerate(ids):
            group = file.create_group(segment_id)
            group.create_dataset("features", data=values[i, : n_valid[i]])
            group.create_dataset("times", data=times[i, : n_valid[i]])


def _write_parquet(path: Path, ids: list[str], values: np.ndarray, times: np.ndarray, n_valid: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    exists = np.arange(values.shape[1])[None] < n_valid[:, None]
    row, clip = np.nonzero(exists)
    flat = values[exists].astype(np.float32).reshape(len(row), -1)
    features = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    table = pa.table(
        {
            "segment_id": [ids[r] for r in row],
            "clip": clip.astype(np.int32),
            "start_s": times[exists][:, 0],
            "stop_s": times[exists][:, 1],
            "features": features,
        }
    )
    pq.write_table(table, path)
