"""Moves weights by Adam or SGD, all of them in one fused kernel.

The kernels are torch's own (`torch.optim` with `fused=True` calls the same ones). torch.optim isn't used, because
making an optimiser imports torch's compiler, which takes seconds, as long as a small run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from echoshift.train.cached.training import Schedule

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's and every paper's


class Optimiser(Protocol):
    """Moves weights against their gradients."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come, in place on a GPU, where a captured graph reads it."""
        ...

    def step(self) -> None:
        """Take a step and forget the gradients."""
        ...

    def keep(self, parameters: Sequence[Tensor], n_runs: int) -> Optimiser:
        """Return the optimiser of the first `n_runs` of stacked runs, whose weights these are, as it is now."""
        ...


def make_optimiser(parameters: Sequence[Tensor], schedule: Schedule, device: torch.device) -> Optimiser:
    """Make the optimiser that a schedule names."""
    lr: float | Tensor = torch.tensor(schedule.lr, device=device) if device.type == "cuda" else schedule.lr
    if schedule.optimiser == "adam":
        return FusedAdam(parameters, lr, schedule.weight_decay)
    return FusedSgd(parameters, lr, schedule.weight_decay, schedule.momentum)


class FusedAdam:
    """Adam with weight decay in the gradient, as torch.optim.Adam."""

    def __init__(self, parameters: Sequence[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        self._parameters, self._lr, self._weight_decay = list(parameters), lr, weight_decay
        self._means = [torch.zeros_like(p) for p in parameters]
        self._squares = [torch.zeros_like(p) for p in parameters]
        self._steps = [torch.zeros((), device=p.device) for p in parameters]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        self._lr = _set(self._lr, lr)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and forget the gradients."""
        used = _find_used(self._parameters)
        steps = [self._steps[i] for i in used]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            [self._parameters[i] for i in used],
            [cast(Tensor, self._parameters[i].grad) for i in used],
            [self._means[i] for i in used],
            [self._squares[i] for i in used],
            [],
            steps,
            lr=self._lr,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=self._weight_decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )
        _forget_gradients(self._parameters)

    def keep(self, parameters: Sequence[Tensor], n_runs: int) -> FusedAdam:
        """Return the optimiser of the first `n_runs` of stacked runs, as it is now."""
        kept = FusedAdam(parameters, self._lr, self._weight_decay)
        kept._means = [mean[:n_runs].clone() for mean in self._means]
        kept._squares = [square[:n_runs].clone() for square in self._squares]
        kept._steps = [step.clone() for step in self._steps]
        return kept


class FusedSgd:
    """SGD with momentum, and weight decay in the gradient, as torch.optim.SGD."""

    def __init__(self, parameters: Sequence[Tensor], lr: float | Tensor, weight_decay: float, momentum: float) -> None:
        self._parameters, self._lr = list(parameters), lr
        self._weight_decay, self._momentum = weight_decay, momentum
        self._velocities = [torch.zeros_like(p) for p in parameters]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        self._lr = _set(self._lr, lr)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and forget the gradients."""
        used = _find_used(self._parameters)
        torch._fused_sgd_(
            [self._parameters[i] for i in used],
            [cast(Tensor, self._parameters[i].grad) for i in used],
            [self._velocities[i] for i in used] if self._momentum else [],
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=self._lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # velocities begin at 0, so the first step is like any other
        )
        _forget_gradients(self._parameters)

    def keep(self, parameters: Sequence[Tensor], n_runs: int) -> FusedSgd:
        """Return the optimiser of the first `n_runs` of stacked runs, as it is now."""
        kept = FusedSgd(parameters, self._lr, self._weight_decay, self._momentum)
        kept._velocities = [velocity[:n_runs].clone() for velocity in self._velocities]
        return kept


def _set(before: float | Tensor, lr: float) -> float | Tensor:
    return before.fill_(lr) if isinstance(before, Tensor) else lr


def _find_used(parameters: Sequence[Tensor]) -> list[int]:
    """Find the weights that the loss depends on; the others stay as they are, weight decay or not."""
    return [i for i, parameter in enumerate(parameters) if parameter.grad is not None]


def _forget_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
