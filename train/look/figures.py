"""Figures of features: norms and shares of both modalities, embeddings, losses, histograms; written as PNG or SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.train.look.features import (
    Classifier,
    ModalityFeatures,
    read_adaptation,
    read_cached_features,
    read_means,
    read_projected_features,
)
from echoshift.train.look.run_choice import (
    SOURCE_ONLY,
    RunChoice,
    choose_alignment_run,
    choose_stage1_run,
    describe_run,
    find_source_only,
    get_method,
)
from echoshift.train.runs import RunRecord
from echoshift.train.splits import DataPlaces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people who see fewer colours tell apart; all of them show on white and on black.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F", "#7F7F7F")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
FRAMES_COLOUR, AUDIO_COLOUR, TRUE_COLOUR, QUIET_COLOUR = "#0072B2", "#E69F00", "#009E73", "#8A8A8A"
N_TOP = 300
MAX_POINTS = 1000
_N_BINS = 30
_DPI = 130
_PERPLEXITY, _MIN_POINTS = 30.0, 5
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "echoshift",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.dpi": _DPI,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True, eq=False)
class Plot:
    """A figure with what it says.

    Attributes:
        numbers: by name, what is drawn; JSON, but for NumPy's arrays.
        description: in words, for who can't see it.
    """

    figure: Figure
    numbers: Mapping[str, Any]
    description: str


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw what the block draws in one style, and change nothing outside of it."""
    from matplotlib import rc_context

    style: Any = dict(_STYLE)  # its stubs list every name there is
    with rc_context(style):
        yield


def make_figure(width_in: float, height_in: float, title: str = "") -> Figure:
    """Make an empty figure that belongs to no window; call it within `plot_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def render_figure(figure: Figure, kind: str) -> bytes:
    """Render a figure as `png`, or as `svg` whose text is text; the same figure gives the same bytes."""
    file = io.BytesIO()
    with plot_style():
        figure.savefig(file, format=kind, dpi=_DPI, metadata={"Date" if kind == "svg" else "Software": None})
    return file.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as .png or .svg in one step, and make the folder; raises RunError for another ending."""
    ending = path.suffix.lower()
    if ending not in (".png", ".svg"):
        raise RunError(f"{path}: a figure is written as .png or .svg; name it so")
    fresh = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(render_figure(figure, ending[1:]))
        fresh.replace(path)
    except OSError as error:
        raise RunError(f"{path}: can't write the figure: {error.strerror or error}") from error


