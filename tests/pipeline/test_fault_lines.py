"""Counts the lines that missing and unreadable videos take."""

from __future__ import annotations

from pathlib import Path

from echoshift.pipeline.errors import DecodeError, MediaError, MediaNotFoundError
from echoshift.pipeline.manifest import Fault, find_media_faults, join_missing, list_fault_lines, number_rows
from echoshift.pipeline.segments import Segment

PATH = Path("m.csv")


def probe(segment: Segment) -> float:
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
    return find_media_faults(number_rows(segments), probe, PATH)


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
