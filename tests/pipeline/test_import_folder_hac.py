"""Checks the importers of folders, of HAC's real lists, and of echoshift's own format."""

from __future__ import annotations

from collections import Counter

import pytest

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.errors import CardError, ManifestError, MediaNotFoundError
from echoshift.pipeline.importers.folder import card_from_folder, import_folder, import_hac
from echoshift.pipeline.importers.own import import_own_csv
from echoshift.pipeline.manifest import check_manifest, read_manifest, write_manifest

HAC = read_dataset_card("hac")


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def measure(path):
    return len(path.name) / 4


def test_folders_become_segments_and_a_card(tmp_path):
    put(
        tmp_path, "human/train/running/b.MP4", "human/train/running/a.b.mkv", "human/test/eating/é 1.webm",
        "animal/train/eating/x.mov", "animal/train/eating/notes.txt", "animal/train/eating/.x.mp4", "animal/readme.mp4",
    )  # fmt: skip
    card = card_from_folder(tmp_path, "mine")
    assert (card.name, card.classes, card.domains) == ("mine", ("eating", "running"), ("animal", "human"))
    assert card.splits == ("train", "test") and [s.name for s in card.shifts] == ["animal-human", "human-animal"]
    segments = import_folder(tmp_path, measure)
    assert [(s.video_id, s.stop_s, s.labels, s.domain, s.split) for s in segments] == [
        ("animal/train/eating/x", 1.25, ("eating",), "animal", "train"),
        ("human/test/eating/é 1", 2.0, ("eating",), "human", "test"),
        ("human/train/running/a.b", 1.75, ("running",), "human", "train"),
        ("human/train/running/b", 1.25, ("running",), "human", "train"),
    ]
    assert all(s.segment_id == s.video_id and s.start_s == 0 for s in segments)
    write_manifest(tmp_path / "m.csv", segments)
    assert check_manifest(tmp_path / "m.csv", card) == []


def test_two_files_of_one_name_are_both_named(tmp_path):
    put(tmp_path, "d/train/a/x.mp4", "d/train/a/x.avi", "d/train/b/x.mp4")
    with pytest.raises(ManifestError, match=r"a/x\.avi and .*a/x\.mp4 differ only in their endings"):
        import_folder(tmp_path, measure)


def test_names_that_the_card_does_not_have(tmp_path):
    card = read_dataset_card("actor_shift")
    put(tmp_path, "human/train/watching tv/x.mp4")
    assert import_folder(tmp_path, measure, card, allow_counts=True)[0].labels == ("watching tv",)
    with pytest.raises(ManifestError, match="human train has 1 segments, the card expects 1305"):
        import_folder(tmp_path, measure, card)
    put(tmp_path, "human/train/watching_tv/x.mp4")
    with pytest.raises(
        ManifestError, match=r"watching_tv/x\.mp4: unknown class 'watching_tv'; did you mean 'watching tv'\?"
    ):
        import_folder(tmp_path, measure, card, allow_counts=True)


def test_folders_that_make_no_dataset(tmp_path):
    with pytest.raises(ManifestError, match=r"no video in .*<domain>/<split>/<class>/"):
        import_folder(tmp_path, measure)
    with pytest.raises(ManifestError, match="no folder"):
        card_from_folder(tmp_path / "nothing")
    put(tmp_path, "d/train/only/x.mp4")
    with pytest.raises(CardError, match="hold one class alone, 'only'"):
        card_from_folder(tmp_path)


def probe(segment):
    return 1.0 + len(segment.video_id) / 8


@pytest.mark.shared
def test_hac_lists(shared_data, tmp_path):
    segments = import_hac(shared_data / "annotations" / "hac", HAC, probe)
    assert len(segments) == 1111 + 730 + 870 + 276 + 176 + 218
    assert len({s.segment_id for s in segments}) == len(segments)
    assert Counter(s.video_id for s in segments if s.domain == "human").most_common(24)[-1][1] == 2
    first = segments[0]
    assert (first.segment_id, first.video_id) == (
        "human/train/SnyMPFLLgH4_000012_000022", "human/videos/SnyMPFLLgH4_000012_000022"
    )  # fmt: skip
    assert first.labels == ("sleeping",) and first.stop_s == 1.0 + len(first.video_id) / 8
    doors = {s.labels for s in segments if "door_opening" in s.video_id and s.domain == "cartoon"}
    assert doors == {("opening a door",)}
    path = tmp_path / "hac.csv"
    write_manifest(path, segments)
    assert read_manifest(path, HAC).segments == segments
    faults = check_manifest(path, HAC)
    assert len(faults) == 24 and all("the same span of human/videos/" in f.message for f in faults)


def write_lists(folder, **rows):
    for split in HAC.splits:
        for domain in HAC.domains:
            lines = rows.get(f"{split}_{domain}", ["a_1.mp4,0"])
            (folder / f"HAC_{split}_only_{domain}.csv").write_text("".join(f"{line}\r\n" for line in lines))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.mp4,7"], r"HAC_train_only_animal\.csv:1: label '7' is not 0 to 6"),
        (["a.mp4,0", "a.mp4,0"], r"animal\.csv:2: a is on line 1 too"),
        (["a,0"], r"animal\.csv:1: 'a' is not the name of a video file"),
        (["a.mp4"], r"animal\.csv:1: 1 cells instead of 2"),
    ],
)
def test_hac_faults_name_file_and_line(tmp_path, rows, message):
    write_lists(tmp_path, train_animal=rows)
    with pytest.raises(ManifestError, match=message):
        import_hac(tmp_path, HAC, probe, allow_counts=True)


def test_hac_counts_and_missing_media(tmp_path):
    write_lists(tmp_path)
    with pytest.raises(ManifestError, match="human train has 1 segments, the card expects 1111"):
        import_hac(tmp_path, HAC, probe)

    def find_none(segment):
        raise MediaNotFoundError(f"nothing at {segment.video_id}")

    with pytest.raises(MediaNotFoundError, match="nothing at human/videos/a_1"):
        import_hac(tmp_path, HAC, find_none, allow_counts=True)


def test_own_format_is_checked_and_copied(tmp_path):
    source = tmp_path / "theirs.csv"
    source.write_text("labels,segment_id,video_id,start_s,stop_s,domain,split\nrunning,1,v,0,1.50,human,train\n")
    segments = import_own_csv(source, HAC, allow_counts=True)
    write_manifest(tmp_path / "ours.csv", segments)
    assert (tmp_path / "ours.csv").read_text().splitlines()[1] == "1,v,0.0,1.5,running,human,train,,,,"
    assert read_manifest(tmp_path / "ours.csv", HAC).segments == segments
    with pytest.raises(ManifestError, match="human train has 1 segments"):
        import_own_csv(source, HAC)
    source.write_text(source.read_text().replace("running", "flying"))
    with pytest.raises(ManifestError, match=r"theirs\.csv:2: segment 1: unknown class 'flying'"):
        import_own_csv(source, HAC)
