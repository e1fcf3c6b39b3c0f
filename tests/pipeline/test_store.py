"""Checks the store: both backends hold the same values, states and faults are found, rows can be appended."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tiny_store
import zarr
from tiny_store import fill, make_digests, make_index, make_spec, make_values

from echoshift.pipeline.errors import StoreBusyError, StoreError
from echoshift.pipeline.execution import plan_tasks, select_rows
from echoshift.pipeline.specs import fingerprint
from echoshift.pipeline.store.failures import failures_path, read_failures
from echoshift.pipeline.store.interchange import export_store
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import plan_shards
from echoshift.pipeline.store.location import locate
from echoshift.pipeline.store.open import hold_store, list_stores, name_store, open_store
from echoshift.pipeline.store.verify import verify_store

MakeStore = Callable[..., FeatureStore]

SPEC = make_spec({"pooled": (5,), "trunk": (2, 3)})
ROWS = np.arange(20)


@pytest.fixture(params=["zarr", "hdf5"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., FeatureStore]:
    """Make an empty store of either backend."""

    def make(n: int = 20) -> FeatureStore:
        return tiny_store.make_store(name_store(tmp_path / "cache", "toy", SPEC, request.param), SPEC, n)

    return make


def test_values_and_times_come_back(make_store: MakeStore) -> None:
    store = make_store()
    fill(store)
    store = open_store(Path(store.path))
    assert fingerprint(store.spec) == fingerprint(SPEC)
    np.testing.assert_array_equal(store.read_all("trunk"), make_values(ROWS, 2, 3))
    np.testing.assert_array_equal(
        store.read(["s019", "s002", "s019"], "pooled")[:, 0], make_values(ROWS, 5)[[19, 2, 19], 0]
    )
    np.testing.assert_array_equal(store.read_array("times")[7, 2], [7.0, 8.0])
    assert verify_store(store) == []
    assert not store.missing(make_digests(ROWS)).any()
    assert store.attributes["versions"]["torch"]
    assert list_stores(Path(store.path).parents[1]) == [locate(store.path)]


def test_zarr_is_plain_zarr_without_compression(tmp_path: Path, make_store: MakeStore) -> None:
    store = make_store()
    fill(store)
    if store.backend == "zarr":
        array = zarr.open_array(store.path, path="outputs/pooled", mode="r")
        np.testing.assert_array_equal(array[:], make_values(ROWS, 5))
        chunk = (Path(store.path) / "outputs/pooled/c/0/0/0").read_bytes()
        assert chunk[:-4] == make_values(np.arange(0, 8), 5).tobytes()
    else:
        with h5py.File(store.path) as file:
            np.testing.assert_array_equal(file["outputs/pooled"][:], make_values(ROWS, 5))
            assert file["outputs/pooled"].chunks is None


def test_pending_and_failed_rows_are_refused(make_store: MakeStore) -> None:
    store = make_store()
    fill(store, failed=frozenset({9}), shards=(1,))
    with pytest.raises(StoreError, match="segment s000 is pending"):
        store.read(["s000"], "pooled")
    with pytest.raises(StoreError, match="segment s009 is failed"):
        store.read(["s009"], "pooled")
    with pytest.raises(StoreError, match="segment nobody is not in"):
        store.read(["nobody"], "pooled")
    assert read_failures(Path(store.path))["s009"].exception == "DecodeError"
    assert verify_store(store) == []


def test_only_shards_with_missing_or_stale_rows_are_planned(make_store: MakeStore) -> None:
    store = make_store()
    fill(store, failed=frozenset({9}))
    digests = make_digests(ROWS)
    everything = np.ones(20, dtype=bool)

    def shards_to_do(**options: bool) -> list[int]:
        wanted = select_rows(store, digests, everything, retry_failed=options.get("retry_failed", False))
        return [task.shard.index for task in plan_tasks({store.path: wanted}, store.layout)]

    assert shards_to_do() == []
    assert shards_to_do(retry_failed=True) == [1]
    digests[17, 3] ^= 1
    assert shards_to_do() == [2]
    everything[17] = False
    assert shards_to_do() == []
    store.begin_shard(plan_shards(store.layout)[1])  # and killed inside it
    assert np.flatnonzero(open_store(Path(store.path)).missing(make_digests(ROWS))).tolist() == list(range(8, 16))


def test_appended_rows_keep_the_old_ones(make_store: MakeStore) -> None:
    store = make_store(n=10)
    fill(store)
    store.extend(["new1", "new2"], 3)
    store = open_store(Path(store.path))
    assert list(store.segment_ids[-3:]) == ["s009", "new1", "new2"]
    assert store.read_array("state").tolist() == [1] * 10 + [0, 0]
    np.testing.assert_array_equal(store.read(["s009"], "pooled"), make_values(np.arange(0, 10), 5)[[9]])
    fill(store, shards=(1,))
    assert verify_store(store) == []
    with pytest.raises(StoreError, match="holds 3 clips a segment, not 4"):
        store.extend(["new3"], 4)


def test_a_flipped_bit_is_found_and_named(make_store: MakeStore) -> None:
    store = make_store()
    fill(store)
    wanted = make_values(np.arange(8, 16), 5)[0, 0].tobytes()
    files = [Path(store.path)] if store.backend == "hdf5" else list(Path(store.path).glob("outputs/pooled/c/1/0/0"))
    data = bytearray(files[0].read_bytes())
    data[data.find(wanted) + 2] ^= 0x10
    files[0].write_bytes(bytes(data))
    faults = verify_store(open_store(Path(store.path)))
    assert [(f.array, f.segment_id) for f in faults] == [("outputs/pooled", "s008")]
    assert "checksum" in faults[0].message.lower() or "crc32c" in faults[0].message.lower()


def test_nan_impossible_times_and_failures_without_a_ledger_are_found(make_store: MakeStore) -> None:
    store = make_store(n=8)
    fill(store)
    values = make_values(np.arange(0, 8), 5)
    values[3, 1, 2] = np.nan
    store.write_outputs("pooled", 0, values)
    shard = plan_shards(store.layout)[0]
    index = make_index(shard)
    index.times[5, 0] = [2.0, 2.0]
    store.commit_shard(shard, index)
    assert [(f.array, f.segment_id) for f in verify_store(store)] == [("times", "s005"), ("outputs/pooled", "s003")]
    fill(store, failed=frozenset({4}))
    failures_path(Path(store.path)).unlink()
    assert [(f.array, f.segment_id) for f in verify_store(store)] == [("state", "s004")]


def test_the_second_writer_is_told_who_holds_the_store(tmp_path: Path) -> None:
    path = tmp_path / "c" / "x.zarr"
    with hold_store(path), pytest.raises(StoreBusyError, match=r"being written by process \d+ of"), hold_store(path):
        pass
    with hold_store(path):
        pass


def test_changed_attributes_and_foreign_folders_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    if store.backend == "zarr":
        group = zarr.open_group(store.path, mode="r+")
        group.attrs["spec"] = {**group.attrs["spec"], "revision": 2}
    else:
        with h5py.File(store.path, "r+") as file:
            file.attrs["spec"] = file.attrs["spec"].replace('"revision": 1', '"revision": 2')
    with pytest.raises(StoreError, match="the fingerprint is not that of the specification"):
        open_store(Path(store.path))
    with pytest.raises(StoreError, match="no feature store at"):
        open_store(tmp_path / "nothing.zarr")


def test_exports_agree(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    fill(store, failed=frozenset({0}))
    expected = make_values(ROWS, 5)[1:]
    for form, name in (("npz", "f.npz"), ("h5", "f.h5"), ("parquet", "f.parquet"), ("epic100", "f.pkl")):
        assert export_store(store, "pooled", tmp_path / name, form) == 19
    with np.load(tmp_path / "f.npz") as archive:
        np.testing.assert_array_equal(archive["features"], expected)
        assert archive["segment_ids"][0] == "s001"
    with h5py.File(tmp_path / "f.h5") as file:
        np.testing.assert_array_equal(file["s001/features"][:], expected[0])
    table = pd.read_parquet(tmp_path / "f.parquet")
    assert len(table) == 19 * 3
    assert table.loc[4, ["segment_id", "clip", "start_s"]].tolist() == ["s002", 1, 2.0]
    np.testing.assert_array_equal(table.loc[4, "features"], expected[1, 1])
    loaded = pickle.loads((tmp_path / "f.pkl").read_bytes())
    np.testing.assert_array_equal(loaded["features"]["RGB"], expected)
    with pytest.raises(StoreError, match="EPIC-100's pickle holds vectors"):
        export_store(store, "trunk", tmp_path / "g.pkl", "epic100")
    with pytest.raises(StoreError, match="has no output 'nope'; it has pooled, trunk"):
        export_store(store, "nope", tmp_path / "g.npz", "npz")
