"""Trains methods on cached features: what a step sees, one loop for every method, and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from echoshift.pipeline.devices import keep_freed_memory
from echoshift.pipeline.errors import RunError
from echoshift.train.features import FeatureBatch, FeatureRows
from echoshift.train.watching import EpochWatcher

SOURCE, LABELLED, TARGET = range(3)

Order = Callable[[int, int, int, int], np.ndarray]  # n, seed, number of the round, what


class BatchSizes(Protocol):
    """How many segments of the source, the target and its labelled part make up a batch."""

    @property
    def n_source(self) -> int:
        """How many of the source."""
        ...

    @property
    def n_target(self) -> int:
        """How many of the target's unlabelled part."""
        ...

    @property
    def n_labelled(self) -> int:
        """How many of the target's labelled part."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The rows of one batch, or of one part of it: of the source, the target's labelled part, and its unlabelled.

    `shares` are what the mean loss of each of the three is multiplied by. Over the parts of a batch that are computed
    one after the other they add up to 1, over processes, whose gradients are averaged, they average 1: either way the
    gradient is that of the whole batch, however unevenly it is cut.
    """

    source: np.ndarray
    labelled: np.ndarray
    target: np.ndarray
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three in the order of `shares`."""
        return self.source, self.labelled, self.target

    def split(self, n_parts: int) -> list[PlannedBatch]:
        """Cut a batch into parts that are computed one after the other, each with something of the source."""
        n_parts = min(n_parts, len(self.source))
        cut = zip(*(np.array_split(rows, n_parts) for rows in self.rows), strict=True)
        return [self._make_part(*rows, n_averaged=1) for rows in cut]

    def take_share(self, rank: int, n_ranks: int) -> PlannedBatch:
        """Return what one of several processes computes of a batch."""
        return self._make_part(*(rows[rank::n_ranks] for rows in self.rows), n_averaged=n_ranks)

    def _make_part(
        self, source: np.ndarray, labelled: np.ndarray, target: np.ndarray, *, n_averaged: int
    ) -> PlannedBatch:
        of_source, of_labelled, of_target = (
            share * n_averaged * len(part) / len(whole) if len(whole) else share
            for share, part, whole in zip(self.shares, (source, labelled, target), self.rows, strict=True)
        )
        return PlannedBatch(source, labelled, target, (of_source, of_labelled, of_target))


def plan_epoch(
    n_source: int,
    n_labelled: int,
    n_target: int,
    sizes: BatchSizes,
    *,
    seed: int,
    epoch: int,
    order: Order | None = None,
) -> list[PlannedBatch]:
    """Plan an epoch: every batch has n_source segments of the source, in a new order; what fills no batch is left out.

    The target's segments come from an endless row of shuffles, in which an epoch goes on where the one before stopped,
    so that all of them are seen equally often (the released code begins again each epoch and never sees most of them;
    METHODS 9). A source smaller than a batch is one batch. `order` takes the place of `shuffle`.
    """
    order = order or shuffle
    of_source = order(n_source, seed, epoch, SOURCE)
    size = min(sizes.n_source, n_source)
    n_batches = n_source // size
    labelled_size = min(sizes.n_labelled, n_labelled)
    target_size = min(sizes.n_target, n_target)
    return [
        PlannedBatch(
            of_source[i * size : (i + 1) * size],
            _take_from_row(n_labelled, (epoch * n_batches + i) * labelled_size, labelled_size, seed, LABELLED, order),
            _take_from_row(n_target, (epoch * n_batches + i) * target_size, target_size, seed, TARGET, order),
        )
        for i in range(n_batches)
    ]


def _take_from_row(n: int, start: int, size: int, seed: int, what: int, order: Order) -> np.ndarray:
    """Take `size` rows from an endless row of shuffles of n."""
    if not size:
        return np.zeros(0, dtype=np.int64)
    rounds = range(start // n, (start + size - 1) // n + 1)
    row = np.concatenate([order(n, seed, r, what) for r in rounds])
    return row[start % n : start % n + size].copy()  # a view would keep the whole shuffle


def shuffle(n: int, seed: int, number: int, what: int) -> np.ndarray:
    """Shuffle n rows, int64 [n]; seed, number of the round and what is shuffled decide the order."""
    return np.random.default_rng([seed, number, what]).permutation(n)


Domain = Literal["source", "target"]

NO_LABEL = -1
_VIEWS, _DRAWS = 3, 4  # what is random, beside the three kinds of shuffles (epoch_plan)
_N_TOLD_STEPS = 32  # losses are looked at, and the watcher is told, as often
_N_PREDICTED_AT_ONCE = 256


class SourceFeatures(NamedTuple):
    """A labelled batch.

    Attributes:
        inputs: of B segments.
        labels: class indices int64 [B], or, multi-label, float32 [B, K] of 0 and 1.
        domains: which of the shift's source domains each segment is of, int64 [B].
    """

    inputs: FeatureBatch
    labels: Tensor
    domains: Tensor


class TargetFeatures(NamedTuple):
    """An unlabelled batch of the target.

    `pseudo_labels` are what an earlier network takes the segments for: class indices int64 [B], -1 where it says
    nothing; multi-label, float32 [B, K] of 0 and 1, a row of NaN where it says nothing.
    """

    inputs: FeatureBatch
    pseudo_labels: Tensor


class LabelledTargetFeatures(NamedTuple):
    """A batch of the target's labelled part (semi-supervised CharadesEgo)."""

    inputs: FeatureBatch
    labels: Tensor


