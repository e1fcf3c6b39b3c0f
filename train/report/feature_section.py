"""Makes the page's section on features: where they lie before and after adaptation, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup
from threadpoolctl import threadpool_limits

from echoshift.pipeline.errors import EchoshiftError, RunError
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE
from echoshift.train.data_places import DataPlaces
from echoshift.train.pictures.adapted_features import embed_adaptation, find_cached_store, open_adapted_store
from echoshift.train.pictures.embedding import EmbeddedFeatures
from echoshift.train.pictures.making import make_activation_maps, make_norm_shares
from echoshift.train.pictures.modality_features import read_cached_features, read_projected_features
from echoshift.train.pictures.norm_histograms import ModalityNorms, compute_norms
from echoshift.train.pictures.run_choice import (
    RunChoice,
    choose_alignment_run,
    choose_stage1_run,
    find_method,
    find_source_only,
)
from echoshift.train.report.blocks import Block, Figure, FiguresBlock, HeadingBlock, MissingBlock, Section, TextBlock
from echoshift.train.report.charts import draw_histogram, draw_scatter
from echoshift.train.report.inline_svg import inline_figure
from echoshift.train.report.store_facts import sample_norms
from echoshift.train.runs import RunRecord
from echoshift.train.splits import TEST, find_shift

MAX_SHIFTS = 3
MAX_POINTS = 600
N_BINS = 24
NO_LABEL = "no label"


def make_feature_section(
    places: DataPlaces,
    runs_dir: Path,
    runs: Sequence[RunRecord],
    start: Callable[[int], None] = lambda n: None,
    advance: Callable[[], None] = lambda: None,
) -> Section:
    """Make the section of the last run of each stage in the first MAX_SHIFTS shifts that have one.

    What a run has no features for any more is said. `start` is told how many runs are read, `advance` of each.
    """
    stage1 = [run for run in runs if run.stage == "stage1" and "features" in run.steps]
    adapted = list(dict.fromkeys(run.shift for run in stage1))
    aligned = list(dict.fromkeys(run.shift for run in runs if find_method(run) not in ("", "source_only")))
    start(len(adapted[:MAX_SHIFTS]) + len(aligned[:MAX_SHIFTS]))
    blocks: list[Block] = [HeadingBlock("Before and after Stage 1", "adaptation")]
    if not adapted:
        text = "No run of Stage 1 has exported adapted features yet."
        blocks.append(MissingBlock(text, f"make stage1 DATASET={places.card.name}"))
    for i, shift in enumerate(adapted[:MAX_SHIFTS]):
        blocks += _tell_faults(partial(_show_adaptation, i, shift, places, runs_dir))
        blocks += _tell_faults(partial(_show_adapted_norms, i, shift, places, runs_dir))
        blocks += _tell_faults(partial(_show_activation, i, shift, places, runs_dir))
        advance()
    blocks.append(HeadingBlock("Norms of both modalities, before and after alignment", "alignment"))
    if not aligned:
        text = "No method has aligned the modalities' norms yet."
        blocks.append(MissingBlock(text, f"make align METHOD=rna DATASET={places.card.name}"))
    for i, shift in enumerate(aligned[:MAX_SHIFTS]):
        blocks += _tell_faults(partial(_show_alignment, i, shift, places, runs_dir))
        if places.card.task == "single-label":
            blocks += _tell_faults(partial(_show_shares, i, shift, places, runs_dir))
        advance()
    for what, shifts in (("Stage 1", adapted), ("alignment", aligned)):
        if len(shifts) > MAX_SHIFTS:
            blocks.append(TextBlock(f"Of {what}, {MAX_SHIFTS} of {len(shifts)} shifts are drawn.", "quiet"))
    lead = "Test segments of a shift's domains, by t-SNE, which keeps neighbours together and little else."
    return Section("features", "Features", lead, tuple(blocks))


def _tell_faults(show: Callable[[], list[Block]]) -> list[Block]:
    """Show something, or say why it can't be."""
    try:
        return show()
    except EchoshiftError as error:
        words = " ".join(str(error).split())
        return [MissingBlock(f"{words[:1].upper()}{words[1:].rstrip('.')}.")]


def _show_adaptation(i: int, shift: str, places: DataPlaces, runs_dir: Path) -> list[Block]:
    record = choose_stage1_run(runs_dir, RunChoice(shift=shift), with_features=True)
    with threadpool_limits(1):  # so few points make threads wait for one another, by far, where cores are shared
        parts = embed_adaptation(places, runs_dir, record, max_points=MAX_POINTS)
    n, n_all = len(parts[0].segments), parts[0].n_all
    of_all = f"{n:,} of {n_all:,} test segments, drawn at random," if n < n_all else f"all {n:,} test segments"
    run = f"{record.row}, seed {record.seed}" if record.row else f"seed {record.seed}"
    words = f"{shift}: t-SNE of {of_all} by the run {run}. Colour by class reads the target's labels."
    figures = _draw_parts(i, parts, places.card.domains, (*places.card.classes, NO_LABEL))
    return [TextBlock(words, "analysis"), FiguresBlock(tuple(figures))]


