"""`echoshift ablate` and `echoshift table`: run a grid, and print what it came to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from echoshift.cli.completion import complete_grid, complete_shifts
from echoshift.cli.options import (
    DEFAULT_CACHE,
    DEFAULT_RUNS,
    CacheOption,
    ConfigChoice,
    DatasetChoice,
    DeviceOption,
    ManifestOption,
    ManifestsOption,
    MediaChoice,
    OverrideChoice,
    PresetChoice,
    RunChoices,
    RunsOption,
    list_present_shifts,
    open_places,
    resolve_choices,
)
from echoshift.cli.terminal import JsonOption, QuietOption, make_jsonable, make_notifier, print_json
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.train.grids import Grid, PlannedRun, Stage
    from echoshift.train.settings import RunSettings
    from echoshift.train.splits import DataPlaces
    from echoshift.train.tables import Table

EXIT_SOME_FAILED = 3


TableForm = Literal["text", "markdown", "csv", "latex"]


GridOption = Annotated[
    str, typer.Option("--grid", help="A grid's name, or a TOML file of one's own.", autocompletion=complete_grid)
]
ShiftsOption = Annotated[
    str,
    typer.Option(
        "--shifts",
        help="Shifts, separated by blanks or commas; default: the grid's, or all.",
        autocompletion=complete_shifts,
    ),
]
SeedsOption = Annotated[
    int | None, typer.Option("--seeds", help="How many seeds, 0, 1, …; default: the grid's.", min=1)
]


RuleName = Literal["last", "mean_last", "source_val", "target_oracle"]


RuleOption = Annotated[
    RuleName | None,
    typer.Option(
        "--rule", help="Which selection rule's scores the table shows; default: last, of alignment mean_last."
    ),
]
FormOption = Annotated[TableForm, typer.Option("--form", help="How the table is printed.")]
ToOption = Annotated[Path | None, typer.Option("--to", help="Write the table into this file.")]


def ablate(
    grid: GridOption,
    dataset: DatasetChoice = "",
    shifts: ShiftsOption = "",
    seeds: SeedsOption = None,
    workers: Annotated[int, typer.Option(help="Processes, each with a GPU or a share of the cores.", min=1)] = 1,
    preset: PresetChoice = "paper",
    config: ConfigChoice = None,
    set_: OverrideChoice = None,
    media: MediaChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    device: DeviceOption = "auto",
    rule: RuleOption = None,
    form: FormOption = "text",
    to: ToOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run what a grid still lacks and print its table; ends with 3 if a run failed."""
    from echoshift.cli.options import end_on_sigterm, plan_cluster
    from echoshift.cli.terminal import show_progress
    from echoshift.train.ablation import run_grid, select_missing
    from echoshift.train.runs import RESULTS, read_runs

    choices = RunChoices(dataset, media, cache, manifest, manifests, device, preset, config, set_)
    notify = make_notifier(quiet=quiet)
    places, chosen, planned = _plan(choices, grid, shifts, seeds, notify)
    runs_dir = runs / places.card.name
    missing = select_missing(planned, read_runs(runs_dir / RESULTS), places.manifest.sha256)
    notify(f"{len(planned) - len(missing)} of {len(planned)} runs are done")
    failed = []
    if missing:
        cluster = plan_cluster(workers, None, slurm=False, slurm_options=[], device=device) if workers > 1 else None
        with end_on_sigterm(), show_progress("runs", quiet=quiet) as progress:
            gpus = cluster.gpus if cluster is not None else ()
            failed = run_grid(
                missing, places, runs_dir, partial(_resolve, places, choices), progress, n_workers=workers, gpus=gpus
            )
    made = _make_table(places, chosen, planned, runs_dir, rule)
    if as_json:
        _write(made, form, to)
        reasons = [
            {"row": run.planned.row, "shift": run.planned.shift, "seed": run.planned.seed, "reason": run.reason}
            for run in failed
        ]
        print_json({**describe_table(made, chosen, rule), "failed": reasons})
    else:
        _print(made, form, to)
    for run in failed:
        typer.echo(f"failed: {run.planned.row}, {run.planned.shift}, seed {run.planned.seed}: {run.reason}", err=True)
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def table(
    grid: GridOption,
    dataset: DatasetChoice = "",
    shifts: ShiftsOption = "",
    seeds: SeedsOption = None,
    preset: PresetChoice = "paper",
    config: ConfigChoice = None,
    set_: OverrideChoice = None,
    cache: CacheOption = DEFAULT_CACHE,
    runs: RunsOption = DEFAULT_RUNS,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    rule: RuleOption = None,
    form: FormOption = "text",
    to: ToOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print a grid's table from the runs that are done; trains nothing."""
    choices = RunChoices(dataset, None, cache, manifest, manifests, "cpu", preset, config, set_)
    places, chosen, planned = _plan(choices, grid, shifts, seeds, make_notifier(quiet=quiet))
    made = _make_table(places, chosen, planned, runs / places.card.name, rule)
    if as_json:
        _write(made, form, to)
        print_json(describe_table(made, chosen, rule))
        return
    _print(made, form, to)


def _plan(
    choices: RunChoices, name: str, shifts: str, n_seeds: int | None, notify: Callable[[str], None]
) -> tuple[DataPlaces, Grid, list[PlannedRun]]:
    from echoshift.train.grids import list_shifts, plan_runs, read_grid
    from echoshift.train.splits import read_shift_names

    grid = read_grid(name)
    places = open_places(choices, notify)
    named = (read_shift_names(places.card, shifts) if shifts.strip() != "all" else []) or list(grid.shifts)
    if not named:
        present = [shift.name for shift in list_present_shifts(places.card, places.manifest)]
        named = [name for name in list_shifts(grid, places.card) if name in present]
    planned = plan_runs(
        grid,
        places.card,
        lambda stage, overrides: _resolve(places, choices, stage, overrides).describe(),
        seeds=range(n_seeds) if n_seeds else (),
        shifts=named,
    )
    return places, grid, planned


def _resolve(places: DataPlaces, choices: RunChoices, stage: Stage, overrides: tuple[str, ...]) -> RunSettings:
    return resolve_choices(stage, places.card, choices, overrides)


def _make_table(
    places: DataPlaces, grid: Grid, planned: list[PlannedRun], runs_dir: Path, rule: RuleName | None
) -> Table:
    from echoshift.train.runs import RESULTS, read_runs
    from echoshift.train.tables import average_hits, make_table

    records = read_runs(runs_dir / RESULTS)
    sha256 = places.manifest.sha256
    rule = _choose_rule(grid, rule)
    hits = average_hits(planned, records, runs_dir, selection=rule, manifest_sha256=sha256)
    return make_table(grid, records, planned, places.card, selection=rule, manifest_sha256=sha256, hits=hits)


def _choose_rule(grid: Grid, rule: RuleName | None) -> RuleName:
    return rule or ("mean_last" if grid.stage == "alignment" else "last")


def describe_table(made: Table, grid: Grid, rule: RuleName | None) -> dict[str, object]:
    """Return a grid's table unrounded, in percent and points, with the grid's name and the selection rule."""
    return {"grid": grid.name, "rule": _choose_rule(grid, rule), **make_jsonable(made)}


def _write(made: Table, form: TableForm, to: Path | None) -> None:
    """Write the table into a file where one is named; the ending decides the form, then --form, then Markdown."""
    if to is not None:
        by_ending: dict[str, TableForm] = {".md": "markdown", ".csv": "csv", ".tex": "latex"}
        chosen = by_ending.get(to.suffix, "markdown" if form == "text" else form)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(_format(made, chosen), encoding="utf-8")


def _format(made: Table, form: TableForm) -> str:
    from echoshift.train.tables import format_csv, format_latex, format_markdown

    forms = {"markdown": format_markdown, "csv": format_csv, "latex": format_latex}
    return forms[form](made)


def _print(made: Table, form: TableForm, to: Path | None) -> None:
    from echoshift.cli.terminal import print_table
    from echoshift.train.tables import lay_out

    _write(made, form, to)
    if form != "text":
        typer.echo(_format(made, form), nl=False)
        return
    header, lines = lay_out(made)
    print_table(made.title, header, lines)
    for note in made.notes:
        typer.echo(note)
