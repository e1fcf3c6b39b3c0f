"""`echoshift plot`: draws what features and networks look like, from stores and finished runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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

PICTURES_DIR = Path("reports")


class PictureKind(StrEnum):
    """Lists what can be drawn."""

    norms = "norms"
    shares = "shares"
    embedding = "embedding"
    cam = "cam"


KindArgument = Annotated[
    PictureKind,
    typer.Argument(
        help="norms: feature norms before and after alignment; shares: what each modality weighs; embedding: features "
        "before and after adaptation in the plane; cam: where in a clip a network sees a class.",
        show_default=False,
    ),
]


def picture(
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
    """Draw a picture of features or of a network from what is extracted and trained; nothing is computed anew.

    norms and shares are Figures 6 and 7 of Planamente et al. 2021. With --json the numbers behind it are printed.
    """
    from echoshift.pipeline.errors import RunError
    from echoshift.train.look import figures
    from echoshift.train.look.run_choice import RunChoice

    rows = row or []
    if len(rows) > 1 and kind is not PictureKind.cam:
        raise RunError(f"{kind.value} is of one run; name one --row")
    places = open_places(RunChoices(dataset, media, cache, manifest, manifests, "cpu", "paper", None, None))
    runs_dir = runs / places.card.name
    choice = RunChoice(shift, seed, rows[0] if rows else None, method)
    if kind is PictureKind.norms:
        made = figures.make_norms(places, runs_dir, choice)
    elif kind is PictureKind.shares:
        made = figures.make_shares(places, runs_dir, choice)
    elif kind is PictureKind.embedding:
        made = figures.make_embedding(places, runs_dir, choice, tsne_seed=tsne_seed, max_points=points)
    else:
        from echoshift.train.look.activation import make_activation_maps

        made = make_activation_maps(places, runs_dir, choice, segment, rows, class_)
    path = to or PICTURES_DIR / places.card.name / f"{kind.value}.png"
    figures.write_figure(made.figure, path)
    if as_json:
        print_json({"kind": kind.value, "path": path, "description": made.description, "numbers": made.numbers})
    else:
        typer.echo(made.description)
    typer.echo(f"picture: {path}", err=True)
