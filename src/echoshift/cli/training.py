"""`echoshift stage1`, `stage2` and `align`: train, score and say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echoshift.cli.options import (
    DEFAULT_CACHE,
    DEFAULT_RUNS,
    AnswerChoices,
    CacheOption,
    ConfigChoice,
    DatasetChoice,
    DeviceOption,
    ManifestOption,
    ManifestsOption,
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
from echoshift.cli.terminal import JsonOption, QuietOption, make_jsonable, print_json
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.pipeline.cards import DatasetCard, Shift
    from echoshift.train.grids import Stage
    from echoshift.train.runs import RunRecord
    from echoshift.train.settings import RunSettings
    from echoshift.train.splits import DataPlaces
    from echoshift.train.stage1.run import Stage1Outcome
    from echoshift.train.watching import EpochWatcher


def print_classes(record: RunRecord, card: DatasetCard) -> None:
    """Print what one run scored, class by class."""
    from echoshift.cli.terminal import print_table

    rows = [[c.name, _percent(c.value), c.n] for c in record.scores.per_class]
    name = "average precision" if card.task == "multi-label" else "accuracy"
    print_table(f"{record.shift}, seed {record.seed}, target test, by class", ("class", name, "n"), rows)


def print_records(stage: str, records: Sequence[RunRecord], card: DatasetCard, runs_dir: Path) -> None:
    """Print one line a run: the main score under its selection rule, silent and audible, each with its n."""
    from echoshift.cli.terminal import print_table
    from echoshift.train.runs import RESULTS

    metric = "mAP" if card.task == "multi-label" else "top-1"
    rows = []
    for record in records:
        scores = record.scores
        parts = [part for s in (scores.main, scores.silent, scores.audible) for part in (_percent(s.value), s.n)]
        rows.append([record.shift, record.seed, *parts, record.selection])
    columns = ("shift", "seed", metric, "n", "silent", "n", "audible", "n", "rule")
    print_table(f"{stage} on {card.name}, target test, percent", columns, rows)
    if any(record.selection == "target_oracle" for record in records):
        typer.echo("target_oracle sees the target's test labels: an upper bound, no result")
    if card.synthetic:
        typer.echo(f"{card.name} is synthetic: these numbers are no benchmark")
    typer.echo(f"results: {runs_dir / RESULTS}")


def describe_records(stage: str, card: DatasetCard, runs_dir: Path, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what training came to: whole records, scores as shares and not percent; `runs` are of `describe_run`."""
    from echoshift.train.runs import RESULTS

    metric = "mAP" if card.task == "multi-label" else "top-1"
    head = {"stage": stage, "dataset": card.name, "synthetic": card.synthetic, "metric": metric}
    return {**head, "results": str(runs_dir / RESULTS), "runs": list(runs)}


def describe_run(record: RunRecord, left_out: Sequence[str], files: dict[str, object]) -> dict[str, Any]:
    """Return one run's whole record, its main score, the segments left out as failed, and the files it made."""
    score = make_jsonable(record.scores.main)
    return {**make_jsonable(record), "score": score, "left_out": list(left_out), "files": make_jsonable(files)}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


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
    from echoshift.cli.options import end_on_sigterm
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

    Raises RunError for an unknown step to do again, and whatever resolving and running raise.
    """
    from echoshift.cli.options import end_on_sigterm
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


def _make_command(stage: Stage, title: str, does: str) -> Callable[..., None]:
    def command(
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
        quiet: QuietOption = False,
        as_json: JsonOption = False,
    ) -> None:
        choices = RunChoices(dataset, media, cache, manifest, manifests, device, preset, config, set_)
        run_networks(stage, title, choices, shift, seed, runs, rerun or [], AnswerChoices(quiet, as_json))

    command.__doc__ = does
    return command


stage2 = _make_command(
    "stage2",
    "Stage 2",
    "Train the audio-infused recogniser on what Stage 1 exported; runs Stage 1 first where it isn't done.",
)
align = _make_command(
    "alignment",
    "Alignment",
    "Train a method that aligns modalities or domains on cached features, such as relative norm alignment.",
)
