"""Checks a store from end to end: checksums, numbers that aren't finite, times, and the ledger against the states."""

from __future__ import annotations

import numpy as np

from pipeline.store.interface import FeatureStore, VerifyFault
from pipeline.store.layout import DONE, FAILED, plan_shards
from pipeline.store.ledger import read_failures


def verify_store(store: FeatureStore) -> list[VerifyFault]:
    """Lists every fault of a store's done and failed rows; an empty list means that it can be trusted as stored."""
    faults = store.find_checksum_faults()
    broken = {fault.array for fault in faults}
    if "state" in broken:
        return faults
    state = store.read_array("state")
    done = state == DONE
    if not broken & {"times", "n_valid"}:
        faults += _check_times(store, done)
    for output in store.spec.outputs:
        if f"outputs/{output.name}" not in broken:
            faults += _check_values(store, output.name, done)
    failures = read_failures(store.path)
    for row in np.flatnonzero(state == FAILED).tolist():
        if store.segment_ids[row] not in failures:
            faults.append(VerifyFault("state", store.segment_ids[row], "failed, but not in the failure ledger"))
    return faults


def _check_times(store: FeatureStore, done: np.ndarray) -> list[VerifyFault]:
    times, n_valid = store.read_array("times"), store.read_array("n_valid")
    exists = np.arange(times.shape[1])[None] < n_valid[:, None]
    with np.errstate(invalid="ignore"):
        good = np.where(exists, times[..., 1] > times[..., 0], np.isnan(times).all(axis=-1)).all(axis=1)
    good &= n_valid > 0
    return [
        VerifyFault("times", store.segment_ids[row], "a clip's time is missing, or its end is not after its start")
        for row in np.flatnonzero(done & ~good).tolist()
    ]


def _check_values(store: FeatureStore, output: str, done: np.ndarray) -> list[VerifyFault]:
    faults = []
    n_valid = store.read_array("n_valid")
    has_sound = store.read_array("has_audio") == 1 if store.spec.audio is not None else np.ones(len(done), dtype=bool)
    for shard in plan_shards(store.layout):
        rows = np.arange(shard.start_row, shard.stop_row)
        rows = rows[done[rows]]
        if not len(rows):
            continue
        values = store.read_array(f"outputs/{output}", shard.start_row, shard.stop_row)
        for row in rows.tolist():
            clips = values[row - shard.start_row, : n_valid[row]].astype(np.float32, copy=False)
            if has_sound[row] and not np.isfinite(clips).all():
                faults.append(VerifyFault(f"outputs/{output}", store.segment_ids[row], "holds NaN or infinity"))
            if not has_sound[row] and not np.isnan(clips).all():
                faults.append(VerifyFault(f"outputs/{output}", store.segment_ids[row], "no sound, but features"))
    return faults
