"""Checks the index's chunk files: zarr's own bytes, damage refused, and nothing half-done wherever a write stops."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from echoshift.pipeline.errors import StoreError, StoreFullError
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store import index_chunks
from echoshift.pipeline.store.index_chunks import read_rows, write_rows
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, PENDING, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.pipeline.store.raw_chunks import RawArray, describe_raw_array


def make_array(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> zarr.Array:
    array = zarr.create_array(
        path, shape=shape, chunks=chunks, dtype=dtype, fill_value=0, compressors=[Crc32cCodec()], zarr_format=3
    )
    return array.with_config({"write_empty_chunks": True})


def describe(array: zarr.Array) -> RawArray:
    raw = describe_raw_array(array)
    assert raw is not None
    return raw


def read_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("shape", "chunks", "dtype"),
    [
        ((100,), (32,), "uint8"),
        ((100,), (128,), "float32"),
        ((100, 3, 2), (32, 3, 2), "float64"),
        ((100, 7, 2), (32, 3, 2), "int64"),  # as after windows were added
        ((100, 16), (64, 16), "uint8"),
    ],
)
def test_files_are_those_that_zarr_writes(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> None:
    ours, zarrs = (make_array(tmp_path / name, shape, chunks, dtype) for name in ("ours", "zarrs"))
    raw = describe(ours)
    generator = np.random.default_rng(0)
    for start, stop in ((96, 100), (0, 8), (8, 40), (30, 31), (32, 64), (0, 100), (50, 70), (5, 5)):
        values = generator.integers(0, 200, (stop - start, *shape[1:])).astype(dtype)
        write_rows(raw, start, values)
        zarrs[start:stop] = values
        assert read_files(tmp_path / "ours") == read_files(tmp_path / "zarrs")
        np.testing.assert_array_equal(read_rows(raw, start, stop), values)
        np.testing.assert_array_equal(read_rows(raw, 3, 97), zarrs[3:97])


def test_zeros_are_stored_and_absent_chunks_are_zeros(tmp_path: Path) -> None:
    raw = describe(make_array(tmp_path / "x", (100,), (32,), "uint8"))
    np.testing.assert_array_equal(read_rows(raw, 0, 100), np.zeros(100))
    write_rows(raw, 40, np.zeros(4, np.uint8))
    assert sorted(read_files(tmp_path / "x")) == ["c/1", "zarr.json"]


def test_a_damaged_chunk_is_refused_unless_all_of_its_rows_are_given(tmp_path: Path) -> None:
    raw = describe(make_array(tmp_path / "x", (100,), (32,), "uint8"))
    write_rows(raw, 0, np.full(100, 7, np.uint8))
    for chunk, start, stop in (("c/1", 32, 64), ("c/3", 96, 100)):
        path = tmp_path / "x" / chunk
        whole = path.read_bytes()
        for damaged, words in ((b"\x08" + whole[1:], "its crc32c is not that"), (whole[:-1], "has 35 bytes instead")):
            path.write_bytes(damaged)
            with pytest.raises(StoreError, match=f"x/{chunk}:? {words}"):
                write_rows(raw, stop - 3, np.ones(2, np.uint8))
            with pytest.raises(StoreError, match=f"x/{chunk}:? {words}"):
                read_rows(raw, 0, 100)
            assert path.read_bytes() == damaged
            write_rows(raw, start, np.full(stop - start, 7, np.uint8))
            assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_old_chunk_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "x.zarr")
    fill(store)
    before = read_files(tmp_path)

    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(index_chunks.os, "replace", refuse)
    with pytest.raises(StoreFullError, match="no space left for"):
        store.begin_shard(plan_shards(store.layout)[0])
    assert read_files(tmp_path) == before


def make_store(path: Path) -> FeatureStore:
    spec = FeatureSpec(
        encoder="toy",
        weights="0" * 64,
        clip=ClipSpec(n_frames=4, n_clips=3),
        frame=FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
        outputs=(OutputSpec(name="pooled", shape=(5,)),),
        dtype="float32",
    )
    ids = [f"s{i:03d}" for i in range(20)]
    return create_store(path, "toy", spec, ids, n_clips=3, manifest_sha256="m", weights_source="t", n_rows_per_shard=8)


def fill(store: FeatureStore, shards: tuple[int, ...] = (0, 1, 2)) -> None:
    for shard in [plan_shards(store.layout)[i] for i in shards]:
        n, rows = shard.n_rows, np.arange(shard.start_row, shard.stop_row)
        store.begin_shard(shard)
        store.write_outputs("pooled", shard.start_row, np.full((n, 3, 5), shard.index, np.float32))
        index = ShardIndex(
            times=np.tile(np.asarray([0.0, 1.0]), (n, 3, 1)) + rows[:, None, None],
            frames=np.tile(rows[:, None, None], (1, 3, 2)),
            n_valid=np.full(n, 3),
            digest=np.tile(rows[:, None], (1, 16)),
            state=np.full(n, DONE),
        )
        store.commit_shard(shard, index)


@pytest.mark.parametrize("n_replaced", range(6))
def test_a_commit_stopped_before_any_of_its_files_leaves_the_shard_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_replaced: int
) -> None:
    path = tmp_path / "x.zarr"
    fill(make_store(path))
    whole = read_files(path)
    replace, replaced = os.replace, []

    def stop(source: Any, target: Any) -> None:
        name = Path(target).relative_to(path).parts[0]
        if name != "outputs" and len(replaced) == n_replaced:
            raise KeyboardInterrupt
        replace(source, target)
        replaced.extend([name] if name != "outputs" else [])

    store = open_store(path)
    with monkeypatch.context() as patch:
        patch.setattr(index_chunks.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            fill(store, (1,))
    assert replaced == ["state", "times", "frames", "n_valid", "digest"][:n_replaced]
    middle = [PENDING if n_replaced else DONE] * 8
    assert open_store(path).read_array("state").tolist() == [DONE] * 8 + middle + [DONE] * 4
    fill(open_store(path), (1,))
    assert read_files(path) == whole
