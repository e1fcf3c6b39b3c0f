"""Is `echoshift stage1`: trains the audio-adaptive encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from extract.commands.spec_options import DEFAULT_CACHE, CacheOption, DeviceOption, ManifestOption, ManifestsOption
from pipeline.cards import MANIFESTS_DIR
from train.commands.run_options import (
    DEFAULT_RUNS,
    ConfigChoice,
    DatasetChoice,
    MediaChoice,
    OverrideChoice,
    PresetChoice,
    RunChoices,
    RunsOption,
    choose_shifts,
    open_places,
    resolve_choices,
)

if TYPE_CHECKING:
    from pipeline.cards import DatasetCard
    from train.stage1.running import Stage1Outcome


def stage1(
    dataset: DatasetChoice = "",
    shift: Annotated[str, typer.Option(help="Shifts of the card, such as D1-D2, separated by blanks, or all.")] = "all",
    seed: Annotated[int, typer.Option(help="Decides everything that is random.", min=0)] = 0,
    preset: PresetChoice = "paper",
    config: ConfigChoice = None,
    set_: OverrideChoice = None,
    media: MediaChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    device: DeviceOption = "auto",
    rerun: Annotated[
        list[str] | None, typer.Option(help="A step to do anew, such as clusters, whatever is done already.")
    ] = None,
    export: Annotated[
        bool, typer.Option("--export/--no-export", help="Write adapted features and the table for Stage 2.")
    ] = True,
) -> None:
    """Train the audio-adaptive encoder and export what Stage 2 needs; skips what is done, goes on with what isn't.

    Under torchrun, several GPUs train together.
    """
    from extract.commands.cluster_options import end_on_sigterm
    from extract.commands.terminal import show_progress
    from pipeline.errors import RunError
    from train.ranks import join_ranks
    from train.stage1.running import STEPS, Stage1Request, run_stage1

    for name in rerun or []:
        if name not in STEPS:
            raise RunError(f"there is no step {name!r}; there are {', '.join(STEPS)}")
    choices = RunChoices(dataset, media, cache, manifest, manifests, device, preset, config, set_)
    places = open_places(choices)
    resolved = resolve_choices(places.card, choices)
    outcomes = []
    with end_on_sigterm(), join_ranks() as ranks:
        if rerun and ranks.n_ranks > 1:
            raise RunError("--rerun goes with one process; delete the step's folder, or run without torchrun")
        for chosen in choose_shifts(places.card, places.manifest, shift):
            request = Stage1Request(
                places=places,
                shift=chosen,
                seed=seed,
                config=resolved,
                runs_dir=runs / places.card.name,
                export=export,
                rerun=frozenset(rerun or []),
            )
            with show_progress("steps") as progress:
                outcome = run_stage1(request, progress, _notify, ranks)
            outcomes.append(outcome)
            if ranks.is_first:
                print_outcome(outcome, places.card)
        if ranks.is_first:
            print_summary(outcomes, places.card, runs / places.card.name)


def _notify(message: str) -> None:
    typer.echo(message, err=True)


def print_outcome(outcome: Stage1Outcome, card: DatasetCard) -> None:
    """Prints what one shift scored, class by class, and where its results lie."""
    from extract.commands.terminal import print_table

    scores = outcome.record.scores
    rows = [[c.name, _percent(c.value), c.n] for c in scores.per_class]
    name = "average precision" if card.task == "multi-label" else "accuracy"
    print_table(
        f"{outcome.record.shift}, seed {outcome.record.seed}, target test, by class", ("class", name, "n"), rows
    )
    if outcome.left_out:
        typer.echo(f"{len(outcome.left_out)} segments left out, which failed to be extracted: {outcome.left_out[0]} …")
    typer.echo(f"checkpoint: {outcome.checkpoint}")
    for path in (outcome.table, *outcome.features):
        if path is not None:
            typer.echo(f"for Stage 2: {path}")


def print_summary(outcomes: list[Stage1Outcome], card: DatasetCard, runs_dir: Path) -> None:
    """Prints one line a shift: the main score under its selection rule, silent and audible, each with its n."""
    from extract.commands.terminal import print_table
    from train.runs import RESULTS

    metric = "mAP" if card.task == "multi-label" else "top-1"
    rows = []
    for outcome in outcomes:
        scores = outcome.record.scores
        parts = [part for s in (scores.main, scores.silent, scores.audible) for part in (_percent(s.value), s.n)]
        rows.append([outcome.record.shift, outcome.record.seed, *parts, outcome.record.selection])
    columns = ("shift", "seed", metric, "n", "silent", "n", "audible", "n", "rule")
    print_table(f"Stage 1 on {card.name}, target test, percent", columns, rows)
    if card.synthetic:
        typer.echo(f"{card.name} is synthetic: these numbers are no benchmark")
    typer.echo(f"results: {runs_dir / RESULTS}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
