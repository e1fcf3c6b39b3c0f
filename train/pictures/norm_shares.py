"""Draws how much of the norm the features that classify carry, and what each modality says (Planamente, Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import RunError
from echoshift.train.pictures.figures import (
    AUDIO_COLOUR,
    QUIET_COLOUR,
    VISUAL_COLOUR,
    Picture,
    house_style,
    make_figure,
)
from echoshift.train.pictures.modality_features import Classifier, ModalityFeatures

N_TOP = 300
PARTS = ("pictures", "sound", "both")


@dataclass(frozen=True, slots=True, eq=False)
class ModalityShares:
    """What one network's modalities weigh.

    Attributes:
        n_top: by modality, how many features were taken; half of them where there are fewer than twice N_TOP.
        n_features: by modality, how many there are.
        norm_share: by modality, the share of the squared norm that the top features carry, mean over segments, 0..1.
        accuracy: of pictures alone, sound alone and both, over segments with sound, 0..1; analysis, it reads labels.
        score_share: by modality, its share of the final score: of the logit of the predicted class above the mean of
            the logits, by absolute value, mean over segments with sound; the two add up to 1.
    """

    title: str
    n_top: Mapping[str, int]
    n_features: Mapping[str, int]
    norm_share: Mapping[str, float]
    accuracy: Mapping[str, float]
    score_share: Mapping[str, float]


def compute_shares(features: ModalityFeatures, labels: np.ndarray, n_top: int = N_TOP) -> ModalityShares:
    """Compute the shares; `labels` int64 [n] are of the segments.

    The paper doesn't say how the most relevant features are found [?]: here by the L2 norm of a feature's weights in
    the classifier. Raises RunError where a modality has no classifier, or no segment has sound.
    """
    visual, audio = features.classify_visual, features.classify_audio
    if visual is None or audio is None:
        raise RunError(f"{features.title}: shares need a network that classifies both modalities; name another run")
    heard = features.heard
    if not heard.any():
        raise RunError(f"{features.title}: no segment has sound, so that there is no balance to show")
    widths = {"pictures": features.visual.shape[2], "sound": features.audio.shape[2]}
    taken = {name: n_top if width >= 2 * n_top else max(1, width // 2) for name, width in widths.items()}
    logits = {
        "pictures": _classify(features.visual[heard], visual),
        "sound": _classify(features.audio[heard], audio),
    }
    logits["both"] = logits["pictures"] + logits["sound"]
    return ModalityShares(
        title=features.title,
        n_top=taken,
        n_features=widths,
        norm_share={
            "pictures": share_norm(features.visual, visual, taken["pictures"]),
            "sound": share_norm(features.audio[heard], audio, taken["sound"]),
        },
        accuracy={name: _score(values, labels[heard]) for name, values in logits.items()},
        score_share=_share_score(logits),
    )


def share_norm(values: np.ndarray, classifier: Classifier, n_top: int) -> float:
    """Compute the share of the squared norm in the `n_top` features of largest weights; values [n, n_clips, D].

    The mean over segments and clips; those whose feature is zero don't count.
    """
    relevance = np.sqrt(np.square(classifier.weight, dtype=np.float64).sum(axis=0))
    top = np.argsort(-relevance, kind="stable")[:n_top]
    squares = np.square(values, dtype=np.float64)
    total, of_top = squares.sum(axis=2), squares[:, :, top].sum(axis=2)
    counted = total > 0
    return float((of_top[counted] / total[counted]).mean()) if counted.any() else 0.0


def draw_shares(shares: Sequence[ModalityShares], what: str) -> Picture:
    """Draw accuracy, balance and shares of the norm of networks side by side; `what` names data and shift."""
    numbers = {
        each.title: {
            "accuracy": dict(each.accuracy),
            "score_share": dict(each.score_share),
            "norm_share": dict(each.norm_share),
            "n_top": dict(each.n_top),
            "n_features": dict(each.n_features),
        }
        for each in shares
    }
    colours = {"pictures": VISUAL_COLOUR, "sound": AUDIO_COLOUR, "both": QUIET_COLOUR}
    with house_style():
        figure = make_figure(10.5, 3.1)
        figure.suptitle(f"modalities, {what}", x=0.01, ha="left", fontsize=10)
        axes = figure.subplots(1, 3)
        _draw_bars(axes[0], [each.accuracy for each in shares], shares, PARTS, colours)
        axes[0].set_title("accuracy of each alone and of both\n(analysis: it reads the labels)")
        _draw_bars(axes[1], [each.score_share for each in shares], shares, PARTS[:2], colours)
        axes[1].set_title("share of the final score")
        _draw_bars(axes[2], [each.norm_share for each in shares], shares, PARTS[:2], colours)
        axes[2].set_title(f"share of the squared norm in the top features\n({_describe_top(shares[0])})")
        axes[0].set_ylabel("percent")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    words = "; ".join(
        f"{each.title}: accuracy of pictures {100 * each.accuracy['pictures']:.1f}, of sound "
        f"{100 * each.accuracy['sound']:.1f}, of both {100 * each.accuracy['both']:.1f} percent, share of the score "
        f"{100 * each.score_share['pictures']:.0f} to {100 * each.score_share['sound']:.0f}, norm in the top features "
        f"{100 * each.norm_share['pictures']:.0f} and {100 * each.norm_share['sound']:.0f} percent"
        for each in shares
    )
    return Picture(figure, numbers, f"Balance of the modalities, {what}. {words}.")


def _classify(values: np.ndarray, classifier: Classifier) -> np.ndarray:
    """Compute logits, float64 [n, K], the mean over clips."""
    logits: np.ndarray = (values.astype(np.float64) @ classifier.weight.T + classifier.bias).mean(axis=1)
    return logits


def _score(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def _share_score(logits: Mapping[str, np.ndarray]) -> dict[str, float]:
    predicted = logits["both"].argmax(axis=1)[:, None]
    weight = {}
    for name in ("pictures", "sound"):
        centred = logits[name] - logits[name].mean(axis=1, keepdims=True)
        weight[name] = np.abs(np.take_along_axis(centred, predicted, axis=1)[:, 0])
    total = weight["pictures"] + weight["sound"]
    counted = total > 0
    of_pictures = float((weight["pictures"][counted] / total[counted]).mean()) if counted.any() else 0.5
    return {"pictures": of_pictures, "sound": 1 - of_pictures}


def _draw_bars(
    axis: object,
    values: Sequence[Mapping[str, float]],
    shares: Sequence[ModalityShares],
    parts: Sequence[str],
    colours: Mapping[str, str],
) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes), "subplots gives axes"
    places = np.arange(len(shares))
    width = 0.8 / len(parts)
    for i, part in enumerate(parts):
        heights = [100 * of_network[part] for of_network in values]
        offset = (i - (len(parts) - 1) / 2) * width
        bars = axis.bar(places + offset, heights, width * 0.92, color=colours[part], label=part)
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axis.set_xticks(places, [each.title for each in shares])
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 25))


def _describe_top(shares: ModalityShares) -> str:
    counts = {(shares.n_top[name], shares.n_features[name]) for name in ("pictures", "sound")}
    return ", ".join(f"{top} of {width}" for top, width in sorted(counts))
