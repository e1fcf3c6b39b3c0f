"""`echoshift show`: one segment's pictures, sound, gates and predictions, in the terminal or as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.options import (
    DEFAULT_CACHE,
    DEFAULT_RUNS,
    CacheOption,
    DatasetChoice,
    ManifestOption,
    ManifestsOption,
    MediaChoice,
    RunChoices,
    RunsOption,
    open_places,
)
from echoshift.cli.terminal import JsonOption, print_json
from echoshift.pipeline.cards import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.train.look.segment import SegmentView

SegmentArgument = Annotated[str, typer.Argument(help="A segment's id, as in the manifest.", show_default=False)]


def show(
    segment: SegmentArgument,
    dataset: DatasetChoice = "",
    to: Annotated[Path | None, typer.Option(help="Write it as one picture, a .png or .svg file.")] = None,
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
        typer.echo(f"picture: {to}", err=True)


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
