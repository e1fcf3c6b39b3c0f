"""Checks the index of a Zarr store: damage refused, and nothing half-done wherever a commit stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, PENDING, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.pipeline.store.zarr_store import ZarrFeatureStore


def read_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


@pytest.mark.parametrize("n_written", range(6))
def test_a_commit_stopped_before_any_of_its_files_leaves_the_shard_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    path = tmp_path / "x.zarr"
    fill(make_store(path))
    whole = read_files(path)
    writes, written = ZarrFeatureStore._write_rows, []

    def stop(self: ZarrFeatureStore, name: str, *arguments: Any) -> None:
        if len(written) == n_written:
            raise KeyboardInterrupt
        writes(self, name, *arguments)
        written.append(name)

    store = open_store(path)
    with monkeypatch.context() as patch:
        patch.setattr(ZarrFeatureStore, "_write_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            fill(store, (1,))
    assert written == ["state", "times", "frames", "n_valid", "digest"][:n_written]
    middle = [PENDING if n_written else DONE] * 8
    assert open_store(path).read_array("state").tolist() == [DONE] * 8 + middle + [DONE] * 4
    fill(open_store(path), (1,))
    assert read_files(path) == whole


@pytest.mark.parametrize("array", ["state", "digest", "times"])
def test_a_damaged_chunk_of_the_index_is_named_and_kept(tmp_path: Path, array: str) -> None:
    store = make_store(tmp_path / "x.zarr")
    fill(store)
    [chunk] = [path for path in (tmp_path / "x.zarr" / array / "c").rglob("*") if path.is_file()]
    damaged = bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:]
    chunk.write_bytes(damaged)
    with pytest.raises(StoreError, match=rf"x\.zarr: {array} rows \d+ to \d+: .*checksum.*`echoshift store verify`"):
        fill(open_store(tmp_path / "x.zarr"), (1,))
    assert chunk.read_bytes() == damaged


def test_a_damaged_chunk_is_refused_unless_all_of_its_rows_are_given(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr")
    fill(store)
    chunk = tmp_path / "x.zarr/n_valid/c/0"
    whole = chunk.read_bytes()
    for damaged in (b"\x08" + whole[1:], whole[:-1]):
        chunk.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"n_valid rows 0 to 8: .*; `echoshift store verify` lists"):
            fill(store, (0,))
        assert chunk.read_bytes() == damaged
        assert store.read_array("state")[:8].tolist() == [PENDING] * 8
        ZarrFeatureStore._write_rows(store, "n_valid", 0, np.full(20, 3))  # type: ignore[arg-type]
        assert chunk.read_bytes() == whole
