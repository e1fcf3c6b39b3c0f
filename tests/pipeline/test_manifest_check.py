"""Proves that a check finds every planted fault, with its line, and asks for each video once."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoshift.pipeline.cards import DatasetCard, ExpectedCount
from echoshift.pipeline.errors import DecodeError, ManifestError, MediaError, MediaNotFoundError
from echoshift.pipeline.manifest import (
    Fault,
    check_manifest,
    find_count_warnings,
    find_media_faults,
    join_missing,
    list_fault_lines,
    number_rows,
    require_counts,
)
from echoshift.pipeline.segments import END_TOLERANCE_S, Segment

CARD = DatasetCard(
    name="try", title="t", task="single-label", metric="top1", classes=("open", "close"), domains=("D1", "D2"),
    counts=(ExpectedCount(domain="D1", split="train", n_segments=3, n_per_class=(2, 1), n_videos=2),),
)  # fmt: skip
MULTI = CARD.model_copy(update={"task": "multi-label", "counts": ()})
HEAD = "segment_id,video_id,start_s,stop_s,labels,domain,split,timed_labels"


class Probe:
    def __init__(self, **durations):
        self.durations, self.asked = durations, []

    def __call__(self, segment):
        self.asked.append(segment.video_id)
        found = self.durations[segment.video_id]
        if isinstance(found, Exception):
            raise found
        return found


def save(path: Path, *lines: str) -> Path:
    path.write_text("\n".join((HEAD, *lines)) + "\n")
    return path


def test_every_planted_fault_is_found_with_its_line(tmp_path):
    path = save(
        tmp_path / "m.csv",
        "1,v,0,1,open,D1,train,",  # 2: the good one
        "2,v,3,3,open,D1,train,",  # 3
        "3,v,5,4,open,D1,train,",  # 4
        "4,v,-1,4,open,D1,train,",  # 5
        "5,v,nan,4,open,D1,train,",  # 6
        "6,v,0,inf,open,D1,train,",  # 7
        "7,v,0,1,opens,D1,train,",  # 8
        "8,v,0,2,open,D3,train,",  # 9
        "9,v,0,3,open,D1,trian,",  # 10
        "10,v,0,4,,D1,train,",  # 11
        "11,v,0,5,open;close,D1,train,",  # 12
        "12,v,0,6,open,D1,train,open 1 7",  # 13
        "13,v,0,7,open,D1,train,close 1 2",  # 14
        "14,v,0,8,open,D1,train,opne 2 1",  # 15
        "1,v,0,9,open,D1,train,",  # 16
        ",,0,1,open,D1,train,",  # 17
        "16,../v,0,1,open,D1,train,",  # 18
        "17,/v,0,1,open,D1,train,",  # 19
        "18,missing,0,1,open,D1,train,",  # 20
        "19,broken,0,1,open,D1,train,",  # 21
        f"20,v,0,{10 + END_TOLERANCE_S},open,D1,train,",  # 22: at the tolerance, good
        f"21,v,0,{10 + END_TOLERANCE_S + 0.01},open,D1,train,",  # 23
        "22,v,x,y,open,D9,train,",  # 24
    )
    probe = Probe(
        v=10.0, missing=MediaNotFoundError("no file missing.*"), broken=DecodeError("cut short"),
        **{"": 9.0, "../v": 9.0, "/v": 9.0},
    )  # fmt: skip
    faults = check_manifest(path, CARD, probe)
    errors = [f for f in faults if f.level == "error"]
    assert [(f.line, f.message) for f in errors] == [
        (3, "stop_s 3.0 is not after start_s 3.0"),
        (4, "stop_s 4.0 is not after start_s 5.0"),
        (5, "start_s -1.0 is negative"),
        (6, "start_s is nan"),
        (7, "stop_s is inf"),
        (7, "it ends at inf s, its video v at 10.000 s"),
        (8, "unknown class 'opens'"),
        (9, "unknown domain 'D3'"),
        (10, "unknown split 'trian'"),
        (11, "it has no label"),
        (12, "it has 2 labels"),
        (13, "timed label 'open' 1.0 to 7.0 s is outside the segment, 0.0 to 6.0 s"),
        (14, "timed label 'close' 1.0 to 2.0 s is not among its labels"),
        (15, "unknown class of a timed label 'opne'"),
        (15, "timed label 'opne' 2.0 to 1.0 s is not among its labels"),
        (15, "timed label 'opne' 2.0 to 1.0 s is no span"),
        (16, "its segment_id is that of line 2 too"),
        (17, "it has no segment_id"),
        (17, "it has no video_id"),
        (18, "video_id '../v' leads out of the media root"),
        (19, "video_id '/v' leads out of the media root"),
        (20, "no media: no file missing.*"),
        (21, "unreadable media: cut short"),
        (23, "it ends at 10.51 s, its video v at 10.000 s"),
        (24, "start_s 'x' is no number"),
        (24, "stop_s 'y' is no number"),
        (24, "unknown domain 'D9'"),
    ]
    assert str(errors[7]) == f"{path}:9: segment 8: unknown domain 'D3'; the card has D1, D2"
    assert str(errors[9]) == f"{path}:11: segment 10: it has no label; try is single-label: give exactly one"
    assert all(f.segment_id == str(f.line - 1) for f in errors if f.line < 16)
    warnings = [f.message for f in faults if f.level == "warning"]
    assert warnings[-1] == "D1 train has 6 videos, the card expects 2" and len(warnings) == 3
    assert faults == errors + [f for f in faults if f.level == "warning"]


def test_a_video_is_asked_once_a_place():
    segments = [Segment(str(i), "v", i, i + 1, ("open",), "D1", "train") for i in range(5)]
    segments.append(Segment("other", "v", 0, 1, ("open",), "D1", "test"))
    probe = Probe(v=2.0)
    faults = find_media_faults(number_rows(segments), probe, Path("m.csv"))
    assert probe.asked == ["v", "v"]
    assert [f.line for f in faults] == [4, 5, 6]


def test_multi_label_may_have_none_or_many(tmp_path):
    path = save(tmp_path / "m.csv", "1,v,0,1,,D1,train,", "2,v,0,1,open;close,D1,train,open 0 1;open 0.5 1")
    assert check_manifest(path, MULTI) == []


def test_leaks_and_counts_are_warnings(tmp_path):
    path = save(
        tmp_path / "m.csv", "1,v,0,1,open,D1,train,", "2,v,0,1,open,D1,test,", "3,v,0,1,open,D1,train,",
        "4,w,0,1,close,D1,train,",
    )  # fmt: skip
    assert check_manifest(path, CARD) == [
        Fault(
            str(path), 3, "2", "line 2 has the same span of v in split train",
            "take it out of one of them, or know that scores are a little flattered", "warning",
        )
    ]  # fmt: skip
    subset = [Segment("1", "v", 0, 1, ("open",), "D1", "train")]
    found = find_count_warnings(subset, CARD, path)
    assert [w.message for w in found] == [
        "D1 train has 1 segments, the card expects 3",
        "D1 train has 1 of class open, the card expects 2",
        "D1 train has 0 of class close, the card expects 1",
        "D1 train has 1 videos, the card expects 2",
    ]
    assert str(found[0]).startswith(f"{path}: D1 train has 1") and {w.level for w in found} == {"warning"}
    with pytest.raises(ManifestError, match=r"D1 train has 1 segments, the card expects 3; .*allow other counts"):
        require_counts(subset, CARD, path, allow_counts=False)
    require_counts(subset, CARD, path, allow_counts=True)


def probe_by_name(segment: Segment) -> float:
    """Find videos missing whose names begin with m, and unreadable whose names begin with u."""
    if segment.video_id[0] in "mu":
        error: type[MediaError] = MediaNotFoundError if segment.video_id[0] == "m" else DecodeError
        raise error(f"{segment.video_id} isn't right")
    return 2.0


def find_faults(n_videos: int, kind: str, n_each: int = 3) -> list[Fault]:
    """Find the faults of videos of n_each segments, the first segments of all videos first."""
    segments = [
        Segment(f"{kind}{v}-{i}", f"{kind}{v}", i, i + 1, ("open",), "D1", "train")
        for i in range(n_each)
        for v in range(n_videos)
    ]
    return find_media_faults(number_rows(segments), probe_by_name, Path("m.csv"))


def test_a_missing_video_is_a_line_with_the_number_of_its_segments() -> None:
    assert list_fault_lines(find_faults(2, "m")) == [
        "error: m.csv:2: segment m0-0 and 2 more of its video: no media: m0 isn't right; "
        "put the file there, or give another media root",
        "error: m.csv:3: segment m1-0 and 2 more of its video: no media: m1 isn't right; "
        "put the file there, or give another media root",
    ]
    [line] = list_fault_lines(find_faults(1, "u", n_each=1))
    assert line == "error: m.csv:2: segment u0-0: unreadable media: u0 isn't right; replace the file"


def test_the_first_twenty_of_each_kind_have_lines_and_all_other_faults() -> None:
    too_long = find_faults(30, "v")
    assert [fault.line for fault in too_long] == list(range(62, 92)), "the third of each ends after its video"
    warning = Fault("m.csv", 0, "", "D1 train has 1 videos", "all right", "warning")
    lines = list_fault_lines([*find_faults(417, "m"), *find_faults(21, "u"), *too_long, warning])
    assert len(lines) == 20 + 20 + 30 + 2 + 1
    assert [line.split(" and 2 more")[0] for line in lines[:20]] == [
        f"error: m.csv:{2 + v}: segment m{v}-0" for v in range(20)
    ]
    assert lines[40:70] == [f"error: {fault}" for fault in too_long]
    assert lines[70:] == [
        "error: m.csv: and 397 more missing videos, of 1191 segments; --json lists all",
        "error: m.csv: and 1 more unreadable video, of 3 segments; --json lists all",
        "warning: m.csv: D1 train has 1 videos; all right",
    ]


def test_where_none_is_there_one_line_says_so_and_the_remedy() -> None:
    other = Fault("m.csv", 7, "x", "it has no label", "give one")
    joined = join_missing([other, *find_faults(417, "m")], 417, Path("/wrong"))
    assert list_fault_lines(joined) == [
        "error: m.csv: none of the 417 videos is in /wrong: m0 isn't right; name the folder that holds them with "
        "--media, or mount its disk",
        "error: m.csv:7: segment x: it has no label; give one",
    ]
