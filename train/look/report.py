"""The report: one page of everything that is known of a data set; it trains and extracts nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from echoshift.pipeline.errors import EchoshiftError, RunError
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.location import locate
from echoshift.train.grids import list_grids
from echoshift.train.look.activation import make_activation_maps
from echoshift.train.look.features import find_cached_store, open_adapted_store, open_stores
from echoshift.train.look.figures import (
    Plot,
    draw_histogram,
    draw_losses,
    make_embedding,
    make_norms,
    make_shares,
    render_inline,
)
from echoshift.train.look.report_results import ReportRequest, gather_grids, gather_loose, list_runs
from echoshift.train.look.report_tables import (
    Stage1Run,
    compare_labels,
    count_classes,
    count_coverage,
    count_parts,
    draw_store_norms,
    list_absent,
    list_clusters,
    list_failures,
    list_settings,
    list_stage1_runs,
    name_variants,
    read_silence,
    read_stage1_runs,
    sample_norms,
)
from echoshift.train.look.run_choice import SOURCE_ONLY, RunChoice, choose_stage1_run, get_method
from echoshift.train.look.segment import (
    SegmentReader,
    SegmentView,
    ShownPrediction,
    ViewOptions,
    find_segment,
    make_sentence,
)
from echoshift.train.look.show import SPEAKERS, describe_spectrogram
from echoshift.train.runs import RESULTS, RunRecord, describe_code_version, keep_latest, read_runs
from echoshift.train.splits import TEST, find_shift

PAGE = "index.html"
MAX_SHIFTS, MAX_CHARTS, MAX_CLUSTERINGS, MAX_PREDICTIONS = 3, 12, 6, 8
MAX_POINTS = 600
N_FRAMES, N_CLASSES = 4, 3
NARROW_IN = 6.0  # wider figures have a row of their own


@dataclass(frozen=True, slots=True)
class ReportOutcome:
    """The page that was written: where, how large, and of how many runs and stores."""

    path: Path
    n_bytes: int
    n_runs: int
    n_stores: int


@dataclass(frozen=True, slots=True)
class ReportFigure:
    """A figure of the page: its `<svg>`, "" where it can't be drawn and the caption says why."""

    svg: Markup
    caption: str
    is_wide: bool = False


def make_report(request: ReportRequest, path: Path) -> ReportOutcome:
    """Gather everything and write the page to `path`, in one step.

    Raises what reading manifests, stores and results raises; what isn't there yet is said in the page instead.
    """
    places, card, manifest = request.places, request.places.card, request.places.manifest
    segments = choose_segments(manifest, request.n_segments, request.segment_ids)
    stores = open_stores(places)
    records = [record for record in read_runs(request.runs_dir / RESULTS) if record.dataset == card.name]
    latest = list(keep_latest(records).values())
    request.watcher.start("grids", len(list_grids()) + len(request.grids))
    results, without_runs, shown = gather_grids(request, records)
    loose, loose_breakdowns = gather_loose(latest, shown, manifest.sha256)
    has_audio, audio_store = read_silence(stores)
    sizes = [locate(store.path).measure_bytes() for store in stores]
    request.watcher.start("stores", len(stores))
    page = render_page(
        card=card,
        manifest=manifest,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        code=describe_code_version(),
        n_runs=len(latest),
        results=results,
        without_runs=without_runs,
        loose=loose,
        loose_breakdowns=loose_breakdowns,
        total_s=sum(segment.duration_s for segment in manifest),
        n_videos=len({(segment.domain, segment.video_id) for segment in manifest}),
        n_known=len(has_audio),
        n_silent=sum(not heard for heard in has_audio.values()),
        audio_store=audio_store,
        parts=count_parts(manifest, card, has_audio),
        classes=count_classes(manifest, card),
        shifts=compare_labels(manifest, card),
        durations=_draw_durations(manifest, card.domains),
        coverage=count_coverage(list(zip(stores, sizes, strict=True)), manifest),
        failures=list_failures(stores),
        stores=[_describe_store(i, store, request) for i, store in enumerate(stores)],
        n_bytes=sum(sizes),
        stage1=_gather_stage1(read_stage1_runs(latest, request.runs_dir, places), card.classes),
        features=draw_features(request, latest),
        segments=_read_segments(segments, request),
        runs=list_runs(latest, shown),
    )
    data = page.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_bytes(data)
    fresh.replace(path)
    return ReportOutcome(path, len(data), len(latest), len(stores))


