"""Draws how large the features of both modalities are, before and after alignment (Planamente et al., Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import RunError
from train.pictures.figures import AUDIO_COLOUR, VISUAL_COLOUR, Picture, house_style, make_figure
from train.pictures.modality_features import ModalityFeatures

_N_BINS = 30


@dataclass(frozen=True, slots=True, eq=False)
class ModalityNorms:
    """Is the feature norms of segments of one network.

    Attributes:
        visual: float64 [n]: of each segment the mean over its clips of the L2 norm, h(x^v) of RNA.
        audio: float64 [n_heard]: of those with sound.
    """

    title: str
    visual: np.ndarray
    audio: np.ndarray

    @property
    def ratio(self) -> float:
        """Gives mean h(x^v) / mean h(x^a), which RNA brings to 1."""
        return float(self.visual.mean() / self.audio.mean())


def compute_norms(features: ModalityFeatures) -> ModalityNorms:
    """Computes the norms of both modalities; raises RunError where no segment has sound or its features are zero."""
    audio = measure_norms(features.audio[features.heard])
    if not audio.any():
        raise RunError(f"{features.title}: no segment has sound whose norm could be compared")
    return ModalityNorms(features.title, measure_norms(features.visual), audio)


def measure_norms(values: np.ndarray) -> np.ndarray:
    """Measures of each segment the mean over clips of the L2 norm, float64 [n], of [n, n_clips, D]."""
    norms: np.ndarray = np.sqrt(np.square(values, dtype=np.float64).sum(axis=2)).mean(axis=1)
    return norms


def draw_norm_histograms(norms: Sequence[ModalityNorms], what: str) -> Picture:
    """Draws one histogram a network, on a common axis; `what` names data and shift in the title."""
    top = max(max(each.visual.max(), each.audio.max()) for each in norms)
    edges = np.linspace(0, float(top) * 1.02 or 1.0, _N_BINS + 1)
    numbers: dict[str, object] = {"edges": edges}
    words = []
    with house_style():
        figure = make_figure(4.2 * len(norms), 2.9)
        figure.suptitle(f"feature norms, {what}", x=0.01, ha="left", fontsize=10)
        axes = np.atleast_1d(figure.subplots(1, len(norms), sharex=True, sharey=True))
        for axis, each in zip(axes, norms, strict=True):
            counts = {}
            parts = (("pictures", each.visual, VISUAL_COLOUR), ("sound", each.audio, AUDIO_COLOUR))
            for name, values, colour in parts:
                counts[name], _ = np.histogram(values, bins=edges)
                axis.stairs(counts[name], edges, fill=True, alpha=0.55, color=colour, label=name)
                axis.axvline(values.mean(), color=colour, linewidth=1.4, linestyle="--")
            axis.set_title(f"{each.title}: pictures / sound = {each.ratio:.2f}")
            axis.set_xlabel("L2 norm of a segment's feature; dashed: mean")
            numbers[each.title] = {
                "visual": each.visual,
                "audio": each.audio,
                "ratio": each.ratio,
                "counts_visual": counts["pictures"],
                "counts_audio": counts["sound"],
            }
            words.append(
                f"{each.title}: mean norm of pictures {each.visual.mean():.2f}, of sound {each.audio.mean():.2f}, "
                f"ratio {each.ratio:.2f}"
            )
        axes[0].set_ylabel("segments")
        axes[-1].legend()
    return Picture(figure, numbers, f"Histograms of feature norms, {what}. " + "; ".join(words) + ".")
