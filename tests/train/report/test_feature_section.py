"""Checks what the section on features says of where there is nothing to draw, and how large features are."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.cards import read_card
from echoshift.pipeline.manifest import read_manifest
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.data_places import DataPlaces
from echoshift.train.pictures.adapted_features import open_adapted_store
from echoshift.train.report.feature_section import make_feature_section
from echoshift.train.runs import RESULTS, read_runs


def open_places(finished: Any, cache: Any) -> DataPlaces:
    card = read_card(finished.root / "tiny.toml")
    return DataPlaces(card, read_manifest(finished.root / "tiny.csv", card), finished.media, cache)


def test_medians_of_norms_are_those_of_the_stores(reported: Any) -> None:
    runs_dir = reported.tiny.runs / "tiny"
    records = read_runs(runs_dir / RESULTS)
    section = make_feature_section(open_places(reported.tiny, reported.cache), runs_dir, records)
    *_, norms, activation = [block for block in section.blocks if block.kind == "figures"]
    assert "of t-test-0." in activation.figures[0].caption and "<image" in activation.figures[0].svg
    caption = norms.figures[0].caption
    pooled = [
        store
        for store in map(open_store, list_stores(reported.cache))
        if [output.name for output in store.spec.outputs] == ["pooled"]
    ]
    medians = []
    for store in (pooled[0], open_adapted_store(runs_dir, records[0])):
        values = store.read(list(store.segment_ids), "pooled").astype(np.float64)
        medians.append(float(np.median(np.linalg.norm(values.reshape(-1, values.shape[-1]), axis=1))))
    told = re.search(r"as extracted (\S+), adapted (\S+)\.", caption)
    assert told is not None
    assert told.groups() == (f"{medians[0]:.3g}", f"{medians[1]:.3g}")


def test_tokens_beside_pooled_features_are_a_sentence(reported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CharadesEgo's Stage 1 exports tokens, while `extract` stores pooled features unless told otherwise."""
    tokens = SimpleNamespace(
        outputs=[SimpleNamespace(name="tokens_slow"), SimpleNamespace(name="tokens_fast")], clip=None
    )
    store = SimpleNamespace(spec=tokens)
    monkeypatch.setattr("echoshift.train.report.feature_section.open_adapted_store", lambda runs_dir, record: store)
    runs_dir = reported.tiny.runs / "tiny"
    records = read_runs(runs_dir / RESULTS)
    section = make_feature_section(open_places(reported.tiny, reported.cache), runs_dir, records)
    assert (
        "Norms of s-t before and after adaptation can't be compared: as extracted there is pooled, adapted "
        "tokens_slow, tokens_fast."
    ) in [block.text for block in section.blocks if block.kind == "missing"]


def test_without_runs_or_features_a_sentence_says_so(finished: Any, tmp_path: Any) -> None:
    section = make_feature_section(open_places(finished, tmp_path), finished.runs / "tiny", [])
    assert [block.command for block in section.blocks if block.kind == "missing"] == [
        "make stage1 DATASET=tiny",
        "make align METHOD=rna DATASET=tiny",
    ]
    records = read_runs(finished.runs / "tiny" / RESULTS)
    section = make_feature_section(open_places(finished, tmp_path), finished.runs / "tiny", records)
    first, *_ = [block for block in section.blocks if block.kind == "missing"]
    assert "has no pooled features of tiny by slowfast_demo" in first.text
