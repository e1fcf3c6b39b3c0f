"""Holds what the steps of one run of Stage 1 share, and runs each of them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.devices import keep_freed_memory, resolve_device
from echoshift.train.absent_activities import check_n_absent
from echoshift.train.data_places import DataPlaces
from echoshift.train.ranks import Ranks
from echoshift.train.splits import ShiftSplits, count_labels, split_for_shift
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.run_inputs import RunInputs, name_labels, open_run_inputs
from echoshift.train.stage1.visual_inputs import VisualInputs
from echoshift.train.steps import Step, StepResult, StepRunner
from echoshift.train.watching import EpochWatcher

N_CLASSES_LISTED = 20


@dataclass(frozen=True, slots=True)
class Stage1Request:
    """One run.

    Attributes:
        runs_dir: where steps and results lie, `runs/DATASET`.
        row: the grid's row that asks for it.
        export: whether adapted features, and the table for Stage 2, are wanted, or scores alone.
        rerun: names of steps that are done anew.
    """

    places: DataPlaces
    shift: Shift
    seed: int
    config: Stage1Config
    runs_dir: Path
    row: str = ""
    export: bool = True
    rerun: frozenset[str] = frozenset()


@dataclass(slots=True)
class RunContext:
    """A run under way; `results` are the steps that were asked for so far, by name."""

    request: Stage1Request
    inputs: RunInputs
    visual: VisualInputs
    runner: StepRunner
    ranks: Ranks
    watcher: EpochWatcher
    device: torch.device
    results: dict[str, StepResult] = field(default_factory=dict)

    @property
    def config(self) -> Stage1Config:
        """The run's configuration."""
        return self.request.config

    @property
    def card(self) -> DatasetCard:
        """The data set's card."""
        return self.request.places.card

    @property
    def splits(self) -> ShiftSplits:
        """The shift's segments, without those that failed to be extracted."""
        return self.inputs.splits

    @property
    def multi_label(self) -> bool:
        """Whether a segment may have any number of classes."""
        return self.card.task == "multi-label"

    @property
    def title(self) -> str:
        """Name the run in a line of progress."""
        row = f", {self.request.row}" if self.request.row else ""
        return f"{self.request.shift.name}, seed {self.request.seed}{row}"

    @property
    def source_name(self) -> str:
        """Hash the source's train segments and labels."""
        return name_labels(self.splits.source_train)

    @contextmanager
    def open_clips(self, preset: str) -> Iterator[VisualInputs]:
        """Open what gives clips of a preset: what trains, or, where that is a cache without them, the videos."""
        if not self.inputs.trunk_stores or preset == self.config.visual.test_preset:
            yield self.visual
        else:
            with self.inputs.open_frames(self.request.seed, self.device) as frames:
                yield frames

    def run(
        self, step: Step, make: Callable[[Path], Mapping[str, Any]], *, name: str = "", together: bool = False
    ) -> StepResult:
        """Run a step once; of several processes the first does it, or all `together` while the first keeps the record.

        `name` is what the run calls the step, where it has several of a kind. A step that others ask for again isn't
        looked at twice, let alone rerun twice.
        """
        folder = self.runner.find_folder(step)
        result = next((known for known in self.results.values() if known.folder == folder), None)
        if result is None and self.ranks.n_ranks == 1:
            result = self.runner.run(step, make)
        elif result is None:
            result = self._run_in_ranks(step, make, together)
        self.results[name or step.name] = result
        return result

    def _run_in_ranks(self, step: Step, make: Callable[[Path], Mapping[str, Any]], together: bool) -> StepResult:
        is_done = self.runner.is_done(step)
        self.ranks.wait()  # nobody looks any more before somebody begins
        if together and not is_done and not self.ranks.is_first:
            make(self.runner.find_folder(step))
        if self.ranks.is_first:
            self.runner.run(step, make)
        self.ranks.wait()
        return self.runner.run(step, make)


def open_context(
    request: Stage1Request, watcher: EpochWatcher, notify: Callable[[str], None], ranks: Ranks
) -> RunContext:
    """Split the manifest, open what the run reads (of several processes the first extracts what is missing)."""
    config, places = request.config, request.places
    chosen = config.target_labels
    splits = split_for_shift(
        places.manifest,
        places.card,
        request.shift,
        use_tags=chosen.use_tags,
        labelled_fraction=chosen.labelled_fraction,
        pairs=chosen.pairs,
    )
    if places.card.task == "single-label" and config.absent.weight and splits.target_train:
        check_n_absent(config.absent.n_absent, len(places.card.classes))  # before anything is extracted
    inputs: RunInputs | None = None
    if ranks.is_first:
        inputs = open_run_inputs(places, splits, config, watcher, notify)
    ranks.wait()
    if inputs is None:
        inputs = open_run_inputs(places, splits, config, watcher, notify)
    device = resolve_device(ranks.choose_device(places.device))
    if device.type == "cpu":
        keep_freed_memory()
    return RunContext(
        request=request,
        inputs=inputs,
        visual=inputs.open_visual(request.seed, device),
        runner=StepRunner(request.runs_dir / "steps", request.rerun, notify),
        ranks=ranks,
        watcher=watcher,
        device=device,
    )


def describe_data(context: RunContext) -> list[str]:
    """Describe what a run trains on: split by split, with the source's class counts, a line each."""
    splits, request = context.splits, context.request
    counts = count_labels(splits.source_train.labels, len(context.card.classes))
    n_classes = len(context.card.classes)
    by_class = ", ".join(f"{name} {n}" for name, n in zip(context.card.classes, counts.tolist(), strict=True))
    if n_classes > N_CLASSES_LISTED:
        by_class = f"{n_classes} classes, of each {counts.min()} to {counts.max()}"
    silent = (~context.inputs.sound.has_audio([s.segment_id for s in splits.target_test])).sum()
    lines = [
        f"{request.shift.name}: source {'+'.join(request.shift.source)}, {len(splits.source_train)} train segments "
        f"({by_class}), {len(splits.source_val)} for validation",
        f"{request.shift.name}: target {request.shift.target}, {len(splits.target_train)} unlabelled train segments, "
        f"{len(splits.target_labelled)} labelled, {len(splits.target_test)} test segments, {silent} of them silent",
    ]
    absent = [name for name, n in zip(context.card.classes, counts.tolist(), strict=True) if not n]
    if absent:
        more = f" and {len(absent) - N_CLASSES_LISTED} other classes" if len(absent) > N_CLASSES_LISTED else ""
        listed = ", ".join(absent[:N_CLASSES_LISTED])
        lines.append(f"{request.shift.name}: the source has no train segment of {listed}{more}")
    if context.inputs.left_out:
        left_out = context.inputs.left_out
        lines.append(f"{request.shift.name}: {len(left_out)} segments without features left out: {left_out[0]} …")
    return lines


def write_array(path: Path, values: np.ndarray) -> None:
    """Write one array as .npy in one step."""
    fresh = path.with_name(f"{path.name}.partial.npy")
    np.save(fresh, values, allow_pickle=False)
    fresh.replace(path)