def render_inline(plot: Plot, name: str) -> str:
    """Render a plot as an `<svg>` element of a page whose black is the page's ink; `name` is unique in the page."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # the salt keeps ids apart
        plot.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, body = file.getvalue().partition("<svg")[2].split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None, "matplotlib writes a view box"
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("#000000", "currentColor")
    label = html.escape(plot.description, quote=True)
    return f'<svg class="figure" {box[0]} role="img" aria-label="{label}">{body}'


@dataclass(frozen=True, slots=True, eq=False)
class ModalityNorms:
    """The feature norms of segments of one network.

    Attributes:
        frames: float64 [n]: of each segment the mean over its clips of the L2 norm, h(x^v) of RNA.
        audio: float64 [n_with_audio]: of those with sound.
        ratios: by domain, mean h(x^v) / mean h(x^a), both over the domain's segments, of audio those that have it.
    """

    title: str
    frames: np.ndarray
    audio: np.ndarray
    ratios: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """Mean h(x^v) / mean h(x^a), which RNA brings to 1."""
        return float(self.frames.mean() / self.audio.mean())


def compute_norms(features: ModalityFeatures) -> ModalityNorms:
    """Compute the norms of both modalities; raises RunError where no segment has sound or its features are zero."""
    frames, audio = (
        np.sqrt(np.square(values, dtype=np.float64).sum(axis=2)).mean(axis=1)
        for values in (features.frames, features.audio)
    )
    if not audio[features.has_audio].any():
        raise RunError(
            f"{features.title}: no segment has sound, or the network doesn't hear, so that there is no norm to compare"
        )
    domains = np.array([segment.domain for segment in features.segments])
    ratios = {}
    for domain in dict.fromkeys(domains.tolist()):
        is_own = domains == domain
        heard = audio[is_own & features.has_audio]
        if heard.any():
            ratios[domain] = float(frames[is_own].mean() / heard.mean())
    return ModalityNorms(features.title, frames, audio[features.has_audio], ratios)


def make_norms(places: DataPlaces, runs_dir: Path, choice: RunChoice) -> Plot:
    """Draw feature norms before and after a run of alignment (Planamente et al., Figure 6).

    Before is the source_only run of the same shift, seed and network, and, whether there is one or not, the cached
    features that both were trained on. Raises RunError where no run fits.
    """
    record = choose_alignment_run(runs_dir, choice)
    features = [read_cached_features(places, runs_dir, record)]
    features += [read_projected_features(places, runs_dir, run) for run in _list_compared(runs_dir, record)]
    return draw_norms([compute_norms(each) for each in features], _describe_data(places, record))


def draw_norms(norms: Sequence[ModalityNorms], what: str) -> Plot:
    """Draw one histogram a network, on a common axis; `what` names data and shift in the title."""
    top = max(max(each.frames.max(), each.audio.max()) for each in norms)
    edges = np.linspace(0, float(top) * 1.02 or 1.0, _N_BINS + 1)
    numbers: dict[str, object] = {"edges": edges}
    words = []
    with plot_style():
        figure = make_figure(4.2 * len(norms), 3.0, f"feature norms, {what}")
        axes = np.atleast_1d(figure.subplots(1, len(norms), sharex=True, sharey=True))
        for axis, each in zip(axes, norms, strict=True):
            counts = {}
            for name, values, colour in (("frames", each.frames, FRAMES_COLOUR), ("audio", each.audio, AUDIO_COLOUR)):
                counts[f"counts_{name}"], _ = np.histogram(values, bins=edges)
                axis.stairs(counts[f"counts_{name}"], edges, fill=True, alpha=0.55, color=colour, label=name)
                axis.axvline(values.mean(), color=colour, linewidth=1.4, linestyle="--")
            of_domains = ", ".join(f"{domain} {ratio:.2f}" for domain, ratio in each.ratios.items())
            axis.set_title(f"{each.title}: frames / audio = {each.ratio:.2f}\n({of_domains})")
            axis.set_xlabel("L2 norm of a segment's feature; dashed: mean")
            fields = {name: value for name, value in asdict(each).items() if name != "title"}
            numbers[each.title] = {**fields, "ratio": each.ratio, **counts}
            words.append(
                f"{each.title}: mean norm of frames {each.frames.mean():.2f}, of audio {each.audio.mean():.2f}, ratio "
                f"{each.ratio:.2f}"
            )
        axes[0].set_ylabel("segments")
        axes[-1].legend()
    return Plot(figure, numbers, f"Histograms of feature norms, {what}. {'; '.join(words)}.")


@dataclass(frozen=True, slots=True, eq=False)
class ModalityShares:
    """What one network's modalities weigh; the fields are by modality, `frames` and `audio`.

    Attributes:
        accuracy: of frames alone, audio alone and `both`, over segments with sound, 0..1; it reads labels: analysis.
        score_share: the share of the final score: of the logit of the predicted class above the mean of the logits, by
            absolute value, mean over segments with sound; the two add up to 1.
        norm_share: the share of the squared norm that the top features carry, mean over segments, 0..1.
        n_top: how many features were taken; half of them where there are fewer than twice N_TOP.
        n_features: how many there are.
    """

    title: str
    accuracy: Mapping[str, float]
    score_share: Mapping[str, float]
    norm_share: Mapping[str, float]
    n_top: Mapping[str, int]
    n_features: Mapping[str, int]


def compute_shares(features: ModalityFeatures, labels: np.ndarray, n_top: int = N_TOP) -> ModalityShares:
    """Compute the shares; `labels` int64 [n] are of the segments.

    The paper doesn't say how the most relevant features are found [?]: here by the L2 norm of a feature's weights in
    the classifier. Raises RunError where a modality has no classifier, or no segment has sound.
    """
    if features.classify_frames is None or features.classify_audio is None:
        raise RunError(f"{features.title}: shares need a network that classifies both modalities; name another run")
    has_audio = features.has_audio
    if not has_audio.any():
        raise RunError(f"{features.title}: no segment has sound, so that there is no balance to show")
    parts = {
        "frames": (features.frames, features.frames[has_audio], features.classify_frames),
        "audio": (features.audio[has_audio], features.audio[has_audio], features.classify_audio),
    }
    widths = {name: values.shape[2] for name, (values, _, _) in parts.items()}
    taken = {name: n_top if width >= 2 * n_top else max(1, width // 2) for name, width in widths.items()}
    logits = {
        name: (heard.astype(np.float64) @ classifier.weight.T + classifier.bias).mean(axis=1)
        for name, (_, heard, classifier) in parts.items()
    }
    logits["both"] = logits["frames"] + logits["audio"]
    score = {name: float((each.argmax(axis=1) == labels[has_audio]).mean()) for name, each in logits.items()}
    return ModalityShares(
        title=features.title,
        accuracy=score,
        score_share=_share_score(logits),
        norm_share={name: share_norm(values, each, taken[name]) for name, (values, _, each) in parts.items()},
        n_top=taken,
        n_features=widths,
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


def _share_score(logits: Mapping[str, np.ndarray]) -> dict[str, float]:
    predicted = logits["both"].argmax(axis=1)[:, None]
    weight = {}
    for name in ("frames", "audio"):
        centred = logits[name] - logits[name].mean(axis=1, keepdims=True)
        weight[name] = np.abs(np.take_along_axis(centred, predicted, axis=1)[:, 0])
    total = weight["frames"] + weight["audio"]
    counted = total > 0
    of_frames = float((weight["frames"][counted] / total[counted]).mean()) if counted.any() else 0.5
    return {"frames": of_frames, "audio": 1 - of_frames}


def make_shares(places: DataPlaces, runs_dir: Path, choice: RunChoice) -> Plot:
    """Draw what the modalities weigh with and without alignment (Planamente et al., Figure 7).

    Without is the source_only run of the same shift, seed and network; where there is none, the run is drawn alone.
    Raises RunError where no run fits, and for a dataset of several labels a segment.
    """
    if places.card.task == "multi-label":
        raise RunError(f"{places.card.name} has several labels a segment; the balance of modalities is of one")
    record = choose_alignment_run(runs_dir, choice)
    shares = []
    for run in _list_compared(runs_dir, record):
        features = read_projected_features(places, runs_dir, run)
        labels = np.array([places.card.class_index[segment.labels[0]] for segment in features.segments])
        shares.append(compute_shares(features, labels))
    return draw_shares(shares, _describe_data(places, record))


def draw_shares(shares: Sequence[ModalityShares], what: str) -> Plot:
    """Draw accuracy, balance and shares of the norm of networks side by side; `what` names data and shift."""
    numbers = {each.title: {k: v for k, v in asdict(each).items() if k != "title"} for each in shares}
    first = shares[0]
    counts = sorted({(first.n_top[name], first.n_features[name]) for name in first.n_top})
    top = ", ".join(f"{n} of {width}" for n, width in counts)
    parts = (
        ("accuracy of each alone and of both\n(analysis: it reads the labels)", [each.accuracy for each in shares]),
        ("share of the final score", [each.score_share for each in shares]),
        (f"share of the squared norm in the top features\n({top})", [each.norm_share for each in shares]),
    )
    colours = {"frames": FRAMES_COLOUR, "audio": AUDIO_COLOUR, "both": QUIET_COLOUR}
    with plot_style():
        figure = make_figure(10.5, 3.1, f"modalities, {what}")
        axes = figure.subplots(1, 3)
        for axis, (title, values) in zip(axes, parts, strict=True):
            width = 0.8 / len(values[0])
            for i, name in enumerate(values[0]):
                places = np.arange(len(shares)) + (i - (len(values[0]) - 1) / 2) * width
                bars = axis.bar(places, [100 * v[name] for v in values], width * 0.92, color=colours[name], label=name)
                axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
            axis.set_xticks(range(len(shares)), [each.title for each in shares])
            axis.set_ylim(0, 108)
            axis.set_yticks(range(0, 101, 25))
            axis.set_title(title)
        axes[0].set_ylabel("percent")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    words = "; ".join(
        f"{each.title}: accuracy of frames {100 * each.accuracy['frames']:.1f}, of audio "
        f"{100 * each.accuracy['audio']:.1f}, of both {100 * each.accuracy['both']:.1f} percent, share of the score "
        f"{100 * each.score_share['frames']:.0f} to {100 * each.score_share['audio']:.0f}, norm in the top features "
        f"{100 * each.norm_share['frames']:.0f} and {100 * each.norm_share['audio']:.0f} percent"
        for each in shares
    )
    return Plot(figure, numbers, f"Balance of the modalities, {what}. {words}.")


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """Features of segments in the plane: points float32 [n, 2], of `n_all` segments n were drawn."""

    title: str
    segments: tuple[Segment, ...]
    points: np.ndarray
    n_all: int


def make_embedding(
    places: DataPlaces, runs_dir: Path, choice: RunChoice, *, tsne_seed: int = 0, max_points: int = MAX_POINTS
) -> Plot:
    """Draw the features of a shift's test segments before and after adaptation in the plane.

    Visual ones of Stage 1, or, where the choice names a method of alignment, those of both modalities side by side.
    Raises RunError where no run fits, or Stage 1 exported none.
    """
    if choice.method:
        record = choose_alignment_run(runs_dir, choice)
        read = (read_cached_features, read_projected_features)
        before, after = (each(places, runs_dir, record) for each in read)
        segments = list(before.segments)
        titles = ("before: the features of both modalities", f"after: {describe_run(record)}")
        chosen = draw_sample(len(segments), max_points, tsne_seed)
        parts = [(title, each.join()[chosen]) for title, each in zip(titles, (before, after), strict=True)]
    else:
        record = choose_stage1_run(runs_dir, choice, with_features=True)
        segments, stores = read_adaptation(places, runs_dir, record)
        chosen = draw_sample(len(segments), max_points, tsne_seed)
        parts = [(title, read_means(store, [segments[i] for i in chosen])) for title, store in stores]
    shown = tuple(segments[i] for i in chosen)
    embeddings = [Embedding(title, shown, embed(values, tsne_seed), len(segments)) for title, values in parts]
    return draw_embeddings(embeddings, places.card.classes, _describe_data(places, record), tsne_seed)


def draw_sample(n: int, max_points: int, seed: int) -> list[int]:
    """Draw at most `max_points` of n numbers evenly at random, ascending."""
    if n <= max_points:
        return list(range(n))
    return sorted(np.random.default_rng(seed).choice(n, max_points, replace=False).tolist())


def embed(values: np.ndarray, seed: int) -> np.ndarray:
    """Embed features, float [n, D], in the plane by scikit-learn's t-SNE, float32 [n, 2], from their PCA.

    Perplexity 30, or a third of n - 1 where that is less. Raises RunError for fewer than five segments.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(values) < _MIN_POINTS:
        raise RunError(f"an embedding needs at least {_MIN_POINTS} segments with features, there are {len(values)}")
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    tsne = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed)
    with threadpool_limits(1):  # so few points make threads wait for one another, by far, where cores are shared
        points: np.ndarray = tsne.fit_transform(values.astype(np.float32))
    return points


