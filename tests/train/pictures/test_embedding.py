"""Checks which segments are embedded, that features go in as they are stored, and that the seed decides the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.manifold import TSNE

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.open import open_store
from echoshift.train.pictures import adapted_features
from echoshift.train.pictures.embedding import EmbeddedFeatures, choose_segments, draw_embedding, embed
from echoshift.train.pictures.modality_features import read_projected_features
from echoshift.train.pictures.run_choice import RunChoice, choose_alignment_run, choose_stage1_run
from echoshift.train.runs import RunRecord


def make_segments(n: int) -> list[Segment]:
    return [Segment(str(i), "v", 0, 1, ("ab"[i % 2],), "st"[i // 2 % 2], "test") for i in range(n)]


def test_a_subsample_is_decided_by_the_seed() -> None:
    segments = make_segments(50)
    chosen = choose_segments(segments, 20, 3)
    assert chosen == sorted(set(chosen)) and len(chosen) == 20
    assert chosen == choose_segments(segments, 20, 3) != choose_segments(segments, 20, 4)
    assert choose_segments(segments, 50, 3) == list(range(50))


def test_it_is_scikit_learns_tsne() -> None:
    values = np.random.default_rng(0).standard_normal((13, 7)).astype(np.float32)
    expected = TSNE(perplexity=4.0, init="pca", random_state=5).fit_transform(values)  # (13 - 1) / 3
    np.testing.assert_array_equal(embed(values, 5), expected)
    with pytest.raises(RunError, match="at least 5 segments with features, there are 4"):
        embed(values[:4], 0)


def test_each_point_is_drawn_in_both_colourings() -> None:
    segments, points = make_segments(8), np.arange(16, dtype=np.float32).reshape(8, 2)
    part = EmbeddedFeatures("after", tuple(segments), points, 30)
    drawn = draw_embedding([part], ("a", "b", "c"), "here", 9)
    by_domain, by_class = drawn.figure.axes
    for axis, names in ((by_domain, ["s", "t"]), (by_class, ["a", "b"])):
        assert [text.get_text() for text in axis.get_legend().get_texts()] == names
        offsets = np.concatenate([np.asarray(found.get_offsets()) for found in axis.collections])
        np.testing.assert_array_equal(offsets[np.argsort(offsets[:, 0])], points)
    np.testing.assert_array_equal(np.asarray(by_class.collections[1].get_offsets()), points[1::2])
    title = drawn.figure.get_suptitle()
    assert title == "t-SNE (seed 9) of 8 of 30 segments drawn at random, here"
    assert drawn.numbers["after"]["labels"] == list("abababab")


def test_before_and_after_are_what_the_stores_hold(
    compared: Any, open_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_dir, places = compared.runs / "tiny", open_tiny(compared)
    record: RunRecord = choose_stage1_run(runs_dir, RunChoice(shift="s-t"), with_features=True)
    (path,) = (compared.steps / f"features-{record.steps['features']}").glob("*.zarr")
    # The cache has no features from before adaptation, so the adapted ones stand for them here.
    with pytest.raises(RunError, match="no pooled features of tiny by slowfast_demo, from before adaptation"):
        adapted_features.embed_adaptation(places, runs_dir, record)
    monkeypatch.setattr(adapted_features, "list_stores", lambda cache: [path])
    seen = []
    monkeypatch.setattr(adapted_features, "embed", lambda values, seed: (seen.append(values), values[:, :2])[1])
    before, after = adapted_features.embed_adaptation(places, runs_dir, record, max_points=6)
    ids = [segment.segment_id for segment in after.segments]
    assert len(ids) == 6 and after.n_all == before.n_all == 8
    assert {segment.split for segment in after.segments} == {"test"}
    expected = open_store(path).read(ids, "pooled").astype(np.float32).mean(axis=1)
    for values in seen:
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert after.title == "after: stage1 s-t, seed 0"


def test_alignment_is_embedded_with_both_modalities(
    compared: Any, open_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(adapted_features, "embed", lambda values, seed: (seen.append(values), values[:, :2])[1])
    record = choose_alignment_run(compared.runs / "tiny", RunChoice(method="rna"))
    before, after = adapted_features.embed_alignment(open_tiny(compared), compared.runs / "tiny", record)
    projected = read_projected_features(open_tiny(compared), compared.runs / "tiny", record)
    assert before.segments == after.segments == projected.segments
    expected = np.concatenate([projected.visual.mean(axis=1), projected.audio.mean(axis=1)], axis=1)
    np.testing.assert_allclose(seen[1], expected, atol=1e-6)
    silent = replace(projected, heard=np.zeros(8, dtype=bool))
    assert not adapted_features.join_modalities(silent)[:, 8:].any()
