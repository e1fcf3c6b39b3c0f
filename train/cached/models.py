"""Holds what is trained, one method or a stack of methods, and takes steps of the optimiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from echoshift.pipeline.errors import RunError
from echoshift.train.cached.batches import Dropouts, Method
from echoshift.train.cached.feature_bank import Bank
from echoshift.train.cached.optimisers import make_optimiser
from echoshift.train.cached.run_steps import ChunkInputs, StepSource, make_step_inputs

if TYPE_CHECKING:
    from echoshift.train.cached.training import Schedule


class TrainedModels(Protocol):
    """R methods that are trained together."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        ...

    def train(self, chunk: ChunkInputs, bank: Bank) -> Tensor:
        """Take a chunk's steps; return the terms of the loss, float32 [S, R, n_terms], on the device."""
        ...

    def load(self, run: int) -> nn.Module:
        """Return the method of one run as it is now; good until the next step."""
        ...

    def keep(self, n_runs: int) -> None:
        """Go on with the first `n_runs` runs alone."""
        ...


def make_models(methods: Sequence[nn.Module], schedule: Schedule, device: torch.device) -> TrainedModels:
    """Make what trains methods: a single one by itself, several of equal shape as one stacked model."""
    if len(methods) == 1 and device.type != "cuda":
        return SingleModel(methods[0], schedule, device)
    from echoshift.train.cached.stacking import StackedModels

    return StackedModels(methods, schedule, device)


class SingleModel:
    """Trains one method."""

    def __init__(self, method: nn.Module, schedule: Schedule, device: torch.device) -> None:
        self._method = method.to(device).train()
        self._precision, self._device = schedule.precision, device
        self._optimiser = make_optimiser([p for p in method.parameters() if p.requires_grad], schedule, device)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        self._optimiser.set_lr(lr)

    def train(self, chunk: ChunkInputs, bank: Bank) -> Tensor:
        """Take a chunk's steps; return the terms of the loss, float32 [S, 1, n_terms]."""
        losses = []
        method = cast(Method, self._method)
        for step in range(len(chunk.rows)):
            of_step = ChunkInputs(*(values[step, 0] for values in chunk))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
                terms = method.losses(make_step_inputs(of_step, bank), Dropouts(of_step.draws))
            terms.sum().backward()
            self._optimiser.step()
            losses.append(terms.detach())
        return torch.stack(losses)[:, None]

    def load(self, run: int) -> nn.Module:
        """Return the method."""
        return self._method

    def keep(self, n_runs: int) -> None:
        """Have nothing to do: the one run is kept, or done."""


def count_draws(method: nn.Module, source: StepSource) -> int:
    """Count the numbers for dropout that a step takes, by a pass of a copy of the method over a first batch.

    Raises RunError where the method doesn't compute as many terms as it names.
    """
    trial = copy.deepcopy(method).train()
    dropouts = Dropouts()
    with torch.no_grad():
        losses = cast(Method, trial).losses(source.peek(), dropouts)
    names = cast(Method, trial).loss_names
    if losses.shape != (len(names),):
        kind = type(method).__name__
        raise RunError(f"the losses of {kind} are of shape {list(losses.shape)}, its loss_names are {len(names)}")
    return dropouts.n_taken
