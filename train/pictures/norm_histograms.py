"""Draws how large the features of both modalities are, before and after alignment (Planamente et al., Figure 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import RunError
from echoshift.train.pictures.figures import AUDIO_COLOUR, VISUAL_COLOUR, Picture, house_style, make_figure
from echoshift.train.pictures.modality_features import ModalityFeatures

_N_BINS = 30


@dataclass(frozen=True, slots=True, eq=False)
class ModalityNorms:
    """The feature norms of segments of one network.

    Attributes:
        visual: float64 [n]: of each segment the mean over its clips of the L2 norm, h(x^v) of RNA.
        audio: float64 [n_heard]: of those with sound.
        ratios: by domain, mean h(x^v) / mean h(x^a), both over the domain's segments, of sound those that have it.
    """

    title: str
    visual: np.ndarray
    audio: np.ndarray
    ratios: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """Mean h(x^v) / mean h(x^a), which RNA brings to 1."""
        return float(self.visual.mean() / self.audio.mean())


def compute_norms(features: ModalityFeatures) -> ModalityNorms:
    """Compute the norms of both modalities; raises RunError where no segment has sound or its features are zero."""
    visual, audio = measure_norms(features.visual), measure_norms(features.audio)
    if not audio[features.heard].any():
        raise RunError(
            f"{features.title}: no segment has sound, or the network doesn't hear, so that there is no norm to compare"
        )
    domains = np.array([segment.domain for segment in features.segments])
    ratios = {}
    for domain in dict.fromkeys(domains.tolist()):
        is_own = domains == domain
        heard = audio[is_own & features.heard]
        if heard.any():
            ratios[domain] = float(visual[is_own].mean() / heard.mean())
    return ModalityNorms(features.title, visual, audio[features.heard], ratios)


def measure_norms(values: np.ndarray) -> np.ndarray:
    """Measure of each segment the mean over clips of the L2 norm, float64 [n], of [n, n_clips, D]."""
    norms: np.ndarray = np.sqrt(np.square(values, dtype=np.float64).sum(axis=2)).mean(axis=1)
    return norms


def draw_norm_histograms(norms: Sequence[ModalityNorms], what: str) -> Picture:
    """Draw one histogram a network, on a common axis; `what` names data and shift in the title."""
    top = max(max(each.visual.max(), each.audio.max()) for each in norms)
    edges = np.linspace(0, float(top) * 1.02 or 1.0, _N_BINS + 1)
    numbers: dict[str, object] = {"edges": edges}
    words = []
    with house_style():
        figure = make_figure(4.2 * len(norms), 3.0)
        figure.suptitle(f"feature norms, {what}", x=0.01, ha="left", fontsize=10)
        axes = np.atleast_1d(figure.subplots(1, len(norms), sharex=True, sharey=True))
        for axis, each in zip(axes, norms, strict=True):
            counts = {}
            parts = (("pictures", each.visual, VISUAL_COLOUR), ("sound", each.audio, AUDIO_COLOUR))
            for name, values, colour in parts:
                counts[name], _ = np.histogram(values, bins=edges)
                axis.stairs(counts[name], edges, fill=True, alpha=0.55, color=colour, label=name)
                axis.axvline(values.mean(), color=colour, linewidth=1.4, linestyle="--")
            of_domains = ", ".join(f"{domain} {ratio:.2f}" for domain, ratio in each.ratios.items())
            axis.set_title(f"{each.title}: pictures / sound = {each.ratio:.2f}\n({of_domains})")
            axis.set_xlabel("L2 norm of a segment's feature; dashed: mean")
            numbers[each.title] = {
                "visual": each.visual,
                "audio": each.audio,
                "ratio": each.ratio,
                "ratios": dict(each.ratios),
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
