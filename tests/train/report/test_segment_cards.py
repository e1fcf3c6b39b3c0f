"""Checks that a segment's card says what the view of the segment says, and nothing else."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.cards import read_card
from echoshift.pipeline.manifest import read_manifest
from echoshift.train.data_places import DataPlaces
from echoshift.train.prediction_table import read_prediction_table
from echoshift.train.report.segment_section import make_segment_card, make_segment_section
from echoshift.train.segment_view.reading import read_segment_view


@pytest.fixture
def places(finished: Any) -> DataPlaces:
    """Return where the small data set lies."""
    card = read_card(finished.root / "tiny.toml")
    return DataPlaces(card, read_manifest(finished.root / "tiny.csv", card), finished.media, finished.root / "cache")


def test_a_card_holds_the_views_bytes_and_numbers(finished: Any, places: DataPlaces) -> None:
    view = read_segment_view(places, finished.runs / "tiny", "t-test-1")
    card = make_segment_card(view)
    assert (card.segment_id, card.labels) == ("t-test-1", ("high",))
    assert [base64.b64decode(frame.url.partition(",")[2]) for frame in card.frames] == [f.jpeg for f in view.frames]
    assert view.sound is not None and base64.b64decode(card.sound_url.partition(",")[2]) == view.sound.wav
    assert view.gate is not None
    for bar, group in zip(card.gate, view.gate.groups, strict=True):
        assert bar.mean == pytest.approx(100 * float(np.mean(group.values, dtype=np.float64)))
    table = read_prediction_table(finished.find_step("table") / "table.parquet")
    row = int(table.find(["t-test-1"])[0])
    expected = {"sound": table.audio_probabilities[row], "pictures": table.visual_probabilities[row]}
    for line in card.predictions:
        probabilities = expected[line.who.split(" ")[0]]
        for name, probability, is_label in line.classes:
            assert probability == pytest.approx(float(probabilities[table.classes.index(name)]))
            assert is_label == (name == "high")
    assert len(card.predictions) == 2


def test_what_can_not_be_read_is_a_sentence(finished: Any, places: DataPlaces) -> None:
    elsewhere = replace(places, media_root=finished.root / "no-media")
    section = make_segment_section(elsewhere, finished.root / "no-runs", 1)
    (block,) = section.blocks
    assert block.kind == "segments" and len(block.cards) == 4
    for card in block.cards:
        assert card.frames == () and card.spectrogram is None and card.sound_url == "" and card.predictions == ()
        assert len(card.sentences) == 5 and all(sentence.endswith(".") for sentence in card.sentences)
    (missing,) = make_segment_section(places, finished.runs / "tiny", 0).blocks
    assert missing.kind == "missing" and "--segments" in missing.command
