"""Trains methods on cached features: one loop for every method, one run at a time or stacks of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.freed_memory import keep_freed_memory
from echoshift.train.cached.batches import Domain, Method
from echoshift.train.cached.feature_bank import Rows, make_bank
from echoshift.train.cached.models import count_draws, make_models
from echoshift.train.cached.predicting import predict_rows
from echoshift.train.cached.run_steps import RunSteps, StepSource
from echoshift.train.watching import EpochWatcher

N_CHUNK_STEPS = 32  # planned, drawn and moved to the device at a time; losses are looked at as often
# A chunk's numbers for dropout; on a CPU they should still be in its cache when they are used.
_N_DRAWS_BYTES, _N_CPU_DRAWS_BYTES = 256 * 2**20, 4 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What one run trains on.

    Attributes:
        train: features; the row numbers are of these.
        source: int64 [n_s]; source_labels int64 [n_s], or float32 [n_s, K]; source_domains int64 [n_s].
        target: int64 [n_t], may be empty; pseudo_labels int64 [n_t] (-1: none) or float32 [n_t, K] (NaN: none).
        labelled: int64 [n_l], the target's labelled part, usually empty; labelled_labels as source_labels.
        one_clip: each sample is one of its clips, drawn anew each time; otherwise all clips together.
    """

    train: Rows
    source: np.ndarray
    source_labels: np.ndarray
    source_domains: np.ndarray
    target: np.ndarray
    pseudo_labels: np.ndarray
    labelled: np.ndarray
    labelled_labels: np.ndarray
    one_clip: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and by which optimiser a run is trained.

    Attributes:
        n_source, n_target, n_labelled: segments of a batch.
        lr_drops: pairs of a step and the learning rate from it on.
        snapshots: numbers of steps after which predictions are made, ascending, besides the last.
    """

    n_source: int
    n_target: int
    n_labelled: int
    n_steps: int
    optimiser: Literal["adam", "sgd"]
    lr: float
    weight_decay: float
    momentum: float = 0.0
    lr_drops: tuple[tuple[int, float], ...] = ()
    snapshots: tuple[int, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"

    def find_lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return next((lr for start, lr in reversed(self.lr_drops) if step >= start), self.lr)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingJob:
    """One run to train.

    Attributes:
        title: names it in errors and in lines of progress.
        build: makes the method on the CPU, with weights that its own seed decides.
        seed: decides the order of batches, views, clips and dropout.
        predict: by name, what is predicted at the snapshots and at the end: rows of features, and their domain.
        signature: jobs with the same one have equal shapes and schedules but for n_steps, and may be stacked.
        over_clips: how predictions of single clips are combined, where `one_clip`.
        keeps_states: the weights at the snapshots are kept, for who may open what is predicted only afterwards.
        lr_name: the setting that a loss that is no number any more asks to lower.
    """

    title: str
    build: Callable[[], nn.Module]
    data: TrainingData
    schedule: Schedule
    seed: int
    predict: Mapping[str, tuple[Rows, np.ndarray, Domain]]
    signature: str
    over_clips: Literal["mean", "max"] = "mean"
    keeps_states: bool = False
    lr_name: str = "schedule.lr"


@dataclass(frozen=True, slots=True, eq=False)
class TrainedRun:
    """What came of a job.

    Attributes:
        state: the state_dict, on the CPU.
        loss_names: of the terms.
        losses: float32 [n_epochs, n_terms], means; what is left of an unfinished epoch counts as one.
        predictions: by name, float32 [n_snapshots + 1, n, K].
        snapshots: the state_dicts at the snapshots, the last not among them; none unless the job keeps them.
    """

    state: dict[str, torch.Tensor]
    loss_names: tuple[str, ...]
    losses: np.ndarray
    predictions: Mapping[str, np.ndarray]
    snapshots: tuple[dict[str, torch.Tensor], ...] = ()


def train_jobs(
    jobs: Sequence[TrainingJob], device: torch.device, watcher: EpochWatcher, *, stack: int = 1
) -> list[TrainedRun]:
    """Train jobs, those with the same signature in stacks of at most `stack`; 0: as many as there are.

    A run comes to the same alone and in a stack, but for rounding. Raises RunError where a loss is no number any more.
    """
    groups: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.signature, []).append(i)
    found: dict[int, TrainedRun] = {}
    if device.type == "cpu":
        keep_freed_memory()
    watcher.start(_name_jobs(jobs), sum(job.schedule.n_steps for job in jobs))
    for members in groups.values():
        size = stack or len(members)
        longest_first = sorted(members, key=lambda i: -jobs[i].schedule.n_steps)
        for start in range(0, len(members), size):
            chosen = longest_first[start : start + size]
            trained = _train_stack([jobs[i] for i in chosen], device, watcher)
            found.update(zip(chosen, trained, strict=True))
    return [found[i] for i in range(len(jobs))]


def _train_stack(jobs: Sequence[TrainingJob], device: torch.device, watcher: EpochWatcher) -> list[TrainedRun]:
    """Train jobs of one signature together, the longest first; the shortest leaves the stack when it is done."""
    bank = make_bank([job.data.train for job in jobs], device, one_clip=jobs[0].data.one_clip)
    methods = [job.build() for job in jobs]
    loss_names = cast(Method, methods[0]).loss_names
    models = make_models(methods, jobs[0].schedule, device)
    source = StepSource(bank, [RunSteps(job.data, job.schedule, job.seed) for job in jobs], device)
    losses: list[list[np.ndarray]] = [[] for _ in jobs]
    predictions: list[dict[str, list[np.ndarray]]] = [{name: [] for name in job.predict} for job in jobs]
    states: list[dict[str, torch.Tensor]] = [{} for _ in jobs]
    snapshots: list[list[dict[str, torch.Tensor]]] = [[] for _ in jobs]
    source.n_draws = count_draws(methods[0], source)
    step, active = 0, len(jobs)
    while active:
        start, step = step, _find_stop(jobs[:active], step, _limit_chunk(source.n_draws, active, device))
        models.set_lr(jobs[0].schedule.find_lr(start))
        of_chunk = models.train(source.take(start, step, active), bank).cpu().numpy()
        for run, job in enumerate(jobs[:active]):
            losses[run].append(of_chunk[:, run])
            if not np.isfinite(of_chunk[:, run]).all():
                raise RunError(
                    f"{job.title}: the loss is no number any more after {step} steps; lower "
                    f"{job.lr_name} ({job.schedule.lr:g})"
                )
            if step in job.schedule.snapshots or step == job.schedule.n_steps:
                for name, (rows, index, domain) in job.predict.items():
                    predictions[run][name].append(_predict(models.load(run), job, rows, index, domain, device))
            if job.keeps_states and step in job.schedule.snapshots and step < job.schedule.n_steps:
                snapshots[run].append(_copy_state(models.load(run)))
        mean = "mean loss" if active > 1 else "loss"
        watcher.advance((step - start) * active, f"{mean} {of_chunk[-1].sum(axis=-1).mean():.3f}")
        staying = sum(job.schedule.n_steps > step for job in jobs[:active])
        for run in range(staying, active):
            states[run] = _copy_state(models.load(run))
        if staying < active:
            models.keep(staying)
            active = staying
    return [
        TrainedRun(
            states[run],
            loss_names,
            _average_epochs(np.concatenate(losses[run]), source.runs[run].n_per_epoch),
            {name: np.stack(parts) for name, parts in predictions[run].items()},
            tuple(snapshots[run]),
        )
        for run in range(len(jobs))
    ]


def _name_jobs(jobs: Sequence[TrainingJob]) -> str:
    if not jobs:
        return "training"
    n_others = len(jobs) - 1
    others = f" and {n_others} more run{'s' if n_others > 1 else ''}" if n_others else ""
    return f"{jobs[0].title}{others}: training"


def _copy_state(method: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.cpu().clone() for name, value in method.state_dict().items()}


def _predict(
    method: nn.Module, job: TrainingJob, rows: Rows, index: np.ndarray, domain: Domain, device: torch.device
) -> np.ndarray:
    method.eval()
    found = predict_rows(method, rows, index, domain, device, one_clip=job.data.one_clip, over_clips=job.over_clips)
    method.train()
    return found


def _limit_chunk(n_draws: int, n_runs: int, device: torch.device) -> int:
    n_bytes = _N_CPU_DRAWS_BYTES if device.type == "cpu" else _N_DRAWS_BYTES
    return max(1, min(N_CHUNK_STEPS, n_bytes // (4 * max(1, n_draws) * n_runs)))


def _find_stop(jobs: Sequence[TrainingJob], step: int, n_most: int) -> int:
    """Find where the next chunk of steps ends: before anything happens to a run."""
    events = [step + n_most]
    for job in jobs:
        schedule = job.schedule
        happens = (schedule.n_steps, *schedule.snapshots, *(start for start, _ in schedule.lr_drops))
        events += [event for event in happens if event > step]
    return min(events)


def _average_epochs(losses: np.ndarray, n_per_epoch: int) -> np.ndarray:
    starts = np.arange(0, len(losses), n_per_epoch)
    sizes = np.diff(np.append(starts, len(losses)))
    return (np.add.reduceat(losses.astype(np.float64), starts, axis=0) / sizes[:, None]).astype(np.float32)
