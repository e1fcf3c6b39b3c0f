"""`echoshift report`, `show` and `plot`: a page of all that is known, one segment, and figures of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from echoshift.cli.options import (
    DEFAULT_CACHE,
    DEFAULT_RUNS,
    CacheOption,
    ConfigChoice,
    DatasetChoice,
    ManifestOption,
    ManifestsOption,
    MediaChoice,
    OverrideChoice,
    RunChoices,
    RunsOption,
    list_present_shifts,
    open_places,
    resolve_choices,
)
from echoshift.cli.terminal import JsonOption, QuietOption, make_notifier, print_json, show_progress
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.train.grids import Stage
    from echoshift.train.look.segment import SegmentView

DEFAULT_REPORTS = Path("reports")


def report(
    dataset: DatasetChoice = "",
    segments: Annotated[int, typer.Option(help="How many segments of each domain's split are shown.", min=0)] = 2,
    segment: Annotated[list[str] | None, typer.Option(help="A segment to show besides; may be repeated.")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="A grid file of one's own; may be repeated.")] = None,
    preset: Annotated[
        str, typer.Option(help="The preset whose grids are shown; default: all presets' with runs.")
    ] = "",
    config: ConfigChoice = None,
    set_: OverrideChoice = None,
    media: MediaChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    reports: Annotated[Path, typer.Option(help="Where reports lie.", envvar="ECHOSHIFT_REPORTS")] = DEFAULT_REPORTS,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write reports/DATASET/index.html, a page that needs nothing else; trains and extracts nothing."""
    from echoshift.train.look.report import PAGE, make_report
    from echoshift.train.look.report_results import PRESETS, ReportRequest

    choices = RunChoices(dataset, media, cache, manifest, manifests, "cpu", preset or PRESETS[0], config, set_)
    places = open_places(choices, make_notifier(quiet=quiet))

    def resolve(name: str, stage: Stage, overrides: tuple[str, ...]) -> Mapping[str, Any]:
        return resolve_choices(stage, places.card, replace(choices, preset=name), overrides).describe()

    with show_progress("parts", quiet=quiet) as progress:
        request = ReportRequest(
            places=places,
            runs_dir=runs / places.card.name,
            resolve=resolve,
            present_shifts=tuple(shift.name for shift in list_present_shifts(places.card, places.manifest)),
            presets=(preset,) if preset else PRESETS,
            grids=tuple(grid or ()),
            n_segments=segments,
            segment_ids=tuple(segment or ()),
            watcher=progress,
        )
        outcome = make_report(request, reports / places.card.name / PAGE)
    if as_json:
        print_json(outcome)
        return
    typer.echo(f"{outcome.path}: {outcome.n_bytes / 1e6:.1f} MB, {outcome.n_runs} runs, {outcome.n_stores} stores")


SegmentArgument = Annotated[str, typer.Argument(help="A segment's id, as in the manifest.", show_default=False)]


def show(
    segment: SegmentArgument,
    dataset: DatasetChoice = "",
    to: Annotated[Path | None, typer.Option(help="Write it as one figure, a .png or .svg file.")] = None,
    as_json: JsonOption = False,
    shift: Annotated[str, typer.Option(help="Only runs of this shift.")] = "",
    seed: Annotated[int | None, typer.Option(help="Only runs of this seed.", min=0)] = None,
    frames: Annotated[int, typer.Option(help="How many frames.", min=1, max=64)] = 5,
    top: Annotated[int, typer.Option(help="How many classes a prediction.", min=1)] = 3,
    media: MediaChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
) -> None:
    """Show a segment: its frames and sound, the gates that its sound makes, and what every finished run takes it for.

    What isn't there (media, a checkpoint, a sound track) is said, and nothing is put in its place.
    """
    from echoshift.train.look.segment import ViewOptions, read_segment_view
    from echoshift.train.look.show import describe_view
    from echoshift.train.splits import find_shift

    places = open_places(RunChoices(dataset, media, cache, manifest, manifests, "cpu", "paper", None, None))
    if shift:
        find_shift(places.card, shift)
    options = ViewOptions(n_frames=frames, n_top=top, shift=shift, seed=seed)
    view = read_segment_view(places, runs / places.card.name, segment, options)
    if to is not None:
        from echoshift.train.look.figures import write_figure
        from echoshift.train.look.show import draw_segment

        write_figure(draw_segment(view), to)
    if as_json:
        print_json(describe_view(view))
    else:
        _print(view, top)
    if to is not None:
        typer.echo(f"figure: {to}", err=True)