def _show_adapted_norms(i: int, shift: str, places: DataPlaces, runs_dir: Path) -> list[Block]:
    record = choose_stage1_run(runs_dir, RunChoice(shift=shift), with_features=True)
    after = open_adapted_store(runs_dir, record)
    before = find_cached_store(places, record, after)
    known = [output.name for output in before.spec.outputs]
    adapted = [output.name for output in after.spec.outputs]
    if not set(adapted) & set(known):
        raise RunError(
            f"norms of {shift} before and after adaptation can't be compared: as extracted there is "
            f"{', '.join(known)}, adapted {', '.join(adapted)}"
        )
    output = next(name for name in adapted if name in known)
    return [FiguresBlock((_draw_adapted_norms(f"adapted-norms-{i}", shift, output, before, after),))]


def _draw_parts(
    i: int, parts: Sequence[EmbeddedFeatures], domains: Sequence[str], classes: Sequence[str]
) -> list[Figure]:
    figures = []
    for j, part in enumerate(parts):
        by_domain = [segment.domain for segment in part.segments]
        by_class = [segment.labels[0] if segment.labels else NO_LABEL for segment in part.segments]
        for what, groups, order in (("domain", by_domain, domains), ("class", by_class, classes)):
            title = f"{part.title}, by {what}"
            svg = draw_scatter(f"embedding-{i}-{j}-{what}", f"t-SNE, {title}", part.points, groups, order)
            figures.append(Figure(f"{title[:1].upper()}{title[1:]}.", Markup(svg)))
    return figures


def _draw_adapted_norms(name: str, shift: str, output: str, before: FeatureStore, after: FeatureStore) -> Figure:
    """Draw norms of one output as extracted and as adapted, over the same bins."""
    norms = {}
    for title, store in (("as extracted", before), ("adapted", after)):
        shape = next(o.shape for o in store.spec.outputs if o.name == output)
        values, _ = sample_norms(store, output, shape, np.flatnonzero(np.asarray(store.read_array("state")) == DONE))
        norms[title] = values[np.isfinite(values)]
    edges = np.histogram_bin_edges(np.concatenate(list(norms.values())), N_BINS)
    counts = {title: np.histogram(values, edges)[0].tolist() for title, values in norms.items()}
    medians = ", ".join(f"{title} {np.median(values):.3g}" for title, values in norms.items())
    svg = draw_histogram(
        name, f"Norms of {output}, {shift}", edges.tolist(), counts, "Euclidean norm of a clip", y_label="clips"
    )
    return Figure(f"Norms of {output}, {shift}; medians: {medians}. A sample of rows of each store.", Markup(svg))


def _show_alignment(i: int, shift: str, places: DataPlaces, runs_dir: Path) -> list[Block]:
    record = choose_alignment_run(runs_dir, RunChoice(shift=shift))
    plain = find_source_only(runs_dir, record)
    first = (
        read_cached_features(places, runs_dir, record)
        if plain is None
        else read_projected_features(places, runs_dir, plain)
    )
    norms = [compute_norms(features) for features in (first, read_projected_features(places, runs_dir, record))]
    blocks: list[Block] = [TextBlock(f"{shift}, seed {record.seed}: norms of all test segments, by modality.", "quiet")]
    if plain is None:
        text = "Before is the features as they lie in the cache: no run without alignment (source_only) is there."
        blocks.append(TextBlock(text, "quiet"))
    top = max(max(each.visual.max(), each.audio.max()) for each in norms)
    edges = np.linspace(0, float(top) * 1.02 or 1.0, N_BINS + 1)
    figures = tuple(_draw_modality_norms(f"modality-norms-{i}-{j}", each, edges) for j, each in enumerate(norms))
    return [*blocks, FiguresBlock(figures)]


def _show_activation(i: int, shift: str, places: DataPlaces, runs_dir: Path) -> list[Block]:
    """Show where a clip's class is seen: the target's first test segment by its id."""
    target = find_shift(places.card, shift).target
    segment_id = min((s.segment_id for s in places.manifest if s.domain == target and s.split == TEST), default="")
    if not segment_id:
        return []
    picture = make_activation_maps(places, runs_dir, RunChoice(shift=shift), segment_id)
    svg = inline_figure(picture.figure, f"activation-{i}", picture.description)
    words = f"Class activation map (Grad-CAM) of {segment_id}. For others: echoshift picture cam --segment ID."
    return [FiguresBlock((Figure(words, Markup(svg)),), wide=True)]


def _show_shares(i: int, shift: str, places: DataPlaces, runs_dir: Path) -> list[Block]:
    picture = make_norm_shares(places, runs_dir, RunChoice(shift=shift))
    svg = inline_figure(picture.figure, f"shares-{i}", picture.description)
    words = f"{shift}: what each modality weighs. Its accuracies read the target's labels."
    caption = "As Figure 7 of Planamente et al.; the top features are those of the largest classifier weights."
    return [TextBlock(words, "analysis"), FiguresBlock((Figure(caption, Markup(svg)),), wide=True)]


def _draw_modality_norms(name: str, norms: ModalityNorms, edges: np.ndarray) -> Figure:
    groups = {"pictures": norms.visual, "sound": norms.audio}
    counts = {group: np.histogram(values, edges)[0].tolist() for group, values in groups.items()}
    means = ", ".join(f"{group} {values.mean():.2f}" for group, values in groups.items())
    caption = f"{norms.title}: mean norm of {means}; pictures / sound {norms.ratio:.2f}."
    svg = draw_histogram(
        name, f"Feature norms, {norms.title}", edges.tolist(), counts, "norm of a segment's feature", y_label="segments"
    )
    return Figure(caption, Markup(svg))
