"""Checks how `manifest import csv` and `folder` take one's own files: slips are named, no half card is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoshift.pipeline.cards import read_card

HEAD = "segment_id,video_id,start_s,stop_s,labels,domain,split"
GOOD = ("a,v,0.0,2.5,pour,kitchen,train", "b,v,2.5,4.0,cut,garden,test")


def import_csv(tiny, tmp_path: Path, *lines: str, dataset: str = "mine") -> tuple[int, str, str]:
    file = tmp_path / "own.csv"
    file.write_bytes("\n".join(lines).encode())
    return tiny.run("manifest", "import", "csv", file, "--dataset", dataset, "--manifests", tmp_path)


def test_a_refused_file_leaves_no_card_behind(tiny, tmp_path: Path) -> None:
    code, out, err = import_csv(tiny, tmp_path, HEAD, *GOOD, "a,v,0,1,puor,kitchen,train")
    assert (code, out) == (2, "") and "own.csv:4: segment a: its segment_id is that of line 2 too" in err
    assert not (tmp_path / "mine.toml").exists(), "its card would have the class puor for ever"
    code, out, _ = import_csv(tiny, tmp_path, HEAD, *GOOD)
    assert code == 0 and "note:" not in out
    assert read_card(tmp_path / "mine.toml").classes == ("cut", "pour")


@pytest.mark.parametrize(
    ("more", "note"),
    [
        (
            [*(f"p{i},v,0,1,pour,kitchen,train" for i in range(9)), "t,v,0,1,puor,garden,train"],
            "note: 'puor' (1 segments) may be a misspelt 'pour' (10); ",
        ),
        (["c,v,0,1,pour,garden,"], "own.csv:4: segment c: unknown split ''"),
        (["c,v,0,1,,garden,test"], "note: multi-label, because 1 of 3 segments have several labels or none; "),
    ],
)
def test_slips_are_told(tiny, tmp_path: Path, more: list[str], note: str) -> None:
    _, out, err = import_csv(tiny, tmp_path, HEAD, *GOOD, *more)
    assert note in out + err


def test_other_splits_and_a_lone_domain_are_told(tiny, tmp_path: Path) -> None:
    lines = [line.replace("train", "Train").replace("garden", "kitchen") for line in GOOD]
    code, out, _ = import_csv(tiny, tmp_path, HEAD, *lines)
    assert code == 0
    assert "note: the splits are test, Train: what trains reads `train`, what scores reads `test`; " in out
    assert "note: one domain alone, 'kitchen', makes no shift; " in out


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([HEAD.replace(",", ";"), "a;v;0;1;pour;k;train"], "own.csv:1: columns are separated by ';'; save the file"),
        ([HEAD.replace(",", "\t")], "own.csv:1: columns are separated by '\\t'; save the file with commas"),
        ([HEAD, GOOD[0]], "the files of mine hold one class alone, 'pour'; a dataset needs two or more"),
        ([HEAD], "the files of mine hold no class; a dataset needs two or more"),
    ],
)
def test_files_that_make_no_dataset_are_told_in_words(tiny, tmp_path: Path, lines: list[str], words: str) -> None:
    code, _, err = import_csv(tiny, tmp_path, *lines)
    assert code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["../mine", "my data", ""])
def test_a_name_that_is_no_name_is_refused(tiny, tmp_path: Path, name: str) -> None:
    code, _, err = import_csv(tiny, tmp_path, HEAD, *GOOD, dataset=name)
    assert code == 2 and f"--dataset {name!r}" in err
    assert sorted(path.name for path in tmp_path.rglob("*.toml")) == ["tiny.toml"]


def test_a_folder_is_no_file(tiny, tmp_path: Path) -> None:
    code, _, err = tiny.run("manifest", "import", "csv", tmp_path, "--dataset", "mine", "--manifests", tmp_path)
    assert code == 2 and err == f"error: {tmp_path} can't be read: Is a directory; name a .csv or .parquet file\n"


def test_a_folder_names_every_file_that_is_no_video_and_what_lies_elsewhere(tiny, tiny_dataset, tmp_path: Path) -> None:
    media = tmp_path / "own videos"
    places = ("Küche Süd/train/Hund bellt/1 (ä).mp4", "hof/test/Regen/b.MP4", "lost.mp4", "hof/Regen/c.mp4")
    for place in places:
        tiny_dataset.write_video(media / place)
    for place in ("hof/test/Regen/empty.mp4", "hof/train/Regen/text.mp4"):
        (media / place).parent.mkdir(parents=True, exist_ok=True)
        (media / place).write_bytes(b"")
    arguments = ("manifest", "import", "folder", media, "--dataset", "mine", "--manifests", tmp_path, "--quiet")
    code, _, err = tiny.run(*arguments)
    assert code == 2
    assert all(name in line for name, line in zip(("empty", "text"), err.splitlines(), strict=True))
    assert not (tmp_path / "mine.toml").exists()
    for place in ("hof/test/Regen/empty.mp4", "hof/train/Regen/text.mp4"):
        (media / place).unlink()
    code, out, err = tiny.run(*arguments)
    assert code == 0, err
    note = "note: 2 videos lie outside DOMAIN/SPLIT/CLASS/ and were not taken:"
    assert f"{note} {media / 'hof/Regen/c.mp4'} and others" in out
    ids = [line.split(",")[0] for line in (tmp_path / "mine.csv").read_text(encoding="utf-8").splitlines()[1:]]
    assert ids == ["Küche Süd/train/Hund bellt/1 (ä)", "hof/test/Regen/b"]
