"""Checks what broken, missing, replaced or unreadable media end in: one line each, and no feature lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaLocation, identify_media
from echoshift.extract.run import ExtractionRequest, extract_features
from echoshift.extract.weights.load import resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.manifest import read_manifest
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.pipeline.store.open import list_stores, open_store


def open_pictures(tiny):
    return open_store(next(path for path in list_stores(tiny.cache) if path.name.startswith("slowfast_demo")))


def check_whole(tiny) -> None:
    """Assert that every store verifies, has a row a segment, each settled, and zeros where it failed."""
    expected = sorted(s.segment_id for s in read_manifest(tiny.root / "tiny.csv", read_dataset_card("tiny", tiny.root)))
    for path in list_stores(tiny.cache):
        assert tiny.verify(path)[0] == 0
        store = open_store(path)
        state = store.read_array("state")
        assert sorted(store.segment_ids) == expected, "nothing is lost, nothing twice"
        assert set(state.tolist()) <= {DONE, FAILED}
        failed = {store.segment_ids[row] for row in np.flatnonzero(state == FAILED)}
        assert set(read_failures(path)) == failed
        for output in store.spec.outputs:
            assert not store.read_all(output.name)[state == FAILED].any(), "nothing takes the place of what failed"


def test_every_broken_file_gives_one_line_and_harms_no_other(tiny, tiny_dataset) -> None:
    tiny.add_videos("good")
    whole = (tiny.media / "good.mp4").read_bytes()
    half = len(whole) // 2
    broken = {
        "truncated": whole[:half],
        "empty": b"",
        "zeros": bytes(len(whole)),
        "halfzeroed": whole[:half] + bytes(len(whole) - half),
        "text": b"this is no video\n" * 100,
        "texttail": whole[:half] + b"this is no video\n" * 1000,
    }
    for name, data in broken.items():
        (tiny.media / f"{name}.mp4").write_bytes(data)
    (tiny.media / "folder.mp4").mkdir()
    shutil.copy(tiny.media / "good.mp4", tiny.media / "twin.mp4")
    segments = tiny_dataset.make_segments(["good", *broken, "folder", "twin", "absent"], 1)
    tiny.write_manifest([*segments, tiny_dataset.Segment("late", "good", 9, 10, ("a",), "d", "train")])
    code, out, err = tiny.extract("--rows-per-shard", "4")
    assert code == 3, err
    store = open_pictures(tiny)
    failures = read_failures(Path(store.path))
    assert set(failures) == {f"{name}-0" for name in (*broken, "folder", "absent")} | {"late"}
    assert (failures["absent-0"].exception, failures["absent-0"].retryable) == ("MediaNotFoundError", True)
    assert (failures["late"].exception, failures["late"].retryable) == ("SegmentOutsideVideoError", False)
    assert np.isnan(store.read_array("times")[store.read_array("state") == FAILED]).all()
    for name in broken:
        failure = failures[f"{name}-0"]
        assert (failure.exception, failure.retryable) == ("DecodeError", False)
        assert f"{name}.mp4" in failure.reason
        assert "\n" not in failure.reason
    assert failures["folder-0"].exception == "MediaNotFoundError"
    assert "folder.mp4 is a folder, not a media file" in failures["folder-0"].reason
    for name in (*broken, "folder"):
        assert f"failed: slowfast_demo: {name}-0: " in out
    good, twin = store.read(["good-0", "twin-0"], "pooled")
    assert good.any()
    assert good.tobytes() == twin.tobytes()
    check_whole(tiny)
    shutil.copy(tiny.media / "good.mp4", tiny.media / "absent.mp4")
    assert tiny.extract("--rows-per-shard", "4")[0] == 3
    assert set(failures) - set(read_failures(Path(store.path))) == {"absent-0"}
    assert open_pictures(tiny).read(["good-0"], "pooled").tobytes() == good.tobytes()


def test_a_video_replaced_between_runs_is_computed_again(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract("--rows-per-shard", "4")[0] == 0
    store = open_pictures(tiny)
    ids = [f"w-{i}" for i in range(4)]
    old_v, old_w = store.read([f"v-{i}" for i in range(4)], "pooled"), store.read(ids, "pooled")
    tiny_dataset.write_video(tiny.media / "w.mp4", seed=77)
    code, _, _ = tiny.extract("--rows-per-shard", "4")
    assert code == 0
    after = open_pictures(tiny)
    assert after.read([f"v-{i}" for i in range(4)], "pooled").tobytes() == old_v.tobytes()
    new_w = after.read(ids, "pooled")
    assert all(new.tobytes() != old.tobytes() for new, old in zip(new_w, old_w, strict=True))
    for file in Path(after.path).rglob("*"):
        assert not file.is_file() or old_w[0].tobytes() not in file.read_bytes(), "the old bytes are gone"
    check_whole(tiny)
    (tiny.media / "w.mp4").write_text("now it is no video")
    assert tiny.extract("--rows-per-shard", "4")[0] == 3
    assert (open_pictures(tiny).read_array("state") == [DONE] * 4 + [FAILED] * 4).all()
    check_whole(tiny)
    tiny_dataset.write_video(tiny.media / "w.mp4", seed=77)
    assert tiny.extract("--rows-per-shard", "4")[0] == 0
    assert open_pictures(tiny).read(ids, "pooled").tobytes() == new_w.tobytes()
    check_whole(tiny)


class ReplacingProgress:
    """A progress display that runs an action when the look at the media is over and extraction begins."""

    def __init__(self, action):
        self._action = action

    def start(self, what: str, n_total: int) -> None:
        if what == "extracting":
            self._action()

    def advance(self, n: int = 1) -> None: ...


def test_a_video_replaced_during_a_run_fails_its_rows_and_the_next_run_computes_them(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    record = resolve_weights("random:0", "slowfast_demo")
    card = read_dataset_card("tiny", tiny.root)
    request = ExtractionRequest(
        card=card,
        manifest=read_manifest(tiny.root / "tiny.csv", card),
        media_root=tiny.media,
        cache_dir=tiny.cache,
        backend="zarr",
        encoders=((make_feature_spec("slowfast_demo", record, StoreOptions()), record),),
        options=RunOptions(device="cpu"),
    )
    replaced = ReplacingProgress(lambda: tiny_dataset.write_video(tiny.media / "w.mp4", seed=78))
    summary = extract_features(request, replaced).stores[0]
    assert (summary.n_done, summary.n_failed) == (4, 4)
    for failure in summary.failures:
        assert (failure.exception, failure.retryable) == ("MediaChangedError", True)
        assert "the video w changed while it was read" in failure.reason
    check_whole(tiny)
    assert tiny.extract("--encoders", "slowfast_demo")[0] == 0, "its rows are stale, no --retry-failed is needed"
    assert (open_pictures(tiny).read_array("state") == DONE).all()
    code, out, _ = tiny.verify(open_pictures(tiny).path, "--sample", "100")
    assert code == 0
    assert "8 rows extracted again: 8 equal" in out


@pytest.mark.shared
def test_sound_that_breaks_off_leaves_the_pictures_done(tiny, tiny_dataset, shared_data: Path) -> None:
    shutil.copy(shared_data / "edge/video_with_failing_audio.mp4", tiny.media / "v.mp4")
    tiny.write_manifest([tiny_dataset.Segment(f"v-{t}", "v", t, t + 1, ("a",), "d", "train") for t in (0, 5, 10)])
    assert tiny.extract()[0] == 0
    assert (open_pictures(tiny).read_array("state") == DONE).all()
    sound = open_store(next(path for path in list_stores(tiny.cache) if path.name.startswith("resnet_demo")))
    assert sound.read_array("has_audio").tolist() == [1, 0, 0], "beyond where it breaks off there is no sound"
    assert np.isnan(sound.read(["v-5", "v-10"], "pooled")).all()
    check_whole(tiny)


ENCODER = ("--encoders", "resnet_demo")


def read_files(tiny) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(tiny.cache.rglob("*")) if path.is_file()}


def test_a_wrong_folder_makes_no_store_and_changes_none(tiny, tmp_path: Path) -> None:
    tiny.add_videos("v")
    empty = tmp_path / "not mounted"
    empty.mkdir()
    places = [empty if part == tiny.media else part for part in tiny.places]
    code, out, err = tiny.run("extract", "tiny", *places, *ENCODER, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: none of 4 segments has its media below {empty}: no audio of video v below {empty}; ")
    assert err.count("\n") == 1 and "name the folder with --media, or mount its disk" in err
    assert not list_stores(tiny.cache)
    assert tiny.extract(*ENCODER)[0] == 0
    before = read_files(tiny)
    assert tiny.run("extract", "tiny", *places, *ENCODER, "--quiet")[0] == 2
    assert read_files(tiny) == before


def test_rows_whose_video_was_deleted_are_not_lost(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract(*ENCODER)[0] == 0
    before = read_files(tiny)
    (tiny.media / "w.mp4").unlink()
    code, _, err = tiny.extract(*ENCODER)
    assert code == 2
    assert "error: 4 rows of " in err and "are done, and their media are gone: no " in err and "of video w below" in err
    assert read_files(tiny) == before
    tiny.write_manifest(tiny_dataset.make_segments(["v"]))
    assert tiny.extract(*ENCODER)[0] == 0
    assert read_files(tiny) == before


def make_unreadable(path: Path) -> None:
    """Put a file in a video's place that everybody may open and whose first byte gives EIO, as on a failing disk."""
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        path.read_bytes()


