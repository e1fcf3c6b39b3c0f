"""Checks the dataset cards against the papers' tables and the published files."""

from __future__ import annotations

import csv
import math
from collections import Counter

import pytest

from echoshift.pipeline.cards import MANIFESTS_DIR, DatasetCard, MediaLayout, read_card, read_dataset_card
from echoshift.pipeline.errors import CardError


@pytest.mark.parametrize("name", ["epic", "charades_ego", "actor_shift", "hac"])
def test_cards_are_valid(name):
    card = read_dataset_card(name)
    assert card.name == name and card.sources and card.media.audio and not card.synthetic
    shifts = {shift.name for shift in card.shifts}
    for published in card.published:
        assert set(published.scores) <= shifts | {"mean"}
        assert all(0 < score < 100 for score in published.scores.values())
        assert published.metric == card.metric


def test_epic_card():
    card = read_dataset_card("epic")
    assert card.classes == ("take", "put", "open", "close", "wash", "cut", "mix", "pour")
    assert [s.name for s in card.shifts] == [
        *("D1-D2", "D1-D3", "D2-D1", "D2-D3", "D3-D1", "D3-D2"), "D1+D2-D3", "D1+D3-D2", "D2+D3-D1"
    ]  # fmt: skip
    assert sum(c.n_segments for c in card.counts if c.split == "train") == 7935
    assert sum(c.n_segments for c in card.counts if c.split == "test") == 2159
    floor = {}  # METHODS 1: what always naming the source's most frequent class scores on the target
    counts = {(c.domain, c.split): c.n_per_class for c in card.counts}
    for source in card.domains:
        most = max(range(8), key=counts[source, "train"].__getitem__)
        for target in card.domains:
            floor[f"{source}-{target}"] = round(100 * counts[target, "test"][most] / sum(counts[target, "test"]), 2)
    assert {k: v for k, v in floor.items() if k[:2] != k[3:]} == {
        "D1-D2": 27.73, "D1-D3": 24.74, "D2-D1": 28.51, "D2-D3": 24.74, "D3-D1": 23.91, "D3-D2": 28.93
    }  # fmt: skip


def test_printed_means_are_means_of_the_printed_cells():
    """A digit copied wrongly would show; the one row that the paper misprints is marked so."""
    off = []
    for published in read_dataset_card("epic").published:
        cells = [score for shift, score in published.scores.items() if shift != "mean"]
        if cells and abs(sum(cells) / len(cells) - published.scores["mean"]) > 0.06:
            off.append((published.method, published.note[:10]))
    assert off == [("Align", "Misprinted")]


def test_published_numbers_by_shift():
    epic = {(p.table, p.method): p.scores for p in read_dataset_card("epic").published}
    assert len(epic) == 60
    assert epic["Table 4", "Zhang et al., SlowFast"]["D3-D2"] == 69.1
    assert epic["Table 2 (UDA)", "RNA+GRL"]["D1-D3"] == 49.95
    assert epic["Table 1b (DG, multi source)", "RNA"]["D2+D3-D1"] == 51.64
    assert epic["Table 3 (UDA)", "HNA"] == {"mean": 47.19} and ("Table 3 (UDA)", "baseline") not in epic
    charades = {(p.table, p.method): p.scores["third-first"] for p in read_dataset_card("charades_ego").published}
    assert charades["Table 2", "+ audio-adaptive class token z (whole model)"] == 26.3
    assert charades["Table 3 (audible activities)", "visual encoder"] == 22.7


def test_other_cards():
    charades, actor_shift = read_dataset_card("charades_ego"), read_dataset_card("actor_shift")
    assert charades.classes == tuple(f"c{i:03d}" for i in range(157))
    assert (charades.task, charades.metric, charades.shifts[0].name) == ("multi-label", "map", "third-first")
    assert [(c.domain, c.split, c.n_segments) for c in actor_shift.counts] == [
        ("human", "train", 1305), ("animal", "train", 35), ("animal", "test", 165)
    ]  # fmt: skip
    assert charades.media.frame_pattern.replace("{video_id}", "AB1CDEGO") % 7 == "AB1CDEGO-000007.jpg"


