"""`echoshift stage2` and `echoshift align`, which train on cached features and take the same options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from echoshift.cli.json_answers import JsonOption
from echoshift.cli.network_runs import run_networks
from echoshift.cli.run_options import (
    DEFAULT_RUNS,
    AnswerChoices,
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
from echoshift.cli.spec_options import DEFAULT_CACHE, CacheOption, DeviceOption, ManifestOption, ManifestsOption
from echoshift.cli.terminal import QuietOption
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.train.grids import Stage


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
