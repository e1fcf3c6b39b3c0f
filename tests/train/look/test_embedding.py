"""Checks which segments are embedded, that features go in as they are stored, and that the seed decides the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.manifold import TSNE

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.train.look import features, figures
from echoshift.train.look.features import open_adapted_store, read_projected_features
from echoshift.train.look.figures import Embedding, draw_embeddings, draw_sample, embed, make_embedding
from echoshift.train.look.run_choice import RunChoice, choose_alignment_run, choose_stage1_run
from echoshift.train.splits import DataPlaces


def make_segments(n: int) -> list[Segment]:
    return [Segment(str(i), "v", 0, 1, ("ab"[i % 2],), "st"[i // 2 % 2], "test") for i in range(n)]


def test_a_sample_is_decided_by_the_seed() -> None:
    chosen = draw_sample(50, 20, 3)
    assert chosen == sorted(set(chosen)) and len(chosen) == 20
    assert chosen == draw_sample(50, 20, 3) != draw_sample(50, 20, 4)
    assert draw_sample(50, 50, 3) == list(range(50))


def test_it_is_scikit_learns_tsne() -> None:
    values = np.random.default_rng(0).standard_normal((13, 7)).astype(np.float32)
    expected = TSNE(perplexity=4.0, init="pca", random_state=5).fit_transform(values)  # (13 - 1) / 3
    np.testing.assert_array_equal(embed(values, 5), expected)
    with pytest.raises(RunError, match="at least 5 segments with features, there are 4"):
        embed(values[:4], 0)


def test_each_point_is_drawn_in_both_colourings() -> None:
    segments, points = make_segments(8), np.arange(16, dtype=np.float32).reshape(8, 2)
    part = Embedding("after", tuple(segments), points, 30)
    drawn = draw_embeddings([part], ("a", "b", "c"), "here", 9)
    by_domain, by_class = drawn.figure.axes
    for axis, names in ((by_domain, ["s", "t"]), (by_class, ["a", "b"])):
        assert [text.get_text() for text in axis.get_legend().get_texts()] == names
        offsets = np.concatenate([np.asarray(found.get_offsets()) for found in axis.collections])
        np.testing.assert_array_equal(offsets[np.argsort(offsets[:, 0])], points)
    np.testing.assert_array_equal(np.asarray(by_class.collections[1].get_offsets()), points[1::2])
    title = drawn.figure.get_suptitle()
    assert title == "t-SNE (seed 9) of 8 of 30 segments drawn at random, here"
    assert drawn.numbers["after"]["labels"] == list("abababab")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return what is embedded, whose first two values are its place."""
    seen: list[np.ndarray] = []
    monkeypatch.setattr(figures, "embed", lambda values, seed: (seen.append(values), values[:, :2])[1])
    return seen


def test_before_and_after_are_what_the_stores_hold(
    compared: Any, open_tiny: Any, embedded: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_dir, places = compared.runs / "tiny", open_tiny(compared)
    with pytest.raises(RunError, match="no pooled features of tiny by slowfast_demo, from before adaptation"):
        make_embedding(places, runs_dir, RunChoice(shift="s-t"))
    store = open_adapted_store(runs_dir, choose_stage1_run(runs_dir, RunChoice(shift="s-t"), with_features=True))
    # The cache has no features from before adaptation, so the adapted ones take their place here.
    monkeypatch.setattr(features, "list_stores", lambda cache: [store.path])
    before, after = make_embedding(places, runs_dir, RunChoice(shift="s-t"), max_points=6).numbers.items()
    assert (before[0], after[0]) == ("before: slowfast_demo as extracted", "after: stage1 s-t, seed 0")
    ids = after[1]["segment_ids"]
    assert len(ids) == 6 and all("-test-" in segment_id for segment_id in ids)
    expected = store.read(ids, "pooled").astype(np.float32).mean(axis=1)
    for values in embedded:
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_alignment_is_embedded_with_both_modalities(compared: Any, open_tiny: Any, embedded: list[np.ndarray]) -> None:
    places: DataPlaces = open_tiny(compared)
    choice = RunChoice(method="rna")
    plot = make_embedding(places, compared.runs / "tiny", choice)
    projected = read_projected_features(
        places, compared.runs / "tiny", choose_alignment_run(compared.runs / "tiny", choice)
    )
    ids = [segment.segment_id for segment in projected.segments]
    assert [part["segment_ids"] for part in plot.numbers.values()] == [ids, ids]
    expected = np.concatenate([projected.frames.mean(axis=1), projected.audio.mean(axis=1)], axis=1)
    np.testing.assert_allclose(embedded[1], expected, atol=1e-6)
    assert not replace(projected, has_audio=np.zeros(8, dtype=bool)).join()[:, 8:].any()
