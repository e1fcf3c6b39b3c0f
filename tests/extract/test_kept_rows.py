"""Checks that rows that are done stay as they are while others of their shard are computed, however it is cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import echoshift.pipeline.store.layout as layout_module
from echoshift.extract.shard_rows import OutputWriter, ShardRows, fail_shard
from echoshift.extract.work import ShardWork
from echoshift.pipeline.errors import MediaError, StoreError
from echoshift.pipeline.execution import ShardReport, ShardTask, begin_task, commit_report, plan_tasks
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE, FAILED, PENDING
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import create_store, list_stores, name_store, open_store
from echoshift.pipeline.store.verify import verify_store

INDEX = ("times", "frames", "n_valid", "digest", "state")
SOUND_INDEX = ("has_audio", "loudness_dbfs")


def read_rows(path: Path, segment_ids: list[str]) -> dict[str, bytes]:
    store = open_store(path)
    rows = [list(store.segment_ids).index(segment_id) for segment_id in segment_ids]
    names = [*INDEX, *(f"outputs/{output.name}" for output in store.spec.outputs)]
    names += SOUND_INDEX if store.spec.audio is not None else ()
    return {name: store.read_array(name)[rows].tobytes() for name in names}


def name_rows(*video_ids: str) -> list[str]:
    return [f"{video_id}-{i}" for video_id in video_ids for i in range(4)]


WAYS = [("zarr",), pytest.param(("hdf5",), marks=pytest.mark.slow)]
WAYS += [pytest.param(("zarr", "--workers", "2"), marks=pytest.mark.slow)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS, ids=["zarr", "hdf5", "dask"])
def test_rows_that_have_left_the_manifest_keep_all_they_have(tiny, tiny_dataset, way: tuple[str, ...]) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract("--backend", way[0])[0] == 0
    stores = list_stores(tiny.cache)
    assert len(stores) == 2
    before = [read_rows(path, name_rows("v", "w")) for path in stores]
    tiny_dataset.write_video(tiny.media / "u.mp4", seed=7)
    tiny.write_manifest(tiny_dataset.make_segments(["u", "v"]))
    code, out, _ = tiny.extract("--backend", *way, "--json")
    assert code == 0
    assert out.count('"n_computed": 4,') == 2, "u alone is computed"
    for path, rows in zip(stores, before, strict=True):
        store = open_store(path)
        assert list(store.segment_ids) == name_rows("v", "w", "u")
        assert store.read_array("state").tolist() == [DONE] * 12
        assert read_rows(path, name_rows("v", "w")) == rows
        assert store.read(name_rows("u"), store.spec.outputs[0].name).any()
        assert verify_store(store) == []
    tiny.write_manifest(tiny_dataset.make_segments(["u", "v", "w"]))
    code, out, _ = tiny.extract("--backend", way[0], "--json")
    assert (code, out.count('"n_computed": 0,')) == (0, 2), "w comes back, and nothing is to be computed"
    assert [read_rows(path, name_rows("v", "w")) for path in stores] == before


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_kept_rows_stay_done_while_their_shard_is_computed_and_after_a_kill(tiny, tiny_dataset, backend: str) -> None:
    tiny.add_videos("v", "w")
    options = ("--backend", backend, "--encoders", "slowfast_demo")
    assert tiny.extract(*options)[0] == 0
    (path,) = list_stores(tiny.cache)
    before = read_rows(path, name_rows("v", "w"))
    tiny_dataset.write_video(tiny.media / "u.mp4", seed=7)
    tiny.write_manifest(tiny_dataset.make_segments(["u"]))
    # The process kills itself where the shard's outputs are written and its index isn't.
    command = (
        "import os, signal, echoshift.extract.shard_rows as module\n"
        "module.ShardRows.finish = lambda self: (self._writer.wait(), os.kill(os.getpid(), signal.SIGKILL))\n"
        "from echoshift.cli.app import main; main()"
    )
    places = [str(place) for place in tiny.places]
    arguments = [sys.executable, "-c", command, "extract", "tiny", *places, "--device", "cpu", *options]
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == -9
    store = open_store(path)
    assert store.read_array("state").tolist() == [DONE] * 8 + [PENDING] * 4
    assert store.read_array("outputs/pooled")[8:].any(), "it was killed late enough"
    assert read_rows(path, name_rows("v", "w")) == before
    assert verify_store(store) == []
    assert tiny.extract(*options)[0] == 0
    assert open_store(path).read_array("state").tolist() == [DONE] * 12
    assert read_rows(path, name_rows("v", "w")) == before
    assert verify_store(open_store(path)) == []


SHAPES = {"pooled": (5,), "trunk": (2, 3)}
N = 3
CLIPS = ClipSpec(n_frames=4, stride=2, rate_hz=30, n_clips=N)


def make_toy_store(cache: Place, backend: str) -> FeatureStore:
    spec = FeatureSpec(
        encoder="toy", weights="0" * 64, clip=CLIPS, dtype="float32",
        frame=FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
        outputs=tuple(OutputSpec(name=name, shape=shape) for name, shape in SHAPES.items()),
    )  # fmt: skip
    path = name_store(cache, "toy", spec, backend)
    ids = [f"s{row}" for row in range(6)]
    options = {"n_clips": N, "manifest_sha256": "m", "weights_source": "test", "n_rows_per_shard": 8}
    return create_store(path, "toy", spec, ids, **options)


def make_value(name: str, row: int, entry: int, version: int) -> np.ndarray:
    """Make what a version of the media gives for an entry of a row."""
    return np.full(SHAPES[name], 1000 * version + 100 * row + entry + 1, np.float32)


def make_digests(n_rows: int, version: int) -> np.ndarray:
    return np.full((n_rows, 16), 1 + version, np.uint8)


def make_segments(n_rows: int, gone: tuple[int, ...] = ()) -> list[Segment | None]:
    return [None if i in gone else Segment(f"s{i}", "v", i, i + 1, ("a",), "d", "train") for i in range(n_rows)]


def compute(store, task: ShardTask, version: int, gone=(), failing=()) -> ShardReport:
    """Compute a shard from media of a version, as process_shard does."""
    segments = make_segments(store.layout.n_rows, gone)
    work = ShardWork(task, tuple(segments), {store.path: make_digests(store.layout.n_rows, version)})
    with OutputWriter() as writer:
        rows = ShardRows(store, work, writer)
        for row, segment in enumerate(segments):
            if segment is None:
                rows.skip(row)
            elif row not in task.kept_rows.get(store.path, ()):
                rows.start_row(row, np.tile([row, row + 1.0], (N, 1)), np.full((N, 2), row))
                for entry in range(N):
                    rows.put(row, entry, {name: make_value(name, row, entry, version) for name in SHAPES})
                if row in failing:
                    rows.fail_for(row, MediaError("broken"))
        return ShardReport(task, {store.path: rows.finish()})


def fill(store) -> None:
    (task,) = plan_tasks({store.path: np.ones(6, bool)}, store.layout)
    begin_task({store.path: store}, task)
    commit_report({store.path: store}, compute(store, task, 0))


def plan_task(store, wanted_rows: list[int]) -> ShardTask:
    wanted = np.isin(np.arange(store.layout.n_rows), wanted_rows)
    kept = (store.read_array("state") == DONE) & ~wanted
    (task,) = plan_tasks({store.path: wanted}, store.layout, {store.path: kept})
    return task


def assert_values(store, versions: dict[int, int]) -> None:
    """Assert that each row in `versions` holds what its version of the media gives, in every array."""
    for row, version in versions.items():
        for name in SHAPES:
            found = store.read_array(f"outputs/{name}", row, row + 1)[0]
            np.testing.assert_array_equal(found, np.stack([make_value(name, row, e, version) for e in range(N)]))
        assert store.read_array("digest", row, row + 1)[0].tolist() == [1 + version] * 16
        assert store.read_array("n_valid", row, row + 1)[0] == N
        times, frames = (store.read_array(name, row, row + 1)[0] for name in ("times", "frames"))
        assert times.tolist() == [[row, row + 1]] * N
        assert frames.tolist() == [[row, row]] * N


@pytest.mark.parametrize(
    ("backend", "n_chunk_bytes"),
    [*((backend, n) for backend in ("zarr", "hdf5") for n in (2**20, 100, 20)), ("remote", 100)],  # shards, rows, clips
)
def test_kept_rows_stay_however_a_shard_is_cut(request, tmp_path, monkeypatch, backend, n_chunk_bytes):
    monkeypatch.setattr(layout_module, "MAX_CHUNK_BYTES", n_chunk_bytes)
    cache = request.getfixturevalue("s3_bucket") if backend == "remote" else tmp_path
    store = make_toy_store(cache, "zarr" if backend == "remote" else backend)

    fill(store)
    store.extend(["s6", "s7"], 3)
    assert verify_store(store) == [], "a shard that has grown is whole before it is computed again"
    # 0 and 3 have left the manifest, 2 and 4 are stale, 4 can't be decoded, 1 and 5 are up to date; 6 and 7 are new.
    task = plan_task(store, [2, 4, 6, 7])
    assert task.kept_rows == {store.path: (0, 1, 3, 5)}
    stores = {store.path: store}
    begin_task(stores, task)
    states = [DONE, DONE, PENDING, DONE, PENDING, DONE, PENDING, PENDING]
    assert store.read_array("state").tolist() == states
    report = compute(store, task, 1, gone=(0, 3), failing=(4,))
    killed_here = open_store(store.path)
    assert killed_here.read_array("state").tolist() == states
    assert verify_store(killed_here) == []
    assert_values(killed_here, {0: 0, 1: 0, 3: 0, 5: 0})
    assert killed_here.read(["s3", "s0"], "pooled")[:, 2, 0].tolist() == [303, 3]
    commit_report(stores, report)
    after = open_store(store.path)
    assert after.read_array("state").tolist() == [DONE, DONE, DONE, DONE, FAILED, DONE, DONE, DONE]
    assert_values(after, {0: 0, 1: 0, 2: 1, 3: 0, 5: 0, 6: 1, 7: 1})
    assert not after.read_array("outputs/trunk", 4, 5).any()
    assert verify_store(after) == []


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_shard_that_is_given_up_keeps_them_too(tmp_path: Path, backend: str) -> None:
    store = make_toy_store(tmp_path, backend)
    fill(store)
    task = plan_task(store, [2])
    stores = {store.path: store}
    begin_task(stores, task)
    work = ShardWork(task, tuple(make_segments(6, gone=(0,))), {store.path: make_digests(6, 1)})
    report = ShardReport(task, {store.path: fail_shard(store, work, "killed every worker")})
    assert [failure.segment_id for failure in report.indices[store.path].failures] == ["s2"]
    commit_report(stores, report)
    assert store.read_array("state").tolist() == [DONE, DONE, FAILED, DONE, DONE, DONE]
    assert_values(store, dict.fromkeys((0, 1, 3, 4, 5), 0))


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_damage_to_a_kept_row_is_an_error_and_not_written_again_as_right(tmp_path: Path, backend: str) -> None:
    store = make_toy_store(tmp_path, backend)
    fill(store)
    old = make_value("trunk", 1, 0, 0).tobytes()
    damaged = next(p for p in (tmp_path / "toy").rglob("*") if p.is_file() and old in p.read_bytes())
    damaged.write_bytes(damaged.read_bytes().replace(old, b"\x01" + old[1:]))
    store = open_store(store.path)
    task = plan_task(store, [2])

    def begin_and_compute() -> None:
        begin_task({store.path: store}, task)
        compute(store, task, 1)

    with pytest.raises(StoreError, match=r"outputs/trunk rows 0 to 6: .*`echoshift store verify` lists every fault"):
        begin_and_compute()
    assert [fault.array for fault in verify_store(open_store(store.path))] == ["outputs/trunk"]
