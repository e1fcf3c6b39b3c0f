"""Is `echoshift stage2`: trains the audio-infused recogniser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from extract.commands.spec_options import DEFAULT_CACHE, CacheOption, DeviceOption, ManifestOption, ManifestsOption
from pipeline.cards import MANIFESTS_DIR
from train.commands.record_tables import print_classes, print_records
from train.commands.run_options import (
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

if TYPE_CHECKING:
    from pipeline.cards import Shift
    from train.data_places import DataPlaces
    from train.runs import RunRecord
    from train.stage_settings import RunSettings
    from train.watching import EpochWatcher


def stage2(
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
) -> None:
    """Train the audio-infused recogniser on what Stage 1 exported; runs Stage 1 first where it isn't done."""
    from extract.commands.cluster_options import end_on_sigterm
    from extract.commands.terminal import show_progress
    from pipeline.devices import resolve_device
    from pipeline.errors import RunError
    from train.two_stages import make_stage2_request

    choices = RunChoices(dataset, media, cache, manifest, manifests, device, preset, config, set_)
    places = open_places(choices)
    settings = resolve_choices("stage2", places.card, choices)
    steps = [*(f"recogniser_{stream.stream.name}" for stream in settings.streams), "predicted", "scores"]
    for name in rerun or []:
        if name not in steps:
            raise RunError(f"there is no step {name!r}; there are {', '.join(steps)}")
    chosen_device = resolve_device(device)
    runs_dir = runs / places.card.name
    records: list[RunRecord] = []
    with end_on_sigterm():
        for chosen in choose_shifts(places.card, places.manifest, shift):
            with show_progress("steps") as progress:
                _run_missing_stage1(settings, places, chosen, seed, runs_dir, progress)
                from train.method_running import run_training
                from train.stage2.planning import plan_stage2

                request = make_stage2_request(places, settings, chosen, seed, runs_dir, rerun=frozenset(rerun or []))
                outcome = run_training(plan_stage2(request, _notify), progress, chosen_device)
            records += outcome.records
            print_classes(outcome.records[0], places.card)
            for name, path in outcome.checkpoints.items():
                typer.echo(f"checkpoint of {name}: {path}")
    print_records("Stage 2", records, places.card, runs_dir)


def _run_missing_stage1(
    settings: RunSettings, places: DataPlaces, shift: Shift, seed: int, runs_dir: Path, progress: EpochWatcher
) -> None:
    from train.two_stages import list_needed

    for needed in list_needed(settings, shift, seed, runs_dir):
        from train.stage1.running import Stage1Request, run_stage1

        _notify(f"{shift.name}, seed {seed}: Stage 1 isn't done with these settings; running it first")
        request = Stage1Request(places, needed.shift, needed.seed, needed.config, runs_dir)
        run_stage1(request, progress, _notify)


def _notify(message: str) -> None:
    typer.echo(message, err=True)
