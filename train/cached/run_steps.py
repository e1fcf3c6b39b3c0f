"""Plans and fetches what each step of a run sees: rows, views, clips, labels, and numbers for dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from echoshift.train.cached.batches import (
    FeatureBatch,
    LabelledTargetFeatures,
    SourceFeatures,
    StepInputs,
    TargetFeatures,
)
from echoshift.train.cached.feature_bank import Bank
from echoshift.train.epoch_plan import LABELLED, SOURCE, TARGET, plan_epoch

if TYPE_CHECKING:
    from echoshift.train.cached.training import Schedule, TrainingData

_VIEWS, _DRAWS = 3, 4  # what is random, beside the three kinds of shuffles (epoch_plan)


class PlannedSteps(NamedTuple):
    """What S steps of one run see, as NumPy arrays; B = n_source + n_target + n_labelled.

    Rows, views and clips are int64 [S, B], labels of the three parts [S, n, ...], domains int64 [S, n_source].
    """

    rows: np.ndarray
    views: np.ndarray
    clips: np.ndarray
    source_labels: np.ndarray
    domains: np.ndarray
    pseudo_labels: np.ndarray
    labelled_labels: np.ndarray


class ChunkInputs(NamedTuple):
    """What S steps of R runs see, on the device: as PlannedSteps, with the runs' axis second.

    `draws` float32 [S, R, n_draws]; `progress` float32 [S, R], the share of the steps that are done.
    """

    rows: Tensor
    views: Tensor
    clips: Tensor
    source_labels: Tensor
    domains: Tensor
    pseudo_labels: Tensor
    labelled_labels: Tensor
    draws: Tensor
    progress: Tensor


class RunSteps:
    """Plans the steps of one run, epoch after epoch, from its seed alone."""

    def __init__(self, data: TrainingData, schedule: Schedule, seed: int) -> None:
        self.data, self.schedule, self.seed = data, schedule, seed
        self.n_per_epoch = len(data.source) // min(schedule.n_source, len(data.source))
        self.sizes = (
            min(schedule.n_source, len(data.source)),
            min(schedule.n_target, len(data.target)),
            min(schedule.n_labelled, len(data.labelled)),
        )
        self._epochs = self._plan_epochs()
        self._planned: list[PlannedSteps] = []
        self._at = 0

    def take(self, n_steps: int) -> PlannedSteps:
        """Take the next steps."""
        n_planned = sum(len(part.rows) for part in self._planned) - self._at
        while n_planned < n_steps:
            self._planned.append(next(self._epochs))
            n_planned += len(self._planned[-1].rows)
        joined = PlannedSteps(*(np.concatenate(parts) for parts in zip(*self._planned, strict=True)))
        taken = PlannedSteps(*(part[self._at : self._at + n_steps] for part in joined))
        self._at += n_steps
        while self._planned and self._at >= len(self._planned[0].rows):
            self._at -= len(self._planned.pop(0).rows)
        return taken

    def _plan_epochs(self) -> Iterator[PlannedSteps]:
        data, epoch = self.data, 0
        rows_of = {SOURCE: data.source, LABELLED: data.labelled, TARGET: data.target}

        @lru_cache(maxsize=8)
        def order(n: int, seed: int, number: int, what: int) -> np.ndarray:
            return data.train.shuffle(rows_of[what], seed, number, what)

        n_clips = data.train.n_clips if data.one_clip else 1
        while True:
            sizes = len(data.source), len(data.labelled), len(data.target)
            batches = plan_epoch(*sizes, self.schedule, seed=self.seed, epoch=epoch, order=order)
            source, target, labelled = (
                np.stack([getattr(batch, part) for batch in batches]) for part in ("source", "target", "labelled")
            )
            rows = np.concatenate([data.source[source], data.target[target], data.labelled[labelled]], axis=1)
            rng = np.random.default_rng([self.seed, epoch, _VIEWS])
            yield PlannedSteps(
                rows,
                rng.integers(0, data.train.n_views, rows.shape),
                rng.integers(0, n_clips, rows.shape),
                data.source_labels[source],
                data.source_domains[source],
                data.pseudo_labels[target],
                data.labelled_labels[labelled],
            )
            epoch += 1


class StepSource:
    """Brings the steps of R runs to the device, a chunk at a time."""

    def __init__(self, bank: Bank, runs: Sequence[RunSteps], device: torch.device) -> None:
        self.bank, self.runs, self._device = bank, list(runs), device
        self.n_draws = 0
        self._generators = [_Generator(run.seed, device) for run in runs]
        self._draws = torch.empty(0, device=device)

    def peek(self) -> StepInputs:
        """Return the first run's first step, without its numbers for dropout, and take nothing."""
        run = self.runs[0]
        planned = RunSteps(run.data, run.schedule, run.seed).take(1)
        moved = [torch.from_numpy(values[0]).to(self._device) for values in planned]
        nothing = torch.zeros((), device=self._device)
        moved[0] = moved[0] + self.bank.offset_of(run.data.train)
        return make_step_inputs(ChunkInputs(*(*moved, nothing, nothing)), self.bank)

    def take(self, start: int, stop: int, n_runs: int) -> ChunkInputs:
        """Take the steps from `start` to `stop` of the first `n_runs` runs."""
        n_steps = stop - start
        planned = [run.take(n_steps) for run in self.runs[:n_runs]]
        arrays = [np.stack(parts, axis=1) for parts in zip(*planned, strict=True)]
        offsets = np.array([self.bank.offset_of(run.data.train) for run in self.runs[:n_runs]])
        arrays[0] = arrays[0] + offsets[:, None]
        draws = self._draw(n_steps, n_runs)
        steps = np.arange(start, stop, dtype=np.float64)[:, None]
        progress = steps / np.array([run.schedule.n_steps for run in self.runs[:n_runs]])
        moved = [torch.from_numpy(values).to(self._device) for values in arrays]
        moved += [draws, torch.from_numpy(progress).float().to(self._device)]
        return ChunkInputs(*moved)

    def _draw(self, n_steps: int, n_runs: int) -> Tensor:
        """Draw a chunk's numbers, float32 [n_steps, n_runs, n_draws], into memory that the next chunk takes again."""
        n = n_steps * n_runs * self.n_draws
        if len(self._draws) < n:
            self._draws = torch.empty(n, device=self._device)
        draws = self._draws[:n].view(n_steps, n_runs, self.n_draws)
        for run in range(n_runs):
            for step in range(n_steps):
                self._generators[run].fill(draws[step, run])
        return draws


