"""Checks a store from end to end: checksums, numbers that aren't finite, times, and the ledger against the states."""

from __future__ import annotations

import numpy as np

from echoshift.pipeline.store.interface import FeatureStore, VerifyFault
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.pipeline.store.ledger import read_failures
from echoshift.pipeline.store.reading import iterate_done_blocks


def verify_store(store: FeatureStore) -> list[VerifyFault]:
    """List every fault of a store's done and failed rows; an empty list means that it can be trusted as stored."""
    faults = store.find_checksum_faults()
    broken = {fault.array for fault in faults}
    if "state" in broken:
        return faults
    state = store.read_array("state")
    if not broken & {"times", "n_valid"}:
        faults += _check_times(store, state == DONE)
    for output in store.spec.outputs:
        if not broken & {f"outputs/{output.name}", "n_valid", "has_audio"}:
            faults += _check_values(store, output.name)
    failures = read_failures(store.path)
    for row in np.flatnonzero(state == FAILED).tolist():
        if store.segment_ids[row] not in failures:
            faults.append(VerifyFault("state", store.segment_ids[row], "failed, but not in the failure ledger"))
    return faults


def _check_times(store: FeatureStore, done: np.ndarray) -> list[VerifyFault]:
    times, n_valid = store.read_array("times"), store.read_array("n_valid")
    exists = np.arange(times.shape[1])[None] < n_valid[:, None]
    unknown = np.isnan(times).all(axis=-1)
    with np.errstate(invalid="ignore"):
        known = times[..., 1] > times[..., 0]
    if store.spec.imported is not None:
        known |= unknown  # a source that says nothing of times
    good = np.where(exists, known, unknown).all(axis=1) & (n_valid > 0)
    return [
        VerifyFault("times", store.segment_ids[row], "a clip's time is missing, or its end is not after its start")
        for row in np.flatnonzero(done & ~good).tolist()
    ]


def _check_values(store: FeatureStore, output: str) -> list[VerifyFault]:
    faults = []
    for block in iterate_done_blocks(store, output):
        finite = np.isfinite(block.values).reshape(*block.exists.shape, -1)
        if not finite.all():
            # With sound every value is finite; without any, none is a number.
            bad = (block.exists & ~finite.all(axis=-1)).any(axis=1) & block.has_sound
        else:
            bad = np.zeros(len(block.rows), bool)
        faults += [
            VerifyFault(f"outputs/{output}", store.segment_ids[row], "holds NaN or infinity")
            for row in block.rows[bad].tolist()
        ]
        for i in np.flatnonzero(~block.has_sound).tolist():
            if not np.isnan(block.values[i, block.exists[i]]).all():
                segment_id = store.segment_ids[int(block.rows[i])]
                faults.append(VerifyFault(f"outputs/{output}", segment_id, "no sound, but features"))
    return faults