def _print(view: SegmentView, n_top: int) -> None:
    from echoshift.cli.terminal import print_table
    from echoshift.train.look.show import list_facts, list_gates, list_predictions

    for line in (*list_facts(view), "", *list_gates(view), ""):
        typer.echo(line)
    if view.predictions:
        print_table("predictions, percent; * is the label", *list_predictions(view, n_top))
    if "predictions" in view.missing:
        typer.echo(view.missing["predictions"])
    if view.synthetic:
        typer.echo(f"{view.dataset} is synthetic: nothing here was filmed")


PlotKind = Literal["norms", "shares", "embedding", "cam"]
KindArgument = Annotated[
    PlotKind,
    typer.Argument(
        help="norms: feature norms before and after alignment; shares: what each modality weighs; embedding: features "
        "before and after adaptation in the plane; cam: where in a clip a network sees a class.",
        show_default=False,
    ),
]


def plot(
    kind: KindArgument,
    dataset: DatasetChoice = "",
    to: Annotated[Path | None, typer.Option(help="A .png or .svg file; default reports/DATASET/KIND.png.")] = None,
    as_json: JsonOption = False,
    shift: Annotated[str, typer.Option(help="Of a run of this shift; default: the last run.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of a run of this seed; default: the last run.", min=0)] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Of a run of this row of a grid; cam takes several, one below the other.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="The method of alignment; default: norms, shares the last run's; embedding, cam Stage 1's own."
        ),
    ] = "",
    segment: Annotated[str, typer.Option(help="cam: whose middle clip it is.")] = "",
    class_: Annotated[str, typer.Option("--class", help="cam: which class; default: the most probable.")] = "",
    points: Annotated[int, typer.Option(help="embedding: the most segments, drawn at random.", min=5)] = 1000,
    tsne_seed: Annotated[int, typer.Option(help="embedding: decides what is random.", min=0)] = 0,
    media: MediaChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
) -> None:
    """Plot features or a network from what is extracted and trained; nothing is computed for it.

    norms and shares are Figures 6 and 7 of Planamente et al. 2021. With --json the numbers behind it are printed.
    """
    from echoshift.pipeline.errors import RunError
    from echoshift.train.look import figures
    from echoshift.train.look.run_choice import RunChoice

    rows = row or []
    if len(rows) > 1 and kind != "cam":
        raise RunError(f"{kind} is of one run; name one --row")
    places = open_places(RunChoices(dataset, media, cache, manifest, manifests, "cpu", "paper", None, None))
    runs_dir = runs / places.card.name
    choice = RunChoice(shift, seed, rows[0] if rows else None, method)
    if kind == "norms":
        made = figures.make_norms(places, runs_dir, choice)
    elif kind == "shares":
        made = figures.make_shares(places, runs_dir, choice)
    elif kind == "embedding":
        made = figures.make_embedding(places, runs_dir, choice, tsne_seed=tsne_seed, max_points=points)
    else:
        from echoshift.train.look.activation import make_activation_maps

        made = make_activation_maps(places, runs_dir, choice, segment, rows, class_)
    path = to or DEFAULT_REPORTS / places.card.name / f"{kind}.png"
    figures.write_figure(made.figure, path)
    if as_json:
        print_json({"kind": kind, "path": path, "description": made.description, "numbers": made.numbers})
    else:
        typer.echo(made.description)
    typer.echo(f"figure: {path}", err=True)
