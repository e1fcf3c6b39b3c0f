"""Checks the EPIC importer on MM-SADA's real files against METHODS 1's table."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
from collections import Counter
from fractions import Fraction

import pytest

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.errors import ManifestError, UnsafePickleError
from echoshift.pipeline.importers.epic import import_epic, parse_timestamp
from echoshift.pipeline.manifest import SplitSummary, check_manifest, read_manifest, summarise_manifest, write_manifest

CARD = read_dataset_card("epic")
HEAD = "uid,participant_id,video_id,narration,start_timestamp,stop_timestamp,start_frame,stop_frame,verb,verb_class"


@pytest.fixture(scope="module")
def mmsada(shared_data):
    return shared_data / "annotations" / "mmsada"


@pytest.fixture(scope="module")
def segments(mmsada):
    return import_epic(mmsada, CARD)


@pytest.mark.shared
def test_table_of_methods_1(segments):
    assert len(segments) == 10_094
    assert summarise_manifest(segments, CARD) == [
        SplitSummary("D1", "train", 1543, (421, 383, 231, 128, 223, 71, 42, 44), 22, 185),
        SplitSummary("D2", "train", 2495, (715, 692, 245, 214, 298, 89, 113, 129), 14, 635),
        SplitSummary("D3", "train", 3897, (919, 1121, 450, 367, 808, 110, 53, 69), 13, 1291),
        SplitSummary("D1", "test", 435, (124, 104, 52, 34, 66, 13, 20, 22), 6, 56),
        SplitSummary("D2", "test", 750, (208, 217, 68, 56, 136, 14, 26, 25), 5, 207),
        SplitSummary("D3", "test", 974, (241, 280, 102, 71, 245, 29, 1, 5), 4, 323),
    ]


@pytest.mark.shared
def test_uid_is_the_key_and_start_frame_is_not(mmsada, segments):
    assert len({s.segment_id for s in segments}) == len(segments)
    collisions = {}
    for split in ("train", "test"):
        starts = Counter()
        for path in mmsada.glob(f"*_{split}.csv"):
            with path.open(newline="") as file:
                starts.update((row["video_id"], row["start_frame"]) for row in csv.DictReader(file))
        collisions[split] = sum(n - 1 for n in starts.values())
    assert collisions == {"train": 11, "test": 2}


@pytest.mark.shared
def test_csv_gives_what_the_pickles_give(mmsada, segments, tmp_path):
    for path in mmsada.glob("*.csv"):
        shutil.copy(path, tmp_path)
    assert import_epic(tmp_path, CARD) == segments


@pytest.mark.shared
def test_times_are_those_of_the_files(mmsada, segments):
    by_uid = {s.segment_id: s for s in segments}
    with (mmsada / "D1_train.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            segment = by_uid[row["uid"]]
            h, m, s = row["start_timestamp"].split(":")
            assert segment.start_s == float(Fraction(s) + 60 * int(m) + 3600 * int(h))
            assert (segment.video_id, CARD.class_index[segment.labels[0]]) == (row["video_id"], int(row["verb_class"]))
    assert by_uid["12915"].start_s == 4.09 and by_uid["12915"].stop_s == 5.84


@pytest.mark.shared
def test_nouns_are_joined_on_uid(mmsada, shared_data, segments):
    nouns_csv = shared_data / "annotations" / "epic55" / "EPIC_train_action_labels.csv"
    joined = import_epic(mmsada, CARD, nouns_csv)
    assert {s.segment_id: s.noun for s in joined}["12915"] == "fridge"
    assert all(bool(s.noun) == (s.split == "train") for s in joined)
    assert [s.segment_id for s in joined] == [s.segment_id for s in segments]


@pytest.mark.shared
def test_manifest_of_the_real_data_is_faultless_and_exact(segments, tmp_path):
    path = tmp_path / "epic.csv"
    write_manifest(path, segments)
    assert read_manifest(path, CARD).segments == segments
    assert check_manifest(path, CARD) == []


def write_split(folder, domain="D1", split="train", rows=("1,P08,P08_01,get,00:00:01.00,00:00:02.50,60,150,get,0",)):
    (folder / f"{domain}_{split}.csv").write_text("\n".join((HEAD, *rows)) + "\n")


def write_all(folder, **kwargs):
    for domain in CARD.domains:
        for split in CARD.splits:
            write_split(folder, domain, split, ())
    write_split(folder, **kwargs)


def test_counts_nouns_and_unique_uids_are_required(tmp_path):
    write_all(tmp_path)
    with pytest.raises(ManifestError, match="D1 train has 1 segments, the card expects 1543"):
        import_epic(tmp_path, CARD)
    (segment,) = import_epic(tmp_path, CARD, allow_counts=True)
    assert (segment.segment_id, segment.labels, segment.start_s, segment.stop_s) == ("1", ("take",), 1.0, 2.5)
    (tmp_path / "nouns.csv").write_text("uid,noun\n99,cup\n")
    with pytest.raises(ManifestError, match=r"nouns\.csv knows none of the uids"):
        import_epic(tmp_path, CARD, tmp_path / "nouns.csv", allow_counts=True)
    write_split(tmp_path, "D2", "test")
    with pytest.raises(ManifestError, match=r"D2_test\.csv:2: uid 1 is that of .*D1_train\.csv:2 too"):
        import_epic(tmp_path, CARD, allow_counts=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,P08,P08_01,get,00:00:01.00,00:00:02.50,60,150,get,8", r"D1_train\.csv:2: verb_class '8' is not 0 to 7"),
        ("1,P08,P08_01,get,00:00:1.00,00:00:02.50,60,150,get,0", r"D1_train\.csv:2: time stamp '00:00:1\.00'"),
        ("1,P08,P08_01,get,00:00:03.00,00:00:02.50,60,150,get,0", r"D1_train\.csv:2: uid 1 stops before it starts"),
        ("1,P08,P08_01,get,00:00:03.00", r"D1_train\.csv:2: 5 cells instead of 10"),
    ],
)
def test_faults_name_file_and_line(tmp_path, row, message):
    write_all(tmp_path, rows=(row,))
    with pytest.raises(ManifestError, match=message):
        import_epic(tmp_path, CARD, allow_counts=True)


def test_missing_and_unsafe_files(tmp_path):
    with pytest.raises(ManifestError, match=r"neither .*D1_train\.pkl nor D1_train\.csv is there"):
        import_epic(tmp_path, CARD)
    write_all(tmp_path)

    class Planted:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'planted'}",)

    (tmp_path / "D1_train.pkl").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UnsafePickleError, match=r"D1_train\.pkl asks for posix\.system"):
        import_epic(tmp_path, CARD, allow_counts=True)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(("text", "expected"), [("00:00:04.09", 4.09), ("01:02:03.5", 3723.5), ("00:59:59", 3599.0)])
def test_time_stamps(text, expected):
    assert parse_timestamp(text, "here") == expected
    for bad in ("", "4.09", "00:00:60.00", "00:60:00", "-1:00:00", "00:00:01,5", text + " "):
        with pytest.raises(ManifestError, match=r"here: time stamp .* is not HH:MM:SS"):
            parse_timestamp(bad, "here")
