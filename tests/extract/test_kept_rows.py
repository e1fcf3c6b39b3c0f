"""Checks that a shard that is computed again costs no feature of a row that was done and isn't to be computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from echoshift.pipeline.store.layout import DONE, FAILED, PENDING
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.pipeline.store.verify import verify_store

INDEX = ("times", "frames", "n_valid", "digest", "state")
SOUND_INDEX = ("has_audio", "loudness_dbfs")


def read_rows(path: Path, segment_ids: list[str]) -> dict[str, bytes]:
    """Read everything that a store holds of some segments."""
    store = open_store(path)
    rows = [list(store.segment_ids).index(segment_id) for segment_id in segment_ids]
    names = [*INDEX, *(f"outputs/{output.name}" for output in store.spec.outputs)]
    names += SOUND_INDEX if store.spec.audio is not None else ()
    return {name: store.read_array(name)[rows].tobytes() for name in names}


def name_rows(*video_ids: str) -> list[str]:
    return [f"{video_id}-{i}" for video_id in video_ids for i in range(4)]


SLOW_HDF5 = pytest.param("hdf5", marks=pytest.mark.slow)
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


@pytest.mark.parametrize("backend", ["zarr", SLOW_HDF5])
def test_a_stale_row_alone_is_computed_and_its_failure_costs_no_other(tiny, tiny_dataset, backend: str) -> None:
    tiny.add_videos("v", "w")
    options = ("--backend", backend, "--encoders", "slowfast_demo", "--outputs", "pooled,trunk_slow")
    assert tiny.extract(*options)[0] == 0
    (path,) = list_stores(tiny.cache)
    before = read_rows(path, name_rows("v"))
    (tiny.media / "w.mp4").write_text("now it is no video")
    assert tiny.extract(*options)[0] == 3
    store = open_store(path)
    assert store.read_array("state").tolist() == [DONE] * 4 + [FAILED] * 4
    assert not store.read_array("outputs/pooled")[4:].any()
    assert read_rows(path, name_rows("v")) == before
    assert verify_store(store) == []


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
