"""Draws features in two dimensions by t-SNE, before and after adaptation, coloured by domain and by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.train.pictures.figures import MARKERS, PALETTE, Picture, house_style, make_figure

MAX_POINTS = 1000
_PERPLEXITY = 30.0
_MIN_POINTS = 5


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedFeatures:
    """Features of n segments in the plane.

    Attributes:
        points: float32 [n, 2].
        n_all: how many segments there are, of which n were drawn.
    """

    title: str
    segments: tuple[Segment, ...]
    points: np.ndarray
    n_all: int


def choose_segments(segments: Sequence[Segment], max_points: int, seed: int) -> list[int]:
    """Choose at most `max_points` segments evenly at random, the seed decides which; their numbers, ascending."""
    if len(segments) <= max_points:
        return list(range(len(segments)))
    drawn = np.random.default_rng(seed).choice(len(segments), max_points, replace=False)
    return sorted(drawn.tolist())


def embed(values: np.ndarray, seed: int) -> np.ndarray:
    """Embed features, float [n, D], in the plane by scikit-learn's t-SNE, float32 [n, 2]; begin with their PCA.

    Perplexity 30, or a third of n - 1 where that is less. Raises RunError for fewer than five segments.
    """
    from sklearn.manifold import TSNE

    if len(values) < _MIN_POINTS:
        raise RunError(f"an embedding needs at least {_MIN_POINTS} segments with features, there are {len(values)}")
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    tsne = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed)
    points: np.ndarray = tsne.fit_transform(values.astype(np.float32))
    return points


def draw_embedding(parts: Sequence[EmbeddedFeatures], classes: Sequence[str], what: str, seed: int) -> Picture:
    """Draw each part twice, by domain and by class of the first label; `what` names data and shift.

    Labels of the target colour points here, and nothing is learned from them (analysis).
    """
    numbers = {
        part.title: {
            "points": part.points,
            "segment_ids": [segment.segment_id for segment in part.segments],
            "domains": [segment.domain for segment in part.segments],
            "labels": [segment.labels[0] if segment.labels else "" for segment in part.segments],
        }
        for part in parts
    }
    first = parts[0]
    drawn = len(first.segments)
    of_all = f"{drawn} of {first.n_all} segments drawn at random" if drawn < first.n_all else f"all {drawn} segments"
    with house_style():
        figure = make_figure(9.0, 4.2 * len(parts))
        figure.suptitle(f"t-SNE (seed {seed}) of {of_all}, {what}", x=0.01, ha="left", fontsize=10)
        axes = figure.subplots(len(parts), 2, squeeze=False)
        for row, part in zip(axes, parts, strict=True):
            domains = list(dict.fromkeys(segment.domain for segment in part.segments))
            _scatter(row[0], part, [segment.domain for segment in part.segments], domains)
            row[0].set_title(f"{part.title}, by domain")
            _scatter(row[1], part, [s.labels[0] if s.labels else "none" for s in part.segments], list(classes))
            row[1].set_title(f"{part.title}, by class")
    titles = ", ".join(part.title for part in parts)
    domains = sorted({segment.domain for segment in first.segments})
    words = f"t-SNE embedding of {of_all}, {what}: {titles}; coloured by domain ({', '.join(domains)}) and by class."
    return Picture(figure, numbers, words)


def _scatter(axis: object, part: EmbeddedFeatures, values: Sequence[str], names: Sequence[str]) -> None:
    """Draw points of up to 64 kinds, by colour and marker; more share theirs."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes), "subplots gives axes"
    kinds = np.array(values)
    shown = [name for name in [*names, "none"] if (kinds == name).any()]
    for number, name in enumerate(shown):
        chosen = part.points[kinds == name]
        axis.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=14,
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[(number + number // len(PALETTE)) % len(MARKERS)],
            alpha=0.8,
            linewidths=0,
            label=name,
        )
    axis.set_xticks([])
    axis.set_yticks([])
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    if len(shown) <= 16:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
