"""Is `echoshift stage2`: trains the audio-infused recogniser."""

from __future__ import annotations

from extract.commands.spec_options import DEFAULT_CACHE, CacheOption, DeviceOption, ManifestOption, ManifestsOption
from pipeline.cards import MANIFESTS_DIR
from train.commands.network_runs import run_networks
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
)


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
    choices = RunChoices(dataset, media, cache, manifest, manifests, device, preset, config, set_)
    run_networks("stage2", "Stage 2", choices, shift, seed, runs, rerun or [])