@pytest.mark.parametrize("backend", ["zarr", pytest.param("hdf5", marks=pytest.mark.slow)])
def test_done_rows_whose_video_cannot_be_read_stay_and_are_counted(tiny, backend: str) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract(*ENCODER, "--backend", backend)[0] == 0
    (path,) = list_stores(tiny.cache)
    before, whole = read_files(tiny), (tiny.media / "w.mp4").read_bytes()
    make_unreadable(tiny.media / "w.mp4")
    code, out, _ = tiny.extract(*ENCODER, "--backend", backend, "--retry-failed")
    assert code == 3
    line = (
        "not checked: resnet_demo: 4 done rows, which stay as they are: their media can't be read now; "
        "video w: [Errno 5] Input/output error"
    )
    assert [said for said in out.splitlines() if "not checked" in said] == [line]
    assert "failed:" not in out
    assert read_files(tiny) == before
    _, out, _ = tiny.run("plan", "tiny", *tiny.places, *ENCODER, "--backend", backend, "--sample", "0", "--json")
    (planned,) = json.loads(out)["stores"]
    assert (planned["n_done"], planned["n_to_do"], planned["n_shards_to_do"]) == (8, 0, 0)
    _, out, _ = tiny.run("store", "explain", "w-1", path, "--manifests", tiny.root, "--media", tiny.media)
    assert "its media can't be read now; until they can the row stays as it is" in out
    (tiny.media / "w.mp4").unlink()
    (tiny.media / "w.mp4").write_bytes(whole)
    assert tiny.extract(*ENCODER, "--backend", backend)[0] == 0
    assert read_files(tiny) == before


