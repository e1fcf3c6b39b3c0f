"""Proves that manifests survive writing and reading exactly, and that malformed ones are refused by line."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.manifest import COLUMNS, locate_manifest, read_manifest, write_manifest
from echoshift.pipeline.segments import Segment, TimedLabel

CLASSES = ("wash, rinse", 'say "no"', "öffnen 開ける", " spaced  name ", "c1 2.0 3.0", "plain")
CARD = DatasetCard(
    name="try", title="t", task="multi-label", metric="map", classes=CLASSES, domains=("é,1", "D2"),
)  # fmt: skip
SINGLE = CARD.model_copy(update={"task": "single-label"})
text = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs",)), max_size=8)
word = st.text(st.characters(exclude_characters="\r\n\0;", exclude_categories=("Cs",)), min_size=1, max_size=6)


@st.composite
def draw_segments(draw):
    ids = draw(st.lists(text.filter(bool), unique=True, max_size=6))
    segments = []
    for segment_id in ids:
        start_s = draw(st.floats(0, 1e6, allow_subnormal=True))
        stop_s = draw(st.floats(start_s, 2e6, exclude_min=True))
        labels = tuple(draw(st.lists(st.sampled_from(CLASSES), unique=True)))
        timed = ()
        if labels and stop_s > start_s:
            timed = (TimedLabel(draw(st.sampled_from(labels)), start_s, stop_s),) * draw(st.integers(0, 2))
        segments.append(
            Segment(
                segment_id, "v/" + draw(word), start_s, stop_s, labels, draw(st.sampled_from(CARD.domains)),
                draw(st.sampled_from(CARD.splits)), draw(text), draw(text),
                tuple(sorted(draw(st.sets(word, max_size=3)))), timed,
            )
        )  # fmt: skip
    return segments


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw_segments())
def test_round_trip_is_exact(tmp_path, segments):
    segments = [s for s in segments if ".." not in s.video_id.split("/")]
    path = tmp_path / "m.csv"
    sha256 = write_manifest(path, segments)
    manifest = read_manifest(path, CARD)
    assert manifest.segments == tuple(segments)
    assert manifest.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    again = tmp_path / "again.csv"
    write_manifest(again, manifest.segments)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.csv", "m.csv"]


def make(**changes) -> Segment:
    return replace(Segment("a", "v", 0.0, 1.0, ("plain",), "D2", "train"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a;b",)}, "label 'a;b' holds ';'"),
        ({"tags": ("x;",)}, "tag 'x;' holds ';'"),
        ({"noun": "a\nb"}, r"noun 'a\\nb' holds '\\n'"),
        ({"video_id": "a\rb"}, r"video_id 'a\\rb' holds '\\r'"),
        ({"segment_id": "a\0"}, "segment_id"),
        ({"labels": ("",)}, "empty label"),
        ({"tags": ("b", "a")}, "not sorted and unique"),
        ({"start_s": math.nan}, "not a finite number"),
        ({"timed_labels": (TimedLabel("plain", 0, math.inf),)}, "not a finite number"),
        ({"noun": "\ud800"}, "not valid text"),
    ],
)
def test_what_can_not_be_read_back_is_not_written(tmp_path, changes, message):
    with pytest.raises(ManifestError, match=message) as raised:
        write_manifest(tmp_path / "m.csv", [make(**changes)])
    assert "segment 'a" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_file_is_plain_and_replaced_whole(tmp_path):
    path = tmp_path / "new" / "m.csv"
    timed = (TimedLabel("plain", 0.1, 1 / 3), TimedLabel("c1 2.0 3.0", 0.2, 1.0))
    write_manifest(path, [make(labels=("plain", "c1 2.0 3.0"), noun="cup, big", tags=("p", "q"), timed_labels=timed)])
    assert path.read_text().splitlines() == [
        ",".join(COLUMNS),
        'a,v,0.0,1.0,plain;c1 2.0 3.0,D2,train,"cup, big",,p;q,plain 0.1 0.3333333333333333;c1 2.0 3.0 0.2 1.0',
    ]
    before = path.read_bytes()
    with pytest.raises(ManifestError):
        write_manifest(path, [make(), make(segment_id="b", labels=(";",))])
    assert path.read_bytes() == before
    with pytest.raises(ManifestError, match=r"written as \.csv"):
        write_manifest(tmp_path / "m.parquet", [])
    assert locate_manifest("epic").parts[-3:] == ("data", "manifests", "epic.csv")


def save(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


HEAD = "segment_id,video_id,start_s,stop_s,labels,domain,split"


def test_optional_columns_may_be_absent_and_order_is_free(tmp_path):
    path = save(
        tmp_path / "m.csv", "\ufeffsplit,labels,video_id,segment_id,stop_s,start_s,domain,tags", "train,,v,1,2,1,D2,b;a"
    )
    assert read_manifest(path, CARD).segments == (
        make(segment_id="1", start_s=1.0, stop_s=2.0, labels=(), tags=("a", "b")),
    )


def test_all_faults_of_a_file_are_listed_by_line(tmp_path):
    path = save(
        tmp_path / "m.csv", HEAD + ",timed_labels",
        "1,v,0,1,plain,D2,train,",
        "2,v,zero,1,plain,D2,train,plain 0",
        "3,v,0,1,plain,D2",
        "1,v,0,1,plian,D2,train,plain 0 x",
        "5,v,0,1,plain;;plain,D2,train,",
    )  # fmt: skip
    with pytest.raises(ManifestError) as raised:
        read_manifest(path, CARD)
    assert str(raised.value).split("\n") == [
        f"{path}:3: segment 2: start_s 'zero' is no number; give seconds, such as 12.5",
        f"{path}:3: segment 2: timed label 'plain 0' is not `label start stop`; give a class and two times in seconds",
        f"{path}:4: segment 3: it has 6 cells, the header 8; quote cells that hold a comma",
        f"{path}:5: segment 1: time of timed label 'plain' 'x' is no number; give seconds, such as 12.5",
        f"{path}:5: segment 1: unknown class 'plian'; did you mean 'plain'?",
        f"{path}:5: segment 1: its segment_id is that of line 2 too; give each segment its own",
        f"{path}:6: segment 5: labels 'plain;;plain' has an empty name or one with ';'; "
        "write names joined by single ';'",
        f"{path}:6: segment 5: label 'plain' is given twice; give it once",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (f"{HEAD},start_frame\n".encode(), r"m\.csv:1: unknown column 'start_frame'; did you mean 'start_s'\?"),
        (HEAD.replace(",stop_s", "").encode(), r"m\.csv:1: no column 'stop_s'"),
        (f"{HEAD},split\n".encode(), r"m\.csv:1: column 'split' is there twice"),
        (b'segment_id,video_id\n"', r"no column|not valid CSV"),
        (HEAD.encode() + b"\n1,v,0,1,plain,D2,train\n2,\xff,0,1,plain,D2,train\n", r"m\.csv:3: not UTF-8"),
        (HEAD.encode() + b'\n1,"v"x,0,1,plain,D2,train\n', r"m\.csv:2: not valid CSV"),
        (
            HEAD.encode() + b'\n1,"a\nb",0,1,plain,D2,train\n2,v,1,0,plain,D2,train\n',
            r"m\.csv:2: .*line break(?s:.*)m\.csv:4: ",
        ),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(path, CARD)


def test_many_faults_a_missing_file_and_an_unknown_ending(tmp_path):
    path = save(tmp_path / "many.csv", HEAD, *(f"{i},v,1,1,plain,D2,train" for i in range(70)))
    with pytest.raises(ManifestError, match=r"\.\.\. and 20 more$"):
        read_manifest(path, CARD)
    with pytest.raises(ManifestError, match=r"no manifest .*m\.csv"):
        read_manifest(tmp_path / "m.csv", CARD)
    save(tmp_path / "m.tsv", "x")
    with pytest.raises(ManifestError, match=r"ends in \.csv or \.parquet"):
        read_manifest(tmp_path / "m.tsv", CARD)


@pytest.mark.parametrize("form", ["text", "lists"])
def test_parquet_gives_the_same_segments(tmp_path, form):
    segments = (
        make(labels=("plain", "wash, rinse"), tags=("a", "b"), timed_labels=(TimedLabel("plain", 0.1, 1 / 3),)),
        make(segment_id="b", labels=(), start_s=1 / 3, stop_s=2 / 3, noun="Ä"),
    )
    rows = [
        {
            "segment_id": s.segment_id, "video_id": s.video_id, "start_s": s.start_s, "stop_s": s.stop_s,
            "labels": ";".join(s.labels) if form == "text" else list(s.labels), "domain": s.domain, "split": s.split,
            "noun": s.noun or None, "tags": ";".join(s.tags) if form == "text" else list(s.tags),
            "timed_labels": ";".join(f"{t.label} {t.start_s!r} {t.stop_s!r}" for t in s.timed_labels)
            if form == "text" else [asdict(t) for t in s.timed_labels],
        }
        for s in segments
    ]  # fmt: skip
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    manifest = read_manifest(path, CARD)
    assert manifest.segments == segments
    assert manifest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(
        ManifestError, match=r"m\.parquet:1: segment a: it has 2 labels(?s:.*)m\.parquet:2: segment b: it has no"
    ):
        read_manifest(path, SINGLE)
    pq.write_table(pa.table({"segment_id": ["1"], "fps": [1]}), path)
    with pytest.raises(ManifestError, match=r"m\.parquet: unknown column 'fps'"):
        read_manifest(path, CARD)
    path.write_bytes(b"PAR1")
    with pytest.raises(ManifestError, match="is no Parquet file"):
        read_manifest(path, CARD)
