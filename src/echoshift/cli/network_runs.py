"""Runs Stage 2 or alignment for the shifts that a command names, and prints what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from echoshift.cli.json_answers import print_json
from echoshift.cli.record_tables import describe_records, describe_run, print_classes, print_records
from echoshift.cli.run_options import AnswerChoices, RunChoices, choose_shifts, open_places, resolve_choices

if TYPE_CHECKING:
    from echoshift.pipeline.cards import Shift
    from echoshift.train.data_places import DataPlaces
    from echoshift.train.grids import Stage
    from echoshift.train.runs import RunRecord
    from echoshift.train.settings import RunSettings
    from echoshift.train.watching import EpochWatcher


def run_networks(
    stage: Stage,
    title: str,
    choices: RunChoices,
    shift: str,
    seed: int,
    runs: Path,
    rerun: Sequence[str],
    answer: AnswerChoices,
) -> None:
    """Train and scores what isn't done yet, shift by shift; run Stage 1 first where it is read and isn't done.

    Raises RunError for an unknown step to do anew, and whatever resolving and running raise.
    """
    from echoshift.cli.cluster_options import end_on_sigterm
    from echoshift.cli.terminal import make_notifier, show_progress
    from echoshift.pipeline.devices import resolve_device
    from echoshift.pipeline.errors import RunError, suggest
    from echoshift.train.run_method import plan_network_run, run_training

    notify = make_notifier(quiet=answer.quiet)
    places = open_places(choices, notify)
    settings = resolve_choices(stage, places.card, choices)
    device = resolve_device(choices.device)
    runs_dir = runs / places.card.name
    records: list[RunRecord] = []
    described: list[dict[str, Any]] = []
    with end_on_sigterm():
        for chosen in choose_shifts(places.card, places.manifest, shift):
            with show_progress("steps", quiet=answer.quiet) as progress:
                _run_missing_stage1(settings, places, chosen, seed, runs_dir, progress, notify)
                planned = plan_network_run(
                    places, settings, chosen, seed, runs_dir, rerun=frozenset(rerun), notify=notify
                )
                steps = [*(network.plan_step().name for network in planned.networks), "predicted", "scores"]
                for name in rerun:
                    if name not in steps:
                        raise RunError(f"there is no step {name!r}; {suggest(name, steps)}")
                outcome = run_training(planned, progress, device)
            records += outcome.records
            if answer.as_json:
                described += [
                    describe_run(record, outcome.left_out, {"checkpoints": dict(outcome.checkpoints)})
                    for record in outcome.records
                ]
                continue
            print_classes(outcome.records[0], places.card)
            for name, path in outcome.checkpoints.items():
                typer.echo(f"checkpoint of {name}: {path}")
    if answer.as_json:
        print_json(describe_records(stage, places.card, runs_dir, described))
        return
    print_records(title, records, places.card, runs_dir)


def _run_missing_stage1(
    settings: RunSettings,
    places: DataPlaces,
    shift: Shift,
    seed: int,
    runs_dir: Path,
    progress: EpochWatcher,
    notify: Callable[[str], None],
) -> None:
    from echoshift.train.stage2.inputs import list_needed

    for needed in list_needed(settings, shift, seed, runs_dir):
        from echoshift.train.stage1.run import Stage1Request, run_stage1

        notify(f"{shift.name}, seed {seed}: Stage 1 isn't done with these settings; running it first")
        run_stage1(Stage1Request(places, needed.shift, needed.seed, needed.config, runs_dir), progress, notify)