def render_page(**values: Any) -> str:
    """Render the page as HTML, one file with its style, script, frames and audio; the values' words are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": mark_code, "data_url": make_data_url}
    return environment.get_template("report.html.j2").render(
        **values, describe_spectrogram=describe_spectrogram, speakers=SPEAKERS
    )


def mark_code(text: str) -> Markup:
    """Escape words and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def make_data_url(data: bytes, kind: str) -> str:
    """Make a data URL of bytes, such as those of an image."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _show(name: str, plot: Plot, caption: str = "") -> ReportFigure:
    is_wide = plot.figure.get_figwidth() > NARROW_IN
    return ReportFigure(Markup(render_inline(plot, name)), caption or plot.description, is_wide)


def _draw_durations(manifest: Manifest, domains: Sequence[str]) -> ReportFigure | None:
    of = {domain: np.array([s.duration_s for s in manifest if s.domain == domain]) for domain in domains}
    groups = {domain: values for domain, values in of.items() if len(values)}
    if not groups:
        return None
    title = "Durations of segments, all splits, by domain"
    plot = draw_histogram(title, groups, "seconds (logarithmic)", "segments", is_logarithmic=True)
    return _show("durations", plot, f"{title}.")


def _describe_store(i: int, store: FeatureStore, request: ReportRequest) -> dict[str, Any]:
    drawn = [draw_store_norms(store, output.name) for output in store.spec.outputs]
    figures = [
        ReportFigure(Markup(""), f"{words}.") if plot is None else _show(f"norms-{i}-{j}", plot, f"{words}.")
        for j, (plot, words) in enumerate(drawn)
    ]
    request.watcher.advance()
    return {
        "title": f"{store.spec.encoder} {store.attributes['fingerprint']}",
        "weights": store.attributes["weights_source"],
        "created": store.attributes["created"]["when"],
        "settings": list_settings(f"spec-{i}", store.spec),
        "figures": figures,
    }


def _gather_stage1(runs: Sequence[Stage1Run], classes: Sequence[str]) -> dict[str, Any]:
    """Gather the table of Stage 1's runs, its losses, clusters and marks of absent activities."""
    names = name_variants(runs)
    figures: list[ReportFigure] = []
    for i, (variant, name) in enumerate(names.items()):
        curves = [_list_losses(run) for run in runs if run.variant == variant and run.losses]
        if curves and len(figures) < MAX_CHARTS:
            figures.append(_show(f"losses-{i}", draw_losses(f"Losses of {name}", curves), f"{name}."))
    # Runs of one source and seed share their audio classifier.
    heard = [{"audio classifier": values} for values in sorted({r.audio_losses for r in runs if r.audio_losses})]
    if heard:
        plot = draw_losses("Losses of the audio classifier", heard)
        figures.append(_show("losses-audio", plot, "Audio classifier, on the source."))
    clustered = list({run.record.steps["clusters"]: run for run in runs if run.clusters}.values())
    marked: dict[str, dict[str, Any]] = {}
    for run in {run.record.steps["absent_labels"]: run for run in runs if run.absent}.values():
        marked.setdefault(run.record.shift, {})[run.record.steps["absent_labels"]] = run.absent
    absent = []
    for i, (shift, by_key) in enumerate(marked.items()):
        told = [marks for marks in by_key.values() if not marks.fault]
        faults = [f"{shift}: {marks.fault}." for marks in by_key.values() if marks.fault]
        absent.append((list_absent(f"absent-{i}", shift, told, classes) if told else None, faults))
    return {
        "runs": list_stage1_runs(runs, names) if runs else None,
        "n_runs": len(runs),
        "n_variants": len(names),
        "losses": figures,
        "n_charts": min(len(names), MAX_CHARTS),
        "clusters": [list_clusters(f"clusters-{i}", run) for i, run in enumerate(clustered[:MAX_CLUSTERINGS])],
        "n_clusterings": len(clustered),
        "absent": absent,
    }


def _list_losses(run: Stage1Run) -> dict[str, Sequence[float | None]]:
    """List the losses that are worth a line: none that is 0 throughout, and no total of a single one."""
    losses = {name: values for name, values in run.losses.items() if any(values)}
    return {"total": losses["total"]} if len(losses) == 2 and "total" in losses else losses


