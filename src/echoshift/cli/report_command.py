"""`echoshift report`: writes one page of everything that is known of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
