"""Checks that verify finds what was damaged, that a sample is compared with numbers extracted again, and repair."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from echoshift.extract.check import compare_values, derive_tolerance
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.store.layout import DONE, PENDING
from echoshift.pipeline.store.open import hold_store, list_stores, open_store

CHOICES = ["--rows-per-shard", "2"]


def find_store(tiny, encoder: str = "slowfast_demo") -> Path:
    return next(Path(str(place)) for place in list_stores(tiny.cache) if place.name.startswith(encoder))


def flip_byte(path: Path, offset: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def count_states(path: Path) -> list[int]:
    return np.bincount(open_store(path).read_array("state"), minlength=3).tolist()


def repair_and_extract(tiny, path: Path, n_requeued: int, *choices: str) -> None:
    """Assert that repair re-queues n rows, and that extract then end in the bytes there were before the damage."""
    code, out, err = tiny.verify(path, "--repair")
    assert code == 1, err
    assert f"{n_requeued} rows in" in out
    assert count_states(path)[PENDING] == n_requeued
    assert tiny.extract(*CHOICES, *choices)[0] == 0
    assert tiny.verify(path)[0] == 0


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("zarr", "float16"),
        pytest.param("hdf5", "float16", marks=pytest.mark.slow),
        pytest.param("zarr", "float32", marks=pytest.mark.slow),
        pytest.param("hdf5", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_sample_extracted_again_has_the_same_bytes(tiny, backend: str, dtype: str) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract("--backend", backend, "--dtype", dtype, *CHOICES)[0] == 0
    before = sorted(p.name for p in find_store(tiny).parent.iterdir())
    for path in list_stores(tiny.cache):
        code, out, _ = tiny.verify(path, "--sample", "40", "--json")
        assert code == 0
        check = json.loads(out)
        assert check["sample"]["n_rows"] == math.ceil(0.4 * 8)
        assert {c["outcome"] for c in check["sample"]["comparisons"]} == {"equal"}
        assert bool(check["sample"]["fp16_errors"]) == (dtype == "float16")
        for error in check["sample"]["fp16_errors"].values():
            assert 0 < error["norm_relative"] <= 2**-11 and error["share_overflow"] == 0
    assert sorted(p.name for p in find_store(tiny).parent.iterdir()) == before, "checking leaves nothing in the cache"


@pytest.mark.slow
def test_wrong_numbers_with_right_checksums_are_found_by_extracting_again(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    tiny.extract(*CHOICES)
    path = find_store(tiny)
    good = tiny_dataset.read_every_array(path)
    store = open_store(path)
    values = store.read_array("outputs/pooled", 2, 4)
    store.write_outputs("pooled", 2, values[::-1])
    assert tiny.verify(path)[0] == 0, "checksums and shapes are right"
    code, out, _ = tiny.verify(path, "--sample", "100")
    assert code == 1
    assert "outputs/pooled: segment v-2: extracted again it differs: cosine" in out
    assert "outputs/pooled: segment v-3: extracted again it differs: cosine" in out
    assert "14 equal" not in out
    assert "6 equal, 0 close, 2 different, 0 failed" in out
    code, out, _ = tiny.verify(path, "--sample", "100", "--repair")
    assert code == 1
    assert "2 rows in 1 shards are re-queued" in out
    assert tiny.extract(*CHOICES)[0] == 0
    assert tiny.verify(path, "--sample", "100")[0] == 0
    assert tiny_dataset.read_every_array(path) == good


def test_a_stale_row_is_no_fault(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    tiny.extract(*CHOICES)
    tiny_dataset.write_video(tiny.media / "w.mp4", seed=9)
    code, out, _ = tiny.verify(find_store(tiny), "--sample", "100")
    assert code == 0
    assert "4 rows are stale, their media or times have changed since: w-0, w-1, w-2, w-3" in out
    assert "4 rows extracted again: 4 equal" in out
    (tiny.media / "v.mp4").unlink()
    code, out, _ = tiny.verify(find_store(tiny), "--sample", "100")
    assert code == 0
    assert "no row could be extracted again" in out


def test_damaged_and_absent_chunks_are_repaired(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    choice = ("--encoders", "slowfast_demo")
    tiny.extract(*choice, *CHOICES)
    path = find_store(tiny)
    good = tiny_dataset.read_every_array(path)
    flip_byte(path / "outputs/pooled/c/1/0/0")
    assert "outputs/pooled: segment v-2" in tiny.verify(path)[1]
    repair_and_extract(tiny, path, 2, *choice)
    for array in ("times", "frames", "n_valid", "digest", "state"):
        flip_byte(next(file for file in (path / array / "c").rglob("*") if file.is_file()), 2)
        code, out, _ = tiny.verify(path)
        assert code == 1
        assert f"{array}: rows 0 to 8" in out
        repair_and_extract(tiny, path, 8, *choice)
        assert tiny_dataset.read_every_array(path) == good
    (path / "outputs/pooled/c/3/0/0").unlink()
    repair_and_extract(tiny, path, 2, *choice)
    shutil.rmtree(path / "times" / "c")
    repair_and_extract(tiny, path, 8, *choice)
    assert tiny_dataset.read_every_array(path) == good


def test_hdf5_is_repaired_by_the_shard(tiny, tiny_dataset) -> None:
    h5py = pytest.importorskip("h5py")
    tiny.add_videos("v", "w")
    choices = ("--encoders", "slowfast_demo", "--backend", "hdf5")
    tiny.extract(*choices, *CHOICES)
    path = find_store(tiny)
    good = tiny_dataset.read_every_array(path)
    for array in ("outputs/pooled", "times", "digest"):
        with h5py.File(path, "r+") as file:
            file[array][5] = 1
        code, out, _ = tiny.verify(path)
        assert code == 1
        assert f"{array}: segment w-0: rows 4 to 6: checksum" in out
        repair_and_extract(tiny, path, 2, *choices)
        assert tiny_dataset.read_every_array(path) == good
    with h5py.File(path, "r+") as file:
        file["state"][1] = 7
    repair_and_extract(tiny, path, 8, *choices)


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_damaged_ids_come_back_from_the_manifest_and_nothing_is_recomputed(tiny, tiny_dataset, backend: str) -> None:
    tiny.add_videos("v", "w")
    choices = ("--encoders", "slowfast_demo", "--backend", backend)
    tiny.extract(*choices, *CHOICES)
    path = find_store(tiny)
    good = tiny_dataset.read_every_array(path)
    if backend == "zarr":
        flip_byte(path / "segment_id/c/0/0")
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "r+") as file:
            file["segment_id"][3, 0] = 255
    assert tiny.verify(path)[0] == 1
    code, out, _ = tiny.verify(path, "--repair")
    assert code == 1
    assert "0 rows in 0 shards are re-queued" in out
    assert "the segment ids were restored from the manifest" in out
    assert tiny_dataset.read_every_array(path) == good
    assert tiny.verify(path, "--sample", "100")[0] == 0


def test_damaged_ids_of_another_manifest_are_left_alone(tiny, tiny_dataset) -> None:
    tiny.add_videos("v")
    tiny.extract("--encoders", "slowfast_demo", *CHOICES)
    path = find_store(tiny)
    flip_byte(path / "segment_id/c/0/0")
    before = (path / "segment_id/c/0/0").read_bytes()
    tiny.write_manifest(tiny_dataset.make_segments(["v"], 3))
    code, _, err = tiny.verify(path, "--repair")
    assert code == 2
    assert "the manifest is not the one it was made for" in err
    assert "delete the store and extract it again" in err
    assert (path / "segment_id/c/0/0").read_bytes() == before
    assert count_states(path)[DONE] == 4


def test_times_outside_the_segment_or_out_of_order_are_faults(tiny) -> None:
    import zarr

    tiny.add_videos("v")
    tiny.extract("--encoders", "slowfast_demo", *CHOICES)
    path = find_store(tiny)
    group = zarr.open_group(str(path), mode="r+")
    times = group["times"][:]
    times[0, 4] += 5
    times[1, [0, 4]] = times[1, [4, 0]]
    group["times"][:] = times
    frames = group["frames"][:]
    frames[3, 2] = frames[3, 2][::-1]
    group["frames"][:] = frames
    code, out, _ = tiny.verify(path)
    assert code == 1
    assert "times: segment v-0: a clip lies outside its segment" in out
    assert "times: segment v-1: a clip begins before the one before it" in out
    assert "frames: segment v-3: its frames are not those of its times" in out
    assert out.count("segment v-") == 3
    repair_and_extract(tiny, path, 4, "--encoders", "slowfast_demo")


def test_without_media_the_store_itself_is_still_checked(tiny) -> None:
    tiny.add_videos("v")
    tiny.extract(*CHOICES)
    shutil.rmtree(tiny.media)
    code, out, _ = tiny.verify(find_store(tiny))
    assert code == 0
    assert "note: spans were not checked: no media folder" in out
    code, _, err = tiny.verify(find_store(tiny), "--sample", "1")
    assert code == 2
    assert "--media" in err


def test_weights_that_are_not_there_are_named_with_the_remedy(tiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from echoshift.extract.weights.load import load_encoder

    tiny.add_videos("v")
    weights = tmp_path / "mine.safetensors"
    save_file(load_encoder("slowfast_demo", resolve_weights("random:5", "slowfast_demo")).state_dict(), weights)
    tiny.extract("--encoders", "slowfast_demo", "--weights", f"slowfast_demo={weights}")
    path = find_store(tiny)
    assert tiny.verify(path, "--sample", "25")[0] == 0
    weights.rename(tmp_path / "elsewhere.safetensors")
    code, _, err = tiny.verify(path, "--sample", "25")
    assert code == 2
    assert f"there is no weights file {weights}" in err
    assert "install them, or put the file back" in err


def test_repair_waits_for_nobody_and_needs_a_store(tiny) -> None:
    tiny.add_videos("v")
    tiny.extract("--encoders", "slowfast_demo")
    path = find_store(tiny)
    with hold_store(path):
        code, _, err = tiny.verify(path, "--repair")
    assert code == 2
    assert "is being written by" in err
    code, _, err = tiny.verify(tiny.cache / "tiny/none-000000000000.zarr", "--repair")
    assert code == 2
    assert "no feature store" in err
    assert not list(tiny.cache.glob("tiny/none*"))


def make_spec(dtype: str = "float16", precision: str = "fp32"):
    from echoshift.extract.feature_specs import StoreOptions, make_feature_spec

    return make_feature_spec(
        "slowfast_demo", resolve_weights("random:0", "slowfast_demo"), StoreOptions(dtype, precision)
    )


def test_the_tolerance_follows_type_and_precision() -> None:
    assert derive_tolerance(make_spec("float32", "fp32")) == pytest.approx(8 / 2048, rel=1e-4)
    assert derive_tolerance(make_spec("float16", "fp32")) == 9 / 2048
    assert derive_tolerance(make_spec("float16", "bf16")) == 8 / 256 + 1 / 2048


def test_values_compare_as_equal_close_or_different() -> None:
    spec = make_spec("float32")
    fresh = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    assert compare_values("s", "pooled", fresh, fresh, spec).outcome == "equal"
    close = compare_values("s", "pooled", fresh * np.float32(1.001), fresh, spec)
    assert close.outcome == "close"
    assert close.relative == pytest.approx(1e-3, rel=1e-3)
    assert close.max_abs == pytest.approx(1e-3 * np.abs(fresh).max(), rel=1e-3)
    assert close.cosine == pytest.approx(1)
    scaled = compare_values("s", "pooled", fresh * np.float32(1.01), fresh, spec)
    assert scaled.outcome == "different"
    assert "relative error 1.00e-02" in scaled.detail
    one_clip = fresh.copy()
    one_clip[1] = one_clip[1, ::-1]
    assert compare_values("s", "pooled", one_clip, fresh, spec).outcome == "different"
    silent = np.full_like(fresh, np.nan)
    assert compare_values("s", "pooled", silent, silent, spec).outcome == "equal"
    assert compare_values("s", "pooled", silent, fresh, spec).outcome == "different"
    zeros = np.zeros_like(fresh)
    assert compare_values("s", "pooled", zeros, fresh, spec).outcome == "different"
    assert compare_values("s", "pooled", fresh, zeros, spec).outcome == "different"
