"""Checks that a run on a wrong folder, or on media that are gone, costs no features."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoshift.pipeline.store.open import list_stores

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


@pytest.mark.parametrize("encoder", ["slowfast_demo", "resnet_demo"])
def test_rows_whose_video_was_deleted_are_not_lost(tiny, tiny_dataset, encoder: str) -> None:
    tiny.add_videos("v", "w")
    assert tiny.extract("--encoders", encoder)[0] == 0
    before = read_files(tiny)
    (tiny.media / "w.mp4").unlink()
    code, _, err = tiny.extract("--encoders", encoder)
    assert code == 2
    assert "error: 4 rows of " in err and "are done, and their media are gone: no " in err and "of video w below" in err
    assert read_files(tiny) == before
    tiny.write_manifest(tiny_dataset.make_segments(["v"]))
    assert tiny.extract("--encoders", encoder)[0] == 0
    assert read_files(tiny) == before