class _Generator:
    """Draws uniform numbers of one run; on a CPU by NumPy, whose generator takes a third of the time of torch's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        seeds = np.random.SeedSequence([seed, _DRAWS])
        self._numpy = np.random.Generator(np.random.PCG64(seeds))
        self._torch: torch.Generator | None = None
        if device.type != "cpu":
            [state] = seeds.generate_state(1, np.uint64)
            self._torch = torch.Generator(device=device)
            self._torch.manual_seed(int(state >> np.uint64(1)))

    def fill(self, numbers: Tensor) -> None:
        """Fill a contiguous tensor with the next numbers."""
        if self._torch is None:
            self._numpy.random(dtype=np.float32, out=numbers.numpy())
        else:
            torch.rand(numbers.shape, generator=self._torch, out=numbers)


def make_step_inputs(of_step: ChunkInputs, bank: Bank) -> StepInputs:
    """Look up what one run's step sees; the fields have neither the axis of steps nor that of runs."""
    batch = bank.gather(of_step.rows, of_step.views, of_step.clips if bank.one_clip else None)
    return cut_batch(batch, of_step)


def cut_batch(batch: FeatureBatch, of_step: ChunkInputs) -> StepInputs:
    """Cut a step's features, [B, ...] with the three parts side by side, and put its labels to them."""
    n_source, n_target = of_step.source_labels.shape[0], of_step.pseudo_labels.shape[0]
    n_labelled = of_step.labelled_labels.shape[0]

    def cut(start: int, size: int) -> FeatureBatch:
        return FeatureBatch(
            {name: values.narrow(0, start, size) for name, values in batch.visual.items()},
            batch.audio.narrow(0, start, size),
            batch.has_audio.narrow(0, start, size),
        )

    source = SourceFeatures(cut(0, n_source), of_step.source_labels, of_step.domains)
    target = labelled = None
    if n_target:
        target = TargetFeatures(cut(n_source, n_target), of_step.pseudo_labels)
    if n_labelled:
        labelled = LabelledTargetFeatures(cut(n_source + n_target, n_labelled), of_step.labelled_labels)
    return StepInputs(source, target, labelled, of_step.progress)
