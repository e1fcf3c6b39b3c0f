"""Draws the page's own charts: losses by epoch, histograms, and points in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from echoshift.train.report.inline_svg import INK, SERIES, inline_figure, page_style

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_MAX_LEGEND = 24


def draw_losses(name: str, title: str, runs: Sequence[Mapping[str, Sequence[float | None]]], y_label: str) -> str:
    """Draw losses by epoch: each run (a seed) a thin line, their mean a thick one, a colour a loss.

    `runs` map a loss's name to its values by epoch; None leaves a gap. Gives an `<svg>`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(loss for run in runs for loss in run))
    with page_style():
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.subplots()
        ends = []
        for loss, colour in zip(names, _repeat(SERIES, len(names)), strict=True):
            lines = [np.array([np.nan if v is None else v for v in run[loss]], float) for run in runs if loss in run]
            for values in lines:
                there = np.flatnonzero(np.isfinite(values))
                axes.plot(there + 1, values[there], color=colour, linewidth=0.8, alpha=0.45)
            longest = max(len(values) for values in lines)
            whole = np.stack([values for values in lines if len(values) == longest])
            mean = whole.mean(axis=0)
            there = np.flatnonzero(np.isfinite(mean))
            axes.plot(
                there + 1, mean[there], color=colour, linewidth=2, label=loss, marker="o" if len(there) < 4 else None
            )
            if len(there):
                ends.append(f"{loss} from {mean[there[0]]:.3g} to {mean[there[-1]]:.3g}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) > 1:
            axes.legend(loc="best", fontsize=8)
        seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
        return inline_figure(figure, name, f"{title}, {seeds}: {'; '.join(ends) or 'no value'}.")


def draw_histogram(
    name: str,
    title: str,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    x_label: str,
    *,
    y_label: str,
    is_logarithmic: bool = False,
    size: tuple[float, float] = (4.4, 2.4),
) -> str:
    """Draw counts in bins as steps, a colour a group; `edges` are one more than each group's counts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    with page_style():
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for (group, values), colour in zip(counts.items(), _repeat(SERIES, len(counts)), strict=True):
            if len(counts) == 1:  # fills of several groups would mix into mud
                axes.stairs(values, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(values, edges, color=colour, linewidth=1.6, label=group)
        if is_logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(
                ScalarFormatter() if math.log10(edges[-1] / edges[0]) < 1 else NullFormatter()
            )
            axes.tick_params(axis="x", which="both", color=INK, labelsize=8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(counts) > 1:
            axes.legend(loc="best", fontsize=8)
        n = "; ".join(f"{group} {sum(values)}" for group, values in counts.items())
        return inline_figure(
            figure, name, f"{title}: histogram from {edges[0]:.3g} to {edges[-1]:.3g}, {x_label}; counted: {n}."
        )


def draw_scatter(name: str, title: str, points: np.ndarray, groups: Sequence[str], order: Sequence[str]) -> str:
    """Draw points [n, 2] of groups, each a colour and a marker, in the order of their names; return an `<svg>`.

    Up to 24 groups are named in a legend. Axes of an embedding mean nothing and have no numbers.
    """
    from matplotlib.figure import Figure

    shown = [group for group in order if group in set(groups)]
    of = np.array(groups)
    with page_style():
        figure = Figure(figsize=(4.4, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False)
        for i, group in enumerate(shown):
            chosen = points[of == group]
            axes.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=11,
                color=SERIES[i % len(SERIES)],
                marker=_MARKERS[(i + i // len(SERIES)) % len(_MARKERS)],
                alpha=0.8,
                linewidths=0,
                label=group,
            )
        axes.set_xticks([])
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        if len(shown) <= _MAX_LEGEND:
            figure.legend(loc="outside lower center", ncols=4, fontsize=8, handletextpad=0.1, columnspacing=1)
        counts = ", ".join(f"{group} {(of == group).sum()}" for group in shown[:_MAX_LEGEND])
        return inline_figure(figure, name, f"{title}: {len(points)} points; {counts}.")


def _repeat(colours: Sequence[str], n: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(n)]