def draw_features(request: ReportRequest, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Draw the features of the last run of each stage in the first MAX_SHIFTS shifts that have one.

    What a run has no features for any more is said in place of its figure.
    """
    places, runs_dir = request.places, request.runs_dir
    adapted = list(dict.fromkeys(run.shift for run in runs if run.stage == "stage1" and "features" in run.steps))
    aligned = list(dict.fromkeys(run.shift for run in runs if get_method(run) not in ("", SOURCE_ONLY)))
    request.watcher.start("features", len(adapted[:MAX_SHIFTS]) + len(aligned[:MAX_SHIFTS]))

    def attempt(name: str, draw: Callable[[], Plot], caption: str = "") -> ReportFigure:
        try:
            return _show(name, draw(), caption)
        except EchoshiftError as error:
            return ReportFigure(Markup(""), make_sentence(str(error)))

    stage1, alignment = [], []
    for i, shift in enumerate(adapted[:MAX_SHIFTS]):
        choice, target = RunChoice(shift=shift), find_shift(places.card, shift).target
        embedding = partial(make_embedding, places, runs_dir, choice, max_points=MAX_POINTS)
        stage1.append(attempt(f"embedding-{i}", embedding))
        stage1.append(attempt(f"adapted-norms-{i}", partial(draw_adapted_norms, request, choice)))
        ids = [s.segment_id for s in places.manifest if s.domain == target and s.split == TEST]
        if ids:
            words = f"Class activation map (Grad-CAM) of {min(ids)}. For others: `echoshift plot cam --segment ID`."
            stage1.append(attempt(f"cam-{i}", partial(make_activation_maps, places, runs_dir, choice, min(ids)), words))
        request.watcher.advance()
    for i, shift in enumerate(aligned[:MAX_SHIFTS]):
        choice = RunChoice(shift=shift)
        alignment.append(attempt(f"modality-norms-{i}", partial(make_norms, places, runs_dir, choice)))
        if places.card.task == "single-label":
            alignment.append(attempt(f"shares-{i}", partial(make_shares, places, runs_dir, choice)))
        request.watcher.advance()
    counts = {"Stage 1": len(adapted), "alignment": len(aligned)}
    cut = [f"Of {what}, {MAX_SHIFTS} of {n} shifts are drawn." for what, n in counts.items() if n > MAX_SHIFTS]
    return {"stage1": stage1, "alignment": alignment, "cut": cut}


def draw_adapted_norms(request: ReportRequest, choice: RunChoice) -> Plot:
    """Draw norms of one output as extracted and as adapted by Stage 1, over the same bins."""
    record = choose_stage1_run(request.runs_dir, choice, with_features=True)
    after = open_adapted_store(request.runs_dir, record)
    before = find_cached_store(request.places, record, after)
    known, adapted = ([output.name for output in store.spec.outputs] for store in (before, after))
    shared = [name for name in adapted if name in known]
    if not shared:
        raise RunError(
            f"norms of {choice.shift} before and after adaptation can't be compared: as extracted there is "
            f"{', '.join(known)}, adapted {', '.join(adapted)}"
        )
    norms = {title: sample_norms(s, shared[0])[0] for title, s in (("as extracted", before), ("adapted", after))}
    finite = {title: values[np.isfinite(values)] for title, values in norms.items()}
    return draw_histogram(f"Norms of {shared[0]}, {choice.shift}", finite, "Euclidean norm of a clip", "clips")


def choose_segments(manifest: Manifest, n_per_split: int, named: Sequence[str] = ()) -> list[Segment]:
    """Choose up to `n_per_split` segments of each domain's split, and those that are named, in the manifest's order.

    Within a split one of each class comes before a second of any (by a segment's first label); among equals the hash of
    the id decides, so that the choice depends neither on the order of the file nor on chance. Raises ManifestError for
    a named segment that the manifest lacks.
    """
    chosen = {find_segment(manifest, segment_id).segment_id for segment_id in named}
    seen: Counter[tuple[str, str, str]] = Counter()
    ranked: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    by_hash = sorted(manifest, key=lambda s: hashlib.blake2b(s.segment_id.encode(), digest_size=8).hexdigest())
    for place, segment in enumerate(by_hash):
        group = (segment.domain, segment.split, segment.labels[0] if segment.labels else "")
        ranked.setdefault(group[:2], []).append((seen[group], place, segment.segment_id))
        seen[group] += 1
    for members in ranked.values():
        chosen |= {segment_id for _, _, segment_id in sorted(members)[:n_per_split]}
    return [segment for segment in manifest if segment.segment_id in chosen]


def _read_segments(
    segments: Sequence[Segment], request: ReportRequest
) -> list[tuple[SegmentView, list[ShownPrediction]]]:
    """Read the views of segments, each with the predictions that are shown."""
    request.watcher.start("segments", len(segments))
    views = []
    options = ViewOptions(n_frames=N_FRAMES, n_top=N_CLASSES)
    with SegmentReader(request.places, request.runs_dir, options) as reader:
        for segment in segments:
            view = reader.read(segment.segment_id)
            views.append((view, choose_predictions(view.predictions)))
            request.watcher.advance()
    return views


def choose_predictions(predictions: Sequence[ShownPrediction]) -> list[ShownPrediction]:
    """Keep the first seed of each variant, and no more than MAX_PREDICTIONS."""
    first: dict[tuple[str, ...], ShownPrediction] = {}
    for said in sorted(predictions, key=lambda said: said.seed):
        first.setdefault((said.stage, said.row, said.shift, said.speaker, said.selection), said)
    kept = {id(said) for said in first.values()}
    return [said for said in predictions if id(said) in kept][:MAX_PREDICTIONS]