def draw_embeddings(parts: Sequence[Embedding], classes: Sequence[str], what: str, seed: int) -> Plot:
    """Draw each part twice, by domain and by class of the first label; `what` names data and shift.

    Labels of the target colour points here, and nothing is learned from them (analysis).
    """
    n, n_all = len(parts[0].segments), parts[0].n_all
    of_all = f"{n} of {n_all} segments drawn at random" if n < n_all else f"all {n} segments"
    domains = list(dict.fromkeys(segment.domain for segment in parts[0].segments))
    numbers = {}
    with plot_style():
        figure = make_figure(9.0, 4.2 * len(parts), f"t-SNE (seed {seed}) of {of_all}, {what}")
        for row, part in zip(figure.subplots(len(parts), 2, squeeze=False), parts, strict=True):
            of_domain = [segment.domain for segment in part.segments]
            labels = [segment.labels[0] if segment.labels else "" for segment in part.segments]
            _scatter(row[0], part.points, of_domain, domains)
            row[0].set_title(f"{part.title}, by domain")
            _scatter(row[1], part.points, [label or "none" for label in labels], [*classes, "none"])
            row[1].set_title(f"{part.title}, by class")
            ids = [segment.segment_id for segment in part.segments]
            numbers[part.title] = {"points": part.points, "segment_ids": ids, "domains": of_domain, "labels": labels}
    titles = ", ".join(part.title for part in parts)
    words = f"t-SNE of {of_all}, {what}: {titles}; coloured by domain ({', '.join(sorted(domains))}) and by class."
    return Plot(figure, numbers, words)