class StepInputs(NamedTuple):
    """What one step of training sees; a part that a run has no segments of is None, never an empty batch."""

    source: SourceFeatures
    target: TargetFeatures | None
    labelled: LabelledTargetFeatures | None
    progress: Tensor  # share of the steps that are done, float32 [], 0 at the first; for ramps


class Dropouts:
    """The dropout masks of a run, whose seed alone decides them.

    `draw` makes numbers of a shape, uniform in 0..1, float32; with None nothing is dropped.
    """

    def __init__(self, draw: Callable[[tuple[int, ...]], Tensor] | None = None) -> None:
        self._draw = draw

    def drop(self, values: Tensor, p: float) -> Tensor:
        """Drop each value with probability p and scale the rest by 1 / (1 - p)."""
        if p == 0:
            return values
        keep = self.draw_keep(tuple(values.shape), p)
        return values if keep is None else values * (keep * (1 / (1 - p)))

    def draw_keep(self, shape: tuple[int, ...], p: float) -> Tensor | None:
        """Return what is kept, float32 of 0 and 1 of this shape, each 0 with probability p; None: keep all."""
        return None if self._draw is None else (self._draw(shape) >= p).float()


class Method(Protocol):
    """What is trained: an nn.Module with these two, built on the CPU with weights that its seed decides."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Name the terms of the loss, in the order of `losses`."""
        ...

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms of the loss, float32 [n_terms]; the loss is their sum. In training mode."""
        ...

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]: softmax, or sigmoid where the task is multi-label. In eval mode."""
        ...


