"""Checks the CharadesEgo importer on small files in the official layout, written by hand."""

from __future__ import annotations

import logging

import pytest

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.importers.charades_ego import import_charades_ego
from echoshift.pipeline.manifest import check_manifest, write_manifest
from echoshift.pipeline.segments import TimedLabel

CARD = read_dataset_card("charades_ego")
HEAD = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length,egocentric"


def format_row(video_id, actions="c005 1.00 4.50;c106 0.00 10.20", length="12.50"):
    script = '"A person opens a ""door"", and laughs."'
    ego = "Yes" if "EGO" in video_id else "No"
    return f"{video_id},SUBJ,Kitchen,6,7,Yes,{script},door;cup,{script},{actions},{length},{ego}"


def write_views(folder, n_pairs=4, **rows):
    ids = [f"V{i:03d}A" for i in range(n_pairs)]
    files = {
        "train_only3rd": [format_row(i) for i in ids],
        "train_only1st": [format_row(f"{i}EGO") for i in reversed(ids)],
        "test_only3rd": [format_row("TEST1")],
        "test_only1st": [format_row("TEST1EGO")],
        **rows,
    }
    assert HEAD.split(",").index("actions") == 9
    for name, lines in files.items():
        (folder / f"CharadesEgo_v1_{name}.csv").write_text("\n".join([HEAD, *lines]) + "\n")


def read(folder, **options):
    return import_charades_ego(folder, CARD, allow_counts=True, **options)


def test_a_video_is_a_segment_with_timed_labels(tmp_path):
    write_views(tmp_path)
    segments = read(tmp_path)
    assert [(s.domain, s.split) for s in segments] == [
        *[("third", "train")] * 4, *[("first", "train")] * 4, ("third", "test"), ("first", "test")
    ]  # fmt: skip
    third, first = segments[0], segments[7]
    assert (third.segment_id, third.video_id, third.pair_id) == ("V000A", "V000A", "V000A")
    assert (first.segment_id, first.video_id, first.pair_id) == ("V000AEGO", "V000AEGO", "V000A")
    assert (third.start_s, third.stop_s, third.labels) == (0.0, 12.5, ("c005", "c106"))
    assert third.timed_labels == (TimedLabel("c005", 1.0, 4.5), TimedLabel("c106", 0.0, 10.2))
    assert third.tags == () and segments[-1].tags == ()
    write_manifest(tmp_path / "m.csv", segments)
    assert [f for f in check_manifest(tmp_path / "m.csv", CARD) if f.level == "error"] == []


@pytest.mark.parametrize(("fraction", "n_labelled"), [(0.5, 50), (0, 0), (1, 100), (0.305, 30), (0.29, 29)])
def test_the_first_part_of_the_first_person_file_is_labelled(tmp_path, fraction, n_labelled):
    write_views(tmp_path, n_pairs=100)
    target = [s for s in read(tmp_path, labelled_fraction=fraction) if (s.domain, s.split) == ("first", "train")]
    assert [s.tags for s in target] == [("labelled",)] * n_labelled + [("unlabelled",)] * (100 - n_labelled)
    assert target[0].segment_id == "V099AEGO"


def test_pairs_half_and_none(tmp_path):
    write_views(tmp_path, n_pairs=12)
    ids = {}
    for pairs in ("all", "half", "none"):
        train = [s for s in read(tmp_path, pairs=pairs) if s.split == "train"]
        ids[pairs] = {d: [s.pair_id for s in train if s.domain == d] for d in ("third", "first")}
        labelled = [s.tags for s in train if s.domain == "first"]
        assert labelled.count(("labelled",)) * 2 == len(labelled)
        assert len([s for s in read(tmp_path, pairs=pairs) if s.split == "test"]) == 2
    assert {k: (len(v["third"]), len(v["first"])) for k, v in ids.items()} == {
        "all": (12, 12),
        "half": (6, 6),
        "none": (6, 6),
    }
    assert set(ids["half"]["third"]) == set(ids["half"]["first"])
    assert set(ids["none"]["third"]).isdisjoint(ids["none"]["first"])
    assert ids["none"]["first"] == ids["half"]["first"]


def test_actions_may_be_none_or_repeated_and_are_cut_at_the_end_and_counted(tmp_path, caplog):
    beyond = format_row("C", "c001 1.00 20.00;c002 15.00 16.00;c003 2.00 2.00", "10")
    repeated = format_row("B", "c001 0.00 1.00;c000 1.00 2.00;c001 3.00 4.00")
    write_views(tmp_path, train_only3rd=[format_row("A", ""), repeated, beyond])
    with caplog.at_level(logging.WARNING):
        none, twice, cut = read(tmp_path)[:3]
    assert (none.labels, none.timed_labels) == ((), ())
    assert twice.labels == ("c001", "c000") and len(twice.timed_labels) == 3
    assert cut.labels == ("c001", "c002", "c003")
    assert cut.timed_labels == (TimedLabel("c001", 1.0, 10.0),)
    assert "3 actions reach beyond their videos and were cut there" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train_only3rd": [format_row("AEGO")]}, r"train_only3rd\.csv:2: id 'AEGO' is not of a third-person video"),
        ({"train_only1st": [format_row("A")]}, r"train_only1st\.csv:2: id 'A' is not of a first-person video"),
        ({"train_only3rd": [format_row("A"), format_row("A")]}, r"only3rd\.csv:3: id A is that of line 2 too"),
        ({"train_only3rd": [format_row("A", length="")]}, r"only3rd\.csv:2: '' is no time in seconds"),
        ({"train_only3rd": [format_row("A", length="0")]}, r"only3rd\.csv:2: video A has length 0"),
        ({"train_only3rd": [format_row("A", "c157 0 1")]}, r"only3rd\.csv:2: action 'c157 0 1' is not"),
        ({"train_only3rd": [format_row("A", "c001 0")]}, r"only3rd\.csv:2: action 'c001 0' is not"),
        ({"train_only3rd": [format_row("A", "c001 x 1")]}, r"only3rd\.csv:2: 'x' is no time in seconds"),
    ],
)
def test_faults_name_file_and_line(tmp_path, rows, message):
    write_views(tmp_path, **rows)
    with pytest.raises(ManifestError, match=message):
        read(tmp_path)


def test_counts_missing_files_and_options(tmp_path):
    with pytest.raises(ManifestError, match=r"no file .*CharadesEgo_v1_train_only3rd\.csv"):
        read(tmp_path)
    write_views(tmp_path)
    with pytest.raises(ManifestError, match="third train has 4 segments, the card expects 3083"):
        import_charades_ego(tmp_path, CARD)
    with pytest.raises(ManifestError, match=r"labelled_fraction 1\.5 is not between 0 and 1"):
        read(tmp_path, labelled_fraction=1.5)
    with pytest.raises(ManifestError, match="pairs 'some' is not one of all, half, none"):
        read(tmp_path, pairs="some")
    (tmp_path / "CharadesEgo_v1_train_only3rd.csv").write_text("id,length\nA,1\n")
    with pytest.raises(ManifestError, match=r"train_only3rd\.csv:1: no column 'actions'"):
        read(tmp_path)
