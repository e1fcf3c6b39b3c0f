"""`echoshift stage1`: trains the audio-adaptive encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.json_answers import JsonOption, print_json
from echoshift.cli.record_tables import describe_records, describe_run, print_classes, print_records
from echoshift.cli.run_options import (
    DEFAULT_RUNS,
    ConfigChoice,
    DatasetChoice,
    MediaChoice,
    OverrideChoice,
    PresetChoice,
    RerunChoice,
    RunChoices,
    RunsOption,
    SeedChoice,
    ShiftChoice,
    choose_shifts,
    open_places,
    resolve_choices,
)
from echoshift.cli.spec_options import DEFAULT_CACHE, CacheOption, DeviceOption, ManifestOption, ManifestsOption
from echoshift.cli.terminal import QuietOption
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.pipeline.cards import DatasetCard
    from echoshift.train.stage1.run import Stage1Outcome


def stage1(
    dataset: DatasetChoice = "",
    shift: ShiftChoice = "all",
    seed: SeedChoice = 0,
    preset: PresetChoice = "paper",
    config: ConfigChoice = None,
    set_: OverrideChoice = None,
    media: MediaChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    device: DeviceOption = "auto",
    rerun: RerunChoice = None,
    export: Annotated[
        bool, typer.Option("--export/--no-export", help="Write adapted features and the table for Stage 2.")
    ] = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the audio-adaptive encoder and export what Stage 2 needs; skips what is done, goes on with what isn't.

    Under torchrun, several GPUs train together.
    """
    from echoshift.cli.cluster_options import end_on_sigterm
    from echoshift.cli.terminal import make_notifier, show_progress
    from echoshift.pipeline.errors import RunError, suggest
    from echoshift.train.ranks import join_ranks
    from echoshift.train.stage1.run import STEPS, Stage1Request, run_stage1

    for name in rerun or []:
        if name not in STEPS:
            raise RunError(f"there is no step {name!r}; {suggest(name, STEPS)}")
    choices = RunChoices(dataset, media, cache, manifest, manifests, device, preset, config, set_)
    notify = make_notifier(quiet=quiet)
    places = open_places(choices, notify)
    resolved = resolve_choices("stage1", places.card, choices).stage1
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
            with show_progress("steps", quiet=quiet) as progress:
                outcome = run_stage1(request, progress, notify, ranks)
            outcomes.append(outcome)
            if ranks.is_first and not as_json:
                print_outcome(outcome, places.card)
        if ranks.is_first and as_json:
            described = [describe_run(o.record, o.left_out, _list_files(o)) for o in outcomes]
            print_json(describe_records("stage1", places.card, runs / places.card.name, described))
        elif ranks.is_first:
            print_records("Stage 1", [outcome.record for outcome in outcomes], places.card, runs / places.card.name)


def _list_files(outcome: Stage1Outcome) -> dict[str, object]:
    return {"checkpoint": outcome.checkpoint, "table": outcome.table, "features": outcome.features}


def print_outcome(outcome: Stage1Outcome, card: DatasetCard) -> None:
    """Print what one shift scored, class by class, and where its results lie."""
    print_classes(outcome.record, card)
    if outcome.left_out:
        typer.echo(f"{len(outcome.left_out)} segments left out, which failed to be extracted: {outcome.left_out[0]} …")
    typer.echo(f"checkpoint: {outcome.checkpoint}")
    for path in (outcome.table, *outcome.features):
        if path is not None:
            typer.echo(f"for Stage 2: {path}")
