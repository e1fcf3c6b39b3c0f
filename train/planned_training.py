"""A run of methods on cached features that is planned: its networks, its data, how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.segments import Manifest
from echoshift.train.cached.batches import Domain
from echoshift.train.cached.feature_bank import Rows
from echoshift.train.cached.training import TrainedRun, TrainingJob
from echoshift.train.grids import Stage
from echoshift.train.selection_rules import SelectionRule
from echoshift.train.splits import ShiftSplits
from echoshift.train.steps import Step, StepRunner


class MethodRun(Protocol):
    """One network of a run, planned: what is trained, and what is predicted with it."""

    @property
    def name(self) -> str:
        """Name it among the run's networks, such as rgb."""
        ...

    @property
    def title(self) -> str:
        """Name it in lines of progress and in errors."""
        ...

    @property
    def one_clip(self) -> bool:
        """Whether each clip is predicted by itself."""
        ...

    @property
    def over_clips(self) -> Literal["mean", "max"]:
        """How predictions of clips are combined then."""
        ...

    def plan_step(self) -> Step:
        """Plan the training; what decides it is in the key."""
        ...

    def plan_job(self) -> TrainingJob:
        """Make the job that the loop trains."""
        ...

    def build(self) -> nn.Module:
        """Build the method with the weights that the seed decides."""
        ...

    def describe(self) -> dict[str, str]:
        """Return the facts that a checkpoint's header holds."""
        ...

    def examine(self, run: TrainedRun) -> tuple[str, ...]:
        """Say, a line each, what is wrong with a network that was trained to its end; it may look at what it saw."""
        ...

    def name_test(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return settings and inputs that decide what test segments are predicted from, beside the weights."""
        ...

    def list_predicted(self) -> Mapping[str, tuple[Rows, np.ndarray, Domain]]:
        """List what is predicted: `target_test`, and, where there is one, `source_val`."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """A run whose steps are planned; nothing is trained yet.

    Attributes:
        row: the grid's row that asks for it.
        described: the whole configuration as JSON; its hash names the run.
        rules: each gives a result of its own.
        fingerprints: of the stores that it reads, by name.
        splits: without the segments that have no features, which are `left_out`.
        has_audio: by segment.
        networks: whose probabilities are averaged.
    """

    stage: Stage
    card: DatasetCard
    manifest: Manifest
    shift: Shift
    seed: int
    row: str
    described: Mapping[str, Any]
    rules: tuple[SelectionRule, ...]
    runs_dir: Path
    fingerprints: Mapping[str, str]
    splits: ShiftSplits
    left_out: tuple[str, ...]
    has_audio: Mapping[str, bool]
    networks: tuple[MethodRun, ...]
    runner: StepRunner

    def list_pending(self) -> list[tuple[Step, MethodRun]]:
        """List the trainings that aren't done."""
        steps = [(network.plan_step(), network) for network in self.networks]
        return [(step, network) for step, network in steps if not self.runner.is_done(step)]