def _scatter(axis: Any, points: np.ndarray, kinds: Sequence[str], names: Sequence[str]) -> None:
    """Draw points of up to 64 kinds, by colour and marker; more share theirs."""
    of = np.array(kinds)
    shown = [name for name in names if (of == name).any()]
    for number, name in enumerate(shown):
        axis.scatter(
            *points[of == name].T,
            s=14,
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[(number + number // len(PALETTE)) % len(MARKERS)],
            alpha=0.8,
            linewidths=0,
            label=name,
        )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    if len(shown) <= 16:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)


def draw_losses(title: str, runs: Sequence[Mapping[str, Sequence[float | None]]]) -> Plot:
    """Draw losses by epoch: each run (a seed) a thin line, their mean a thick one, a colour a loss.

    `runs` map a loss's name to its values by epoch; None leaves a gap.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(loss for run in runs for loss in run))
    ends = []
    with plot_style():
        figure = make_figure(4.4, 2.6)
        axis = figure.subplots()
        for i, loss in enumerate(names):
            colour = PALETTE[i % len(PALETTE)]
            lines = [np.array([np.nan if v is None else v for v in run[loss]], float) for run in runs if loss in run]
            longest = max(len(values) for values in lines)
            mean = np.stack([values for values in lines if len(values) == longest]).mean(axis=0)
            for values in lines:
                there = np.flatnonzero(np.isfinite(values))
                axis.plot(there + 1, values[there], color=colour, linewidth=0.8, alpha=0.45)
            there = np.flatnonzero(np.isfinite(mean))
            marker = "o" if len(there) < 4 else None
            axis.plot(there + 1, mean[there], color=colour, linewidth=2, label=loss, marker=marker)
            if len(there):
                ends.append(f"{loss} from {mean[there[0]]:.3g} to {mean[there[-1]]:.3g}")
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) > 1:
            axis.legend(fontsize=8)
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    return Plot(figure, {"runs": runs}, f"{title}, {seeds}: {'; '.join(ends) or 'no value'}.")


def draw_histogram(
    title: str, groups: Mapping[str, np.ndarray], x_label: str, y_label: str, *, is_logarithmic: bool = False
) -> Plot:
    """Draw a histogram of each group's values over common bins, of equal ratio where it is logarithmic."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    values = np.concatenate(list(groups.values()))
    low, high = float(values.min()), float(values.max())
    edges = np.histogram_bin_edges(values, 24)
    if is_logarithmic and high > low:
        edges = np.geomspace(low, high, 25)
        edges[0], edges[-1] = low, high  # which rounding may have moved inwards
    counts = {name: np.histogram(group, edges)[0] for name, group in groups.items()}
    with plot_style():
        figure = make_figure(4.4, 2.4)
        axis = figure.subplots()
        for i, (name, of_group) in enumerate(counts.items()):
            axis.stairs(of_group, edges, fill=len(counts) == 1, color=PALETTE[i % 8], linewidth=1.6, label=name)
        if is_logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(ScalarFormatter() if edges[-1] < 10 * edges[0] else NullFormatter())
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if len(counts) > 1:
            axis.legend(fontsize=8)
    n = "; ".join(f"{name} {len(group)}, median {np.median(group):.3g}" for name, group in groups.items())
    words = f"{title}: histogram from {edges[0]:.3g} to {edges[-1]:.3g}, {x_label}; counted: {n}."
    return Plot(figure, {"edges": edges, "counts": counts}, words)


def _list_compared(runs_dir: Path, record: RunRecord) -> list[RunRecord]:
    """List the runs that are drawn: the one without alignment, where it is done, and the one with it."""
    without = find_source_only(runs_dir, record) if get_method(record) != SOURCE_ONLY else None
    return [record] if without is None else [without, record]


def _describe_data(places: DataPlaces, record: RunRecord) -> str:
    """Name data, shift and seed for a title, and say where the data are synthetic."""
    synthetic = " (synthetic)" if places.card.synthetic else ""
    return f"{places.card.name}{synthetic}, {record.shift}, seed {record.seed}, test segments of its domains"
