"""Checks that media that can't be read for a while cost no features, and that media that are broken do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from echoshift.extract.media import MediaLocation, identify_media
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.pipeline.store.open import list_stores, open_store

ENCODER = ("--encoders", "resnet_demo")


def read_files(tiny) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(tiny.cache.rglob("*")) if path.is_file()}


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


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
