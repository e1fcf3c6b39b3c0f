"""Checks reading through memory maps: the values, and that nothing stale, half-written or damaged comes back."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_store
from tiny_store import N_CLIPS, fill, make_index, make_values

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.specs import ClipSpec, FeatureSpec
from echoshift.pipeline.store import local_reader
from echoshift.pipeline.store.interface import Backend, FeatureStore
from echoshift.pipeline.store.layout import (
    DONE,
    PENDING,
    plan_arrays,
    plan_rows_per_index_chunk,
    plan_rows_per_shard,
    plan_shards,
)
from echoshift.pipeline.store.local_reader import LocalReader
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.store.verify import verify_store
from echoshift.pipeline.store.zarr_store import ZarrFeatureStore

N_ROWS = 40


ROWS = np.arange(N_ROWS)


def make_spec(*shape: int, dtype: str = "float32", sampling: str = "uniform") -> FeatureSpec:
    return tiny_store.make_spec({"pooled": shape}, dtype, sampling)


def make_store(path: Path, spec: FeatureSpec, n_rows: int = N_ROWS, n_clips: int = N_CLIPS) -> FeatureStore:
    return tiny_store.make_store(path, spec, n_rows, n_clips, 16)


@pytest.fixture(params=["zarr", "hdf5"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def name_path(folder: Path, backend: Backend) -> Path:
    return folder / ("x.zarr" if backend == "zarr" else "x.h5")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5,), "float32"), ((7,), "float16"), ((2, 3), "float16"), ((), "float32"), ((12001,), "float32")],
)
def test_rows_are_those_of_plain_numpy(tmp_path: Path, backend: Backend, shape: tuple[int, ...], dtype: str) -> None:
    values = make_values(ROWS, *shape, dtype=dtype)
    store = make_store(name_path(tmp_path, backend), make_spec(*shape, dtype=dtype))
    fill(store)
    rows = np.random.default_rng(1).integers(0, N_ROWS, 100)
    ids = [f"s{row:03d}" for row in rows]
    np.testing.assert_array_equal(store.read(ids, "pooled"), values[rows])
    np.testing.assert_array_equal(store.read_all("pooled"), values)
    assert store.read([], "pooled").shape == (0, N_CLIPS, *shape)
    copied = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copied.read(ids, "pooled"), values[rows])
    clips = np.random.default_rng(2).integers(0, N_CLIPS, 100)
    np.testing.assert_array_equal(store.read_clips(ids, "pooled", clips), values[rows, clips])
    assert store.read_clips([], "pooled", clips[:0]).shape == (0, *shape)
    for clip in (-1, N_CLIPS):
        with pytest.raises(StoreError, match=f"clip {clip} is asked for, .* holds {N_CLIPS} a segment"):
            store.read_clips(["s000", "s001"], "pooled", np.array([0, clip]))
    store.begin_shard(plan_shards(store.layout)[1])
    with pytest.raises(StoreError, match="segment s016 is pending"):
        store.read_clips(["s000", "s016"], "pooled", np.array([0, 0]))


def test_rows_of_clip_chunks_agree_however_few_maps_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_reader, "MAX_MAPS", 4)
    spec = make_spec(6, sampling="windows")
    store = make_store(tmp_path / "x.zarr", spec, n_clips=70)
    assert plan_arrays(spec, store.layout)[0].chunks == (16, 64, 6)
    values = make_values(ROWS, 6, n_clips=70)
    fill(store)
    for _ in range(3):
        rows = np.random.default_rng(4).integers(0, N_ROWS, 60)
        ids, clips = [f"s{r:03d}" for r in rows], np.random.default_rng(5).integers(0, 70, 60)
        np.testing.assert_array_equal(store.read(ids, "pooled"), values[rows])
        np.testing.assert_array_equal(store.read_clips(ids, "pooled", clips), values[rows, clips])
    np.testing.assert_array_equal(store.read_all("pooled"), values)


def test_a_reader_sees_what_another_process_recomputed(tmp_path: Path, backend: Backend) -> None:
    path = name_path(tmp_path, backend)
    old, new = make_values(ROWS, 5), make_values(ROWS, 5, seed=9)
    fill(make_store(path, make_spec(5)))
    reader = open_store(path)
    ids = [f"s{row:03d}" for row in range(N_ROWS)]
    np.testing.assert_array_equal(reader.read(ids, "pooled"), old)
    write = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_store import fill, make_values, np, plan_shards\n"
        "from echoshift.pipeline.store.open import open_store\n"
        "store = open_store(sys.argv[2])\n"
        "fill(store, shards=(1,), seed=9)\n"
        "store.begin_shard(plan_shards(store.layout)[2])\n"
        "store.write_outputs('pooled', 32, make_values(np.arange(32, 40), 5, seed=9))\n"
    )
    arguments = [sys.executable, "-c", write, str(Path(__file__).parent), str(path)]
    subprocess.run(arguments, check=True, timeout=120)
    expected = np.concatenate([old[:16], new[16:32]])
    np.testing.assert_array_equal(reader.read(ids[:32], "pooled"), expected)
    np.testing.assert_array_equal(reader.read_all("pooled")[:32], expected)
    with pytest.raises(StoreError, match="segment s032 is pending"):
        reader.read(ids, "pooled")


@pytest.mark.parametrize("commits", [False, True])
def test_a_writer_between_the_looks_has_the_rows_refused_or_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: bool
) -> None:
    old, new = make_values(ROWS, 5), make_values(ROWS, 5, seed=9)
    store = make_store(tmp_path / "x.zarr", make_spec(5))
    fill(store)
    writer = open_store(tmp_path / "x.zarr")
    copy_rows, done = LocalReader._copy_rows, []

    def copy_while_one_writes(self: LocalReader, *arguments: Any) -> Any:
        copied = copy_rows(self, *arguments)
        if not commits:
            writer.begin_shard(plan_shards(writer.layout)[0])
        elif not done:
            fill(writer, shards=(0,), seed=9)
        done.append(1)
        return copied

    monkeypatch.setattr(LocalReader, "_copy_rows", copy_while_one_writes)
    if commits:
        np.testing.assert_array_equal(store.read(["s003", "s020"], "pooled"), np.stack([new[3], old[20]]))
    else:
        with pytest.raises(StoreError, match="segment s003 is pending"):
            store.read(["s003"], "pooled")


def test_a_chunk_of_a_wrong_length_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr", make_spec(5))
    fill(store)
    chunk = tmp_path / "x.zarr/outputs/pooled/c/1/0/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-7])
    with pytest.raises(StoreError, match=r"c/1/0/0 has 957 bytes instead of 964; `echoshift store verify`"):
        store.read(["s017"], "pooled")
    with pytest.raises(StoreError, match=r"outputs/pooled rows 0 to 40: .*`echoshift store verify`"):
        store.read_all("pooled")
    faults = verify_store(store)
    assert [(f.segment_id, f.message) for f in faults] == [("s016", "chunk c/1/0/0 has 957 bytes instead of 964")]
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"outputs/pooled rows 0 to 40: .*checksum"):
        store.read_all("pooled")


def test_chunks_may_be_absent_where_no_valid_clip_is(tmp_path: Path) -> None:
    spec = make_spec(6, sampling="windows")
    store = make_store(tmp_path / "x.zarr", spec, n_clips=70)
    fill(store)
    second = tmp_path / "x.zarr/outputs/pooled/c/1/1/0"
    second.unlink()
    assert [(f.segment_id, f.message) for f in verify_store(store)] == [("s016", "chunk c/1/1/0 is absent")]
    shard = plan_shards(store.layout)[1]
    store.commit_shard(shard, make_index(shard, np.full(16, 64), 70))
    assert verify_store(store) == []
    read = open_store(tmp_path / "x.zarr").read(["s016"], "pooled")[0]
    np.testing.assert_array_equal(read[:64], make_values(np.asarray([16]), 6, n_clips=70)[0, :64])
    assert (read[64:] == 0).all()
    n_valid = np.full(16, 64)
    n_valid[5] = 65
    store.commit_shard(shard, make_index(shard, n_valid, 70))
    assert [(f.segment_id, f.message) for f in verify_store(store)] == [("s021", "chunk c/1/1/0 is absent")]


def test_shards_are_sized_by_bytes_and_rows() -> None:
    spec = make_spec(2304)
    assert plan_rows_per_shard(spec, 100_000, 1) == 1024  # 9.4 MB
    assert plan_rows_per_shard(spec, 100_000, 5) == 256  # 11.8 MB, nearer in proportion than 5.9
    assert plan_rows_per_shard(spec, 1000, 1) == 64  # not above 1000 / 8
    assert plan_rows_per_shard(spec, 10, 1) == 16
    assert plan_rows_per_shard(make_spec(8), 1_000_000, 1) == 4096
    assert plan_rows_per_shard(make_spec(1280, 8, 14, 14), 1_000_000, 5) == 16
    clip = ClipSpec(n_frames=4, sampling="windows", step=4)
    windows = spec.model_copy(update={"clip": clip})
    assert plan_rows_per_shard(windows, 100_000, 1000) == 16  # 64 windows a chunk


def test_index_chunks_are_sized_by_bytes_and_rows() -> None:
    assert plan_rows_per_index_chunk(1, 16) == 1024  # a store may grow
    assert plan_rows_per_index_chunk(5000, 16) == 8192
    assert plan_rows_per_index_chunk(1_000_000, 1) == 65536
    assert plan_rows_per_index_chunk(1_000_000, 160) == 8192  # 1.3 MB, times of 10 clips
    assert plan_rows_per_index_chunk(1, 5400 * 16) == 16  # 1.4 MB, times of 5,400 windows; 1,024 rows are 88 MB
    assert plan_rows_per_index_chunk(1, 200_000 * 16) == 1  # 3.2 MB


def test_a_commit_of_one_long_row_takes_little_memory_and_disk(tmp_path: Path) -> None:
    n_windows = 5400  # 3 hours, one each 2 s
    store = make_store(tmp_path / "x.zarr", make_spec(1, sampling="windows"), 1, n_windows)
    shard = plan_shards(store.layout)[0]
    index = make_index(shard, np.array([n_windows]), n_windows)
    tracemalloc.start()
    try:
        store.commit_shard(shard, index)
        peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert peak_mb < 8  # with 1,024 rows a chunk: 88
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "x.zarr").rglob("*") if file.is_file())
    assert n_bytes < 8e6
    np.testing.assert_array_equal(open_store(tmp_path / "x.zarr").read_array("times"), index.times)


def read_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("n_written", range(6))
def test_a_commit_stopped_before_any_of_its_files_leaves_the_shard_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    path = tmp_path / "x.zarr"
    fill(make_store(path, make_spec(5)))
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
            fill(store, shards=(1,))
    assert written == ["state", "times", "frames", "n_valid", "digest"][:n_written]
    middle = [PENDING if n_written else DONE] * 16
    assert open_store(path).read_array("state").tolist() == [DONE] * 16 + middle + [DONE] * 8
    fill(open_store(path), shards=(1,))
    assert read_files(path) == whole


@pytest.mark.parametrize("array", ["state", "digest", "times"])
def test_a_damaged_chunk_of_the_index_is_named_and_kept(tmp_path: Path, array: str) -> None:
    store = make_store(tmp_path / "x.zarr", make_spec(5))
    fill(store)
    [chunk] = [path for path in (tmp_path / "x.zarr" / array / "c").rglob("*") if path.is_file()]
    damaged = bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:]
    chunk.write_bytes(damaged)
    with pytest.raises(StoreError, match=rf"x\.zarr: {array} rows \d+ to \d+: .*checksum.*`echoshift store verify`"):
        fill(open_store(tmp_path / "x.zarr"), shards=(1,))
    assert chunk.read_bytes() == damaged


def test_a_damaged_chunk_is_refused_unless_all_of_its_rows_are_given(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr", make_spec(5))
    fill(store)
    chunk = tmp_path / "x.zarr/n_valid/c/0"
    whole = chunk.read_bytes()
    for damaged in (b"\x08" + whole[1:], whole[:-1]):
        chunk.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"n_valid rows 0 to 16: .*; `echoshift store verify` lists"):
            fill(store, shards=(0,))
        assert chunk.read_bytes() == damaged
        assert store.read_array("state")[:16].tolist() == [PENDING] * 16
        ZarrFeatureStore._write_rows(store, "n_valid", 0, np.full(40, 3))  # type: ignore[arg-type]
        assert chunk.read_bytes() == whole
