"""Checks imports: what comes in is what was in the source, is read without running it, and belongs to the manifest."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from echoshift.cli import stores as store_commands
from echoshift.pipeline.cards import DatasetCard, write_card
from echoshift.pipeline.errors import StoreError, UnsafePickleError
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.interchange import (
    compute_import_digests,
    export_store,
    import_features,
    open_import_source,
)
from echoshift.pipeline.store.interface import Backend
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.store.verify import verify_store

N = 40
IDS = [f"P01/s{i:02d}" for i in range(N)]
SEGMENTS = tuple(Segment(i, "v", float(n), n + 1.0, ("a",), "D1", "train") for n, i in enumerate(IDS))
MANIFEST = Manifest("toy", SEGMENTS, "f" * 64)


def make_features(n: int = N, n_clips: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n_clips, 6)).astype(np.float32)


def write_folder(folder: Path, features: np.ndarray, n_valid: np.ndarray) -> np.ndarray:
    times = np.stack([np.arange(4.0), np.arange(4.0) + 0.5], axis=-1)
    for i, segment_id in enumerate(IDS[: len(features)]):
        path = folder / f"{segment_id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=features[i, : n_valid[i]], times=times[: n_valid[i]] + i)
    return times


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_folder_of_npz_becomes_an_ordinary_store(tmp_path: Path, backend: Backend) -> None:
    features, n_valid = make_features(30), np.arange(30) % 4 + 1
    times = write_folder(tmp_path / "npz", features, n_valid)
    source = open_import_source(tmp_path / "npz", "npz", "RGB")
    summary = import_features(source, MANIFEST, tmp_path / "cache", encoder="theirs", backend=backend)
    assert (summary.n_done, summary.n_pending, summary.n_written, summary.unknown_ids) == (30, 10, 30, ())
    store = open_store(Path(summary.path))
    assert verify_store(store) == []
    assert store.spec.imported is not None and store.spec.imported.modality == "rgb"
    assert store.spec.weights == f"imported:{source.spec.source_sha256}"
    read = store.read(IDS[:30], "pooled")
    for i in range(30):
        np.testing.assert_array_equal(read[i, : n_valid[i]], features[i, : n_valid[i]])
    np.testing.assert_array_equal(store.read_array("n_valid")[:30], n_valid)
    np.testing.assert_array_equal(store.read_array("times")[7, :4], times + 7)
    with pytest.raises(StoreError, match=r"segment P01/s35 is pending"):
        store.read(["P01/s35"], "pooled")
    assert import_features(source, MANIFEST, tmp_path / "cache", encoder="theirs", backend=backend).n_written == 0
    moved = dict(zip(IDS, SEGMENTS, strict=True))
    moved[IDS[3]] = Segment(IDS[3], "v", 3.0, 4.5, ("a",), "D1", "train")
    missing = store.missing(compute_import_digests(list(store.segment_ids), moved, store.spec))
    assert np.flatnonzero(missing).tolist() == [3, *range(30, 40)]


def test_an_export_comes_back_exactly(tmp_path: Path) -> None:
    features, n_valid = make_features(), np.arange(N) % 4 + 1
    write_folder(tmp_path / "npz", features, n_valid)
    first = import_features(open_import_source(tmp_path / "npz", "npz"), MANIFEST, tmp_path / "a", encoder="x")
    export_store(open_store(Path(first.path)), "pooled", tmp_path / "all.npz", "npz")
    second = import_features(open_import_source(tmp_path / "all.npz", "npz"), MANIFEST, tmp_path / "b", encoder="x")
    assert first.path != second.path
    a, b = open_store(Path(first.path)), open_store(Path(second.path))
    for name in ("outputs/pooled", "times", "n_valid", "segment_id", "state"):
        np.testing.assert_array_equal(a.read_array(name), b.read_array(name))
    export_store(b, "pooled", tmp_path / "again.npz", "npz")
    with np.load(tmp_path / "all.npz") as one, np.load(tmp_path / "again.npz") as two:
        assert sorted(one) == ["features", "n_valid", "segment_ids", "times"]
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_epic100_pickles_have_no_times(tmp_path: Path) -> None:
    rgb, audio = make_features(seed=1), make_features(seed=2).astype(np.float64)
    audio[5] = np.nan
    content = {"features": {"RGB": rgb, "Audio": audio}, "narration_ids": np.asarray(IDS, dtype=object)}
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(StoreError, match="holds RGB, Audio; say which with --modality"):
        open_import_source(tmp_path / "f.pkl", "epic100")
    with pytest.raises(StoreError, match="has no features for Flow; it has RGB, Audio"):
        open_import_source(tmp_path / "f.pkl", "epic100", "Flow")
    source = open_import_source(tmp_path / "f.pkl", "epic100", "RGB")
    store = open_store(Path(import_features(source, MANIFEST, tmp_path / "c", encoder="tbn").path))
    np.testing.assert_array_equal(store.read(IDS, "pooled"), rgb)
    assert np.isnan(store.read_array("times")).all() and (store.read_array("n_valid") == 4).all()
    assert verify_store(store) == []
    source = open_import_source(tmp_path / "f.pkl", "epic100", "Audio")
    store = open_store(Path(import_features(source, MANIFEST, tmp_path / "c", encoder="tbn").path))
    assert np.flatnonzero(store.read_array("has_audio") == 0).tolist() == [5]
    assert verify_store(store) == []
    export_store(store, "pooled", tmp_path / "g.pkl", "epic100")
    back = pickle.loads((tmp_path / "g.pkl").read_bytes())
    np.testing.assert_array_equal(back["features"]["Audio"], audio.astype(np.float32))


def test_unknown_segments_are_named_or_left_out(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "f.npz",
        features=make_features(3),
        segment_ids=np.asarray(["nobody", IDS[0], "none"]),
        times=np.zeros((3, 4, 2)),
        n_valid=np.asarray([4, 4, 4]),
    )
    source = open_import_source(tmp_path / "f.npz", "npz")
    with pytest.raises(StoreError, match="segment nobody is not in the manifest of toy, nor are 1 others"):
        import_features(source, MANIFEST, tmp_path / "c", encoder="x")
    assert not (tmp_path / "c").exists()
    summary = import_features(source, MANIFEST, tmp_path / "c", encoder="x", allow_unknown=True)
    assert (summary.unknown_ids, summary.n_done, summary.n_pending) == (("nobody", "none"), 1, N - 1)
    other = Manifest("toy", (Segment("z", "v", 0.0, 1.0, ("a",), "D1", "train"),), "f" * 64)
    with pytest.raises(StoreError, match=r"none of its 3 segments \(first: nobody\) is in the manifest"):
        import_features(source, other, tmp_path / "d", encoder="x", allow_unknown=True)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def test_hostile_files_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"features": {"RGB": Bomb()}, "narration_ids": []}
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UnsafePickleError, match=r"f\.pkl asks for posix\.system"):
        open_import_source(tmp_path / "f.pkl", "epic100", "RGB")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "a.npz", features=np.asarray([Bomb()], dtype=object))
    with pytest.raises(StoreError, match=r"a\.npz holds no array `features` that can be read without running code"):
        open_import_source(tmp_path / "npz", "npz")
    (tmp_path / "npz" / "a.npz").unlink()
    (tmp_path / "npz" / "b.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(StoreError, match=r"b\.npy holds no array"):
        open_import_source(tmp_path / "npz", "npz")
    assert not (tmp_path / "exploded").exists()


def test_faulty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "npz").mkdir()
    np.save(tmp_path / "npz" / "a.npy", np.zeros((2, 6), np.float32))
    np.save(tmp_path / "npz" / "b.npy", np.zeros(5, np.float32))
    with pytest.raises(StoreError, match=r"b\.npy: \(5,\) a clip, but \(6,\) in a\.npy"):
        open_import_source(tmp_path / "npz", "npz")
    np.save(tmp_path / "npz" / "b.npy", np.zeros((2, 6), np.int32))
    with pytest.raises(StoreError, match=r"b\.npy: int32, but float32 in a\.npy"):
        open_import_source(tmp_path / "npz", "npz")
    with pytest.raises(StoreError, match="nothing to import at"):
        open_import_source(tmp_path / "nowhere", "npz")


def test_the_command_imports_and_explains(tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    card = DatasetCard(
        name="toy", title="t", task="single-label", metric="top1", classes=("a", "b"), domains=("D1",)
    )  # fmt: skip
    write_card(manifests / "toy.toml", card)
    write_manifest(manifests / "toy.csv", SEGMENTS)
    write_folder(tmp_path / "npz", make_features(30), np.full(30, 4))
    runner = CliRunner()
    places = ["--cache", str(tmp_path / "cache"), "--manifests", str(manifests)]
    arguments = ["import", str(tmp_path / "npz"), "--dataset", "toy", "--encoder", "theirs", *places]
    run = runner.invoke(store_commands.app, arguments)
    assert run.exit_code == 0, run.output
    assert "30 done (30 written now), 10 without features" in run.output
    path = next((tmp_path / "cache" / "toy").glob("theirs-*.zarr"))
    run = runner.invoke(store_commands.app, ["explain", IDS[3], str(path), "--manifests", str(manifests)])
    assert run.exit_code == 0, run.output
    assert ": done; row 3 of" in run.output and "up to date" in run.output
    run = runner.invoke(store_commands.app, ["explain", IDS[35], str(path), "--manifests", str(manifests)])
    assert "pending" in run.output