def test_epic_clock_finds_the_frame_numbers_of_mmsada():
    """File n is shown from (n - n_first) / rate on: RGB floor(60 t), flow ceil(frame / 2)."""
    media = read_dataset_card("epic").media
    assert media.frame_rate_hz is not None and media.flow_rate_hz is not None
    for hundredths in range(0, 2000):
        frame = hundredths * 60 // 100
        t_s = hundredths / 100 + 1e-6
        assert math.floor(t_s * media.frame_rate_hz + media.n_first_frame) == frame
        assert math.floor(t_s * media.flow_rate_hz + media.n_first_flow) == math.ceil(frame / 2)


@pytest.mark.shared
def test_epic_clock_on_the_real_start_frames(shared_data):
    media = read_dataset_card("epic").media
    off = Counter()
    for path in (shared_data / "annotations" / "mmsada").glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                hours, minutes, seconds = row["start_timestamp"].split(":")
                t_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds) + 1e-6
                off[math.floor(t_s * media.frame_rate_hz + media.n_first_frame) - int(row["start_frame"])] += 1
    assert set(off) <= {-1, 0, 1} and off[0] > 10_000


@pytest.mark.shared
def test_hac_classes_are_those_of_the_cartoon_files(shared_data):
    words = {"sleeping": 0, "watching": 1, "eating": 2, "drinking": 3, "swimming": 4, "running": 5, "door_opening": 6}
    seen = set()
    for split in ("train", "test"):
        with (shared_data / "annotations" / "hac" / f"HAC_{split}_only_cartoon.csv").open(newline="") as file:
            seen |= {(name.rsplit("_", 1)[0], int(index)) for name, index in csv.reader(file)}
    assert seen == set(words.items())
    classes = read_dataset_card("hac").classes
    assert [classes[i].split()[0] for w, i in words.items()] == [w.replace("door_", "") for w in words]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"rgb": ["videos/{video}"]}, "template 'videos/{video}' must hold {video_id}"),
        ({"rgb": ["videos"]}, "must hold {video_id}"),
        ({"frame_pattern": "frame.jpg"}, "must be a file name with one number"),
        ({"frame_pattern": "{id}-%d-%d.jpg"}, "must be a file name with one number"),
        ({"flow_pattern": "u/%d.jpg"}, "must be a file name with one number"),
    ],
)
def test_media_layout_refuses(field, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        MediaLayout(**field)


def test_errors_name_file_and_field(tmp_path):
    text = (MANIFESTS_DIR / "hac.toml").read_text()
    path = tmp_path / "x.toml"
    path.write_text(text.replace('metric = "top1"', 'metric = "top5"'))
    with pytest.raises(CardError, match=r"x\.toml: metric: "):
        read_card(path)
    path.write_text(text.replace("n_segments = 1111", "n_segments = 1112"))
    with pytest.raises(CardError, match="n_per_class of human/train doesn't add up"):
        read_card(path)
    path.write_text(text + "\n[extra]\n")
    with pytest.raises(CardError, match="extra"):
        read_card(path)
    with pytest.raises(CardError, match=r"no dataset card .*nothing\.toml; cards there: .*hac, x"):
        read_dataset_card("nothing", tmp_path)
    assert isinstance(read_card(MANIFESTS_DIR / "hac.toml"), DatasetCard)


CARD = """name = "mine"
title = "Küche"
task = "single-label"
metric = "top1"
classes = ["a", "b"]
domains = ["k", "g"]
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CARD.encode("latin-1"), r"mine\.toml is not valid TOML: 'utf-8' codec can't decode byte 0xfc"),
        (CARD.replace("metric", "metrik").encode(), r"metrik: no such key; did you mean 'metric'\?"),
        (CARD.replace("top1", "map").encode(), "card: metric 'map' is not that of a single-label task"),
        (CARD.replace('"mine"', '"demo"').encode(), r"mine\.toml: name is 'demo'; set name = 'mine'"),
    ],
)
def test_slips_in_a_card_are_told_in_words(tmp_path, content, message):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(CardError, match=message):
        read_dataset_card("mine", tmp_path)
    for mark, ending in (("", "\n"), ("\ufeff", "\r\n")):  # as editors on Windows save it
        (tmp_path / "mine.toml").write_bytes((mark + CARD.replace("\n", ending)).encode())
        assert read_dataset_card("mine", tmp_path).title == "Küche"