def compute_class_loss(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute the mean loss over the samples that count, float32 []; 0 where none does.

    `logits` float [B, K]. Single-label, `labels` int64 [B]: cross-entropy; NO_LABEL counts for nothing. Multi-label,
    float [B, K]: binary cross-entropy, the mean over classes; a row of NaN counts for nothing. `counted` bool [B]
    leaves out more.
    """
    if labels.dim() == 1:
        known = labels != NO_LABEL
        each = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")
    else:
        known = ~labels.isnan().any(dim=1)
        filled = torch.where(known[:, None], labels, 0.0)
        each = F.binary_cross_entropy_with_logits(logits.float(), filled, reduction="none").mean(dim=1)
    weights = (known if counted is None else known & counted).float()
    return (each * weights).sum() / weights.sum().clamp(min=1)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What one run trains on.

    Attributes:
        train: features; the row numbers are of these.
        source: int64 [n_s]; source_labels int64 [n_s], or float32 [n_s, K]; source_domains int64 [n_s].
        target: int64 [n_t], may be empty; pseudo_labels int64 [n_t] (-1: none) or float32 [n_t, K] (NaN: none).
        labelled: int64 [n_l], the target's labelled part, usually empty; labelled_labels as source_labels.
        one_clip: each sample is one of its clips, drawn each time; otherwise all clips together.
    """

    train: FeatureRows
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
        snapshots: numbers of steps after which the weights are kept, ascending, besides the last.
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
        lr_name: the setting that a loss that is no number any more asks to lower.
    """

    title: str
    build: Callable[[], nn.Module]
    data: TrainingData
    schedule: Schedule
    seed: int
    lr_name: str = "schedule.lr"


@dataclass(frozen=True, slots=True, eq=False)
class TrainedRun:
    """What came of a job.

    Attributes:
        state: the state_dict, on the CPU.
        loss_names: of the terms.
        losses: float32 [n_epochs, n_terms], means; what is left of an unfinished epoch counts as one.
        snapshots: the state_dicts at the schedule's snapshots; the last, `state`, isn't among them.
    """

    state: dict[str, Tensor]
    loss_names: tuple[str, ...]
    losses: np.ndarray
    snapshots: tuple[dict[str, Tensor], ...] = ()


def train_run(job: TrainingJob, device: torch.device, watcher: EpochWatcher) -> TrainedRun:
    """Train a job from its first step to its last; the same job comes to the same bytes.

    Raises RunError where the loss is no number any more, or the method computes other terms than it names.
    """
    schedule, data = job.schedule, job.data
    if device.type == "cpu":
        keep_freed_memory()
    watcher.start(f"{job.title}: training", schedule.n_steps)
    module = job.build().to(device).train()
    method = cast(Method, module)
    update = _make_optimiser([p for p in module.parameters() if p.requires_grad], schedule)
    dropouts = Dropouts(_make_draw(job.seed, device))
    losses: list[np.ndarray] = []
    untold: list[Tensor] = []
    snapshots = []
    for step, inputs in enumerate(iterate_steps(data, schedule, job.seed, device)):
        with torch.autocast(device.type, torch.bfloat16, enabled=schedule.precision == "bf16"):
            terms = method.losses(inputs, dropouts)
        if terms.shape != (len(method.loss_names),):
            found, named = list(terms.shape), len(method.loss_names)
            raise RunError(f"the losses of {type(module).__name__} are of shape {found}, its loss_names are {named}")
        terms.sum().backward()
        update(schedule.find_lr(step))
        untold.append(terms.detach())
        n_done = step + 1
        if len(untold) == _N_TOLD_STEPS or n_done == schedule.n_steps or n_done in schedule.snapshots:
            losses.append(torch.stack(untold).cpu().numpy())
            if not np.isfinite(losses[-1]).all():
                raise RunError(
                    f"{job.title}: the loss is no number any more after {n_done} steps; lower "
                    f"{job.lr_name} ({schedule.lr:g})"
                )
            watcher.advance(len(untold), f"loss {losses[-1][-1].sum():.3f}")
            untold = []
        if n_done in schedule.snapshots and n_done < schedule.n_steps:
            snapshots.append(_copy_state(module))
    of_epochs = _average_epochs(np.concatenate(losses), _count_batches(data, schedule))
    return TrainedRun(_copy_state(module), method.loss_names, of_epochs, tuple(snapshots))


def iterate_steps(data: TrainingData, schedule: Schedule, seed: int, device: torch.device) -> Iterator[StepInputs]:
    """Plan and look up what each step sees, epoch after epoch, from the seed alone."""
    rows_on_device = data.train.to(device)
    n_rows = len(data.source), len(data.labelled), len(data.target)
    n_clips = data.train.n_clips if data.one_clip else 1
    order = lru_cache(maxsize=8)(shuffle)
    step, epoch = 0, 0
    while step < schedule.n_steps:
        batches = plan_epoch(*n_rows, schedule, seed=seed, epoch=epoch, order=order)
        source, target, labelled = (
            np.stack([getattr(batch, part) for batch in batches]) for part in ("source", "target", "labelled")
        )
        rows = np.concatenate([data.source[source], data.target[target], data.labelled[labelled]], axis=1)
        rng = np.random.default_rng([seed, epoch, _VIEWS])
        planned = [
            torch.from_numpy(values).to(device)
            for values in (
                rows,
                rng.integers(0, data.train.n_views, rows.shape),
                rng.integers(0, n_clips, rows.shape),
                data.source_labels[source],
                data.source_domains[source],
                data.pseudo_labels[target],
                data.labelled_labels[labelled],
            )
        ]
        n_source, n_target, n = source.shape[1], source.shape[1] + target.shape[1], rows.shape[1]
        for row, view, clip, labels, domains, pseudo, known in zip(*planned, strict=True):
            batch = rows_on_device.gather(row, view, clip if data.one_clip else None)
            yield StepInputs(
                SourceFeatures(batch.cut(0, n_source), labels, domains),
                TargetFeatures(batch.cut(n_source, n_target), pseudo) if n_target > n_source else None,
                LabelledTargetFeatures(batch.cut(n_target, n), known) if n > n_target else None,
                torch.tensor(step / schedule.n_steps, device=device),
            )
            step += 1
            if step == schedule.n_steps:
                return
        epoch += 1


@torch.inference_mode()
def predict_rows(
    method: nn.Module,
    rows: FeatureRows,
    index: np.ndarray,
    domain: Domain,
    device: torch.device,
    *,
    one_clip: bool = False,
    over_clips: Literal["mean", "max"] = "mean",
) -> np.ndarray:
    """Predict the segments whose row numbers are `index`, int64 [n]; return probabilities float32 [n, K].

    The mean over views. With `one_clip` each clip is predicted by itself, and `over_clips` combines them (METHODS 6:
    the maximum for CharadesEgo). The method is in eval mode, on the device.
    """
    found = []
    for start in range(0, len(index), _N_PREDICTED_AT_ONCE):
        held = rows.take(torch.from_numpy(index[start : start + _N_PREDICTED_AT_ONCE])).to(device)
        part = torch.arange(len(held), device=device)
        views = []
        for view in range(rows.n_views):
            of_view = torch.full_like(part, view)
            clips = [torch.full_like(part, clip) for clip in range(rows.n_clips)] if one_clip else [None]
            batches = [held.gather(part, of_view, clip) for clip in clips]
            each = torch.stack([cast(Method, method).predict(batch, domain).float() for batch in batches])
            views.append(each.amax(dim=0) if over_clips == "max" else each.mean(dim=0))
        found.append(torch.stack(views).mean(dim=0).cpu().numpy())
    return np.concatenate(found)


def _make_optimiser(parameters: Sequence[Tensor], schedule: Schedule) -> Callable[[float], None]:
    """Make what moves weights by a learning rate against their gradients, and forgets those.

    torch's own functions, in one fused kernel; to make an optimiser object would import torch's compiler, which takes
    seconds. Weights without a gradient stay as they are, weight decay or not.
    """
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    n_steps = [torch.zeros((), device=p.device) for p in parameters]

    @torch.no_grad()
    def update(lr: float) -> None:
        used = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]

        def take(values: Sequence[Tensor]) -> list[Tensor]:
            return [values[i] for i in used]

        weights, gradients = take(parameters), [cast(Tensor, parameters[i].grad) for i in used]
        if schedule.optimiser == "adam":
            adam(
                weights,
                gradients,
                take(first),
                take(second),
                [],
                take(n_steps),
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=lr,
                weight_decay=schedule.weight_decay,
                eps=1e-8,
                maximize=False,
            )
        else:
            sgd(
                weights,
                gradients,
                list(take(first)),  # momentum from 0, so that the first step is like any other
                fused=True,
                weight_decay=schedule.weight_decay,
                momentum=schedule.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        for parameter in parameters:
            parameter.grad = None

    return update


def _make_draw(seed: int, device: torch.device) -> Callable[[tuple[int, ...]], Tensor]:
    """Make what draws a run's numbers for dropout; on a CPU NumPy's generator takes a third of the time of torch's."""
    seeds = np.random.SeedSequence([seed, _DRAWS])
    if device.type == "cpu":
        rng = np.random.Generator(np.random.PCG64(seeds))
        return lambda shape: torch.from_numpy(rng.random(shape, dtype=np.float32))
    generator = torch.Generator(device=device)
    generator.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return lambda shape: torch.rand(shape, generator=generator, device=device)


def _count_batches(data: TrainingData, schedule: Schedule) -> int:
    """Count the batches of an epoch."""
    return len(data.source) // min(schedule.n_source, len(data.source))


def _copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


def _average_epochs(losses: np.ndarray, n_per_epoch: int) -> np.ndarray:
    starts = np.arange(0, len(losses), n_per_epoch)
    sizes = np.diff(np.append(starts, len(losses)))
    return (np.add.reduceat(losses.astype(np.float64), starts, axis=0) / sizes[:, None]).astype(np.float32)
