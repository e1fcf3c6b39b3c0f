"""Check a store from end to end, and queue damaged rows for the next extraction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.interface import FeatureStore, VerifyFault, iterate_done_blocks
from echoshift.pipeline.store.layout import (
    DONE,
    FAILED,
    PENDING,
    Shard,
    decode_segment_ids,
    encode_segment_ids,
    plan_arrays,
    plan_shards,
)
from echoshift.pipeline.store.location import STORAGE_OPTIONS, locate


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
            # With audio every value is finite; without it every value is NaN.
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


@dataclass(frozen=True, slots=True)
class IndexDamage:
    """A stretch of rows of an index array that can't be read, as long as the array's chunk."""

    array: str
    start_row: int
    stop_row: int
    reason: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """Outcome of a repair: rows set to pending (good ones of the same shards included) and their shards."""

    n_rows: int
    n_shards: int
    restored_ids: bool


def find_index_damage(store: FeatureStore) -> list[IndexDamage]:
    """Read every chunk of the arrays beside the outputs and lists those that can't be read, or hold no state or id."""
    damages = []
    for array in plan_arrays(store.spec, store.layout):
        if array.name.startswith("outputs/"):
            continue
        for start in range(0, store.layout.n_rows, array.chunks[0]):
            stop = min(start + array.chunks[0], store.layout.n_rows)
            try:
                values = store.read_array(array.name, start, stop)
                if array.name == "segment_id" and "" in decode_segment_ids(values):
                    damages.append(IndexDamage(array.name, start, stop, "a row has no id"))
                if array.name == "state" and values.max() > FAILED:
                    damages.append(IndexDamage(array.name, start, stop, f"{values.max()} is no state"))
            except (StoreError, UnicodeDecodeError) as error:
                damages.append(IndexDamage(array.name, start, stop, " ".join(str(error).split())))
    if not any(damage.array in ("state", "segment_id") for damage in damages) and store.backend == "zarr":
        damages += _find_absent_chunks(store, damages)
    return damages


def _find_absent_chunks(store: FeatureStore, damages: Sequence[IndexDamage]) -> list[IndexDamage]:
    """Find the chunks of the index that are absent: they read as zeros, and hold the rows of many shards."""
    n_chunk_rows = {array.name: array.chunks[0] for array in plan_arrays(store.spec, store.layout)}
    row_of = {segment_id: row for row, segment_id in enumerate(store.segment_ids)}
    known = {(damage.array, damage.start_row) for damage in damages}
    found = []
    for fault in store.find_checksum_faults():
        row = row_of.get(fault.segment_id)
        if fault.array.startswith("outputs/") or row is None:
            continue
        start = row - row % n_chunk_rows[fault.array]
        if (fault.array, start) not in known:
            stop = min(start + n_chunk_rows[fault.array], store.layout.n_rows)
            found.append(IndexDamage(fault.array, start, stop, fault.message))
    return found


def restore_segment_ids(store: FeatureStore, segment_ids: Sequence[str]) -> None:
    """Write the ids of all rows again; the caller has made sure that these are the ids the rows were planned from."""
    packed = encode_segment_ids(segment_ids, store.layout.n_id_bytes)
    if store.backend == "zarr":
        _write_whole_chunks(store, "segment_id", 0, packed)
        return
    import google_crc32c
    import h5py

    with h5py.File(store.path, "r+", locking=False) as file:
        file["segment_id"][:] = packed
        for shard in plan_shards(store.layout):
            rows = packed[shard.start_row : shard.stop_row]
            file["checksums/segment_id"][shard.index] = google_crc32c.value(rows.tobytes())


def requeue_rows(store: FeatureStore, rows: Iterable[int], damages: Sequence[IndexDamage]) -> RepairReport:
    """Set the shards of rows, and of damaged stretches of the index, to pending; the caller holds the store.

    Damaged stretches are wiped, so that they can be written again: a chunk is whole or it can't be read. `state` goes
    first: whatever is killed when, no row counts as done that is not whole.
    """
    shards = plan_shards(store.layout)
    size = store.layout.n_rows_per_shard
    indices = {row // size for row in rows}
    for damage in damages:
        indices |= set(range(damage.start_row // size, (damage.stop_row - 1) // size + 1))
    of_state = [damage for damage in damages if damage.array == "state"]
    for damage in of_state:
        _wipe(store, damage)
    chosen: list[Shard] = [shards[index] for index in sorted(indices)]
    for shard in chosen:
        store.begin_shard(shard)
    for damage in damages:
        if damage.array not in ("state", "segment_id"):
            _wipe(store, damage)
    return RepairReport(sum(shard.n_rows for shard in chosen), len(chosen), restored_ids=False)


def find_faulty_rows(store: FeatureStore, faults: Iterable[VerifyFault]) -> tuple[list[int], list[VerifyFault]]:
    """Find the rows that faults are about, and the faults that are about no row and so can't be re-queued."""
    row_of = {segment_id: row for row, segment_id in enumerate(store.segment_ids)}
    rows, others = set(), []
    for fault in faults:
        row = row_of.get(fault.segment_id)
        if row is None or fault.array == "segment_id":
            others.append(fault)
        else:
            rows.add(row)
    return sorted(rows), others


def _wipe(store: FeatureStore, damage: IndexDamage) -> None:
    n_rows = damage.stop_row - damage.start_row
    layout = next(a for a in plan_arrays(store.spec, store.layout) if a.name == damage.array)
    _write_whole_chunks(store, damage.array, damage.start_row, np.full((n_rows, *layout.shape[1:]), PENDING))


def _write_whole_chunks(store: FeatureStore, name: str, start_row: int, values: np.ndarray) -> None:
    """Write rows that fill whole chunks, which so needn't be read first."""
    if store.backend == "hdf5":
        import h5py

        with h5py.File(store.path, "r+", locking=False) as file:
            file[name][start_row : start_row + len(values)] = values
        return
    import zarr

    options = STORAGE_OPTIONS if locate(store.path).is_remote else None
    array = zarr.open_group(store.path, mode="r+", zarr_format=3, storage_options=options)[name]
    assert isinstance(array, zarr.Array), "plan_arrays names arrays"
    whole = array.with_config({"write_empty_chunks": True})
    whole[start_row : start_row + len(values)] = values.astype(array.dtype)