def test_they_stay_in_a_shard_that_is_computed_again(tiny, tiny_dataset) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract(*ENCODER)[0] == 0
    (path,) = list_stores(tiny.cache)
    ids = [f"w-{i}" for i in range(4)]
    before = open_store(path).read(ids, "pooled").tobytes()
    digests = open_store(path).read_array("digest")
    make_unreadable(tiny.media / "w.mp4")
    tiny_dataset.write_video(tiny.media / "v.mp4", seed=5)
    code, out, _ = tiny.extract(*ENCODER, "--json")
    (said,) = json.loads(out)["stores"]
    assert (code, said["n_computed"], said["n_done"], said["n_failed"], said["n_unchecked"]) == (3, 4, 8, 0, 4)
    assert said["unchecked_reason"] == "video w: [Errno 5] Input/output error"
    after = open_store(path)
    assert after.read(ids, "pooled").tobytes() == before
    assert (after.read_array("digest") == digests).all(axis=1).tolist() == [False] * 4 + [True] * 4


def test_rows_that_were_never_done_fail_as_ever_and_a_broken_file_fails_its_rows(tiny) -> None:
    tiny.add_videos("v", "w")
    good = (tiny.media / "w.mp4").read_bytes()
    make_unreadable(tiny.media / "w.mp4")
    assert tiny.extract(*ENCODER)[0] == 3
    (path,) = list_stores(tiny.cache)
    assert open_store(path).read_array("state").tolist() == [DONE] * 4 + [FAILED] * 4
    assert set(read_failures(path)) == {f"w-{i}" for i in range(4)}
    (tiny.media / "w.mp4").unlink()
    (tiny.media / "w.mp4").write_bytes(good)
    assert tiny.extract(*ENCODER)[0] == 0
    (tiny.media / "w.mp4").write_bytes(good[: len(good) // 8])
    code, out, _ = tiny.extract(*ENCODER)
    assert (code, "not checked" in out) == (3, False)
    assert open_store(path).read_array("state").tolist() == [DONE] * 4 + [FAILED] * 4


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "v/inner").mkdir(parents=True)
    (tmp_path / "v/inner/1.jpg").write_bytes(b"1")
    location = MediaLocation("folder", tmp_path / "v", rate_hz=25, pattern="%d.jpg")
    assert len(identify_media(location)) == 32
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        identify_media(location)
