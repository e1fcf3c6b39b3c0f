"""Trains methods of equal shape as one stacked model, by torch.func; on a GPU as a captured graph of a step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from echoshift.train.cached.batches import Dropouts, FeatureBatch, Method
from echoshift.train.cached.cuda_graphs import StepGraph
from echoshift.train.cached.feature_bank import Bank
from echoshift.train.cached.optimisers import make_optimiser
from echoshift.train.cached.run_steps import ChunkInputs, cut_batch

if TYPE_CHECKING:
    from echoshift.train.cached.training import Schedule


class _Losses(nn.Module):
    """Has a method's losses as its forward pass, which functional_call asks for."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: FeatureBatch, of_step: ChunkInputs) -> Tensor:
        """Return the terms of the loss of one run's step."""
        return cast(Method, self.method).losses(cut_batch(batch, of_step), Dropouts(of_step.draws))


class StackedModels:
    """Trains R methods: every weight has an axis of runs first, and one optimiser, elementwise, moves them all."""

    def __init__(self, methods: Sequence[nn.Module], schedule: Schedule, device: torch.device) -> None:
        wrapped = [_Losses(method.to(device).train()) for method in methods]
        parameters, buffers = stack_module_state(wrapped)
        trained = {name for name, p in wrapped[0].named_parameters() if p.requires_grad}
        self._parameters = {k: v.detach().requires_grad_() for k, v in parameters.items() if k in trained}
        self._constants = {k: v.detach() for k, v in parameters.items() if k not in trained}
        self._buffers = {name: value.detach().clone() for name, value in buffers.items()}
        self._template = copy.deepcopy(wrapped[0]).to("meta")
        self._loaded = copy.deepcopy(wrapped[0].method)
        self._schedule, self._device = schedule, device
        self._optimiser = make_optimiser(list(self._parameters.values()), schedule, device)
        self._graph: StepGraph | None = None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps to come."""
        self._optimiser.set_lr(lr)

    def train(self, chunk: ChunkInputs, bank: Bank) -> Tensor:
        """Take a chunk's steps; return the terms of the loss, float32 [S, R, n_terms]."""

        def take_step(of_step: ChunkInputs) -> Tensor:
            return self._take_step(of_step, bank)

        if self._device.type == "cuda":
            if self._graph is None:
                self._graph = StepGraph(take_step)
            return self._graph.run(chunk)
        return torch.stack([take_step(ChunkInputs(*(values[s] for values in chunk))) for s in range(len(chunk.rows))])

    def load(self, run: int) -> nn.Module:
        """Return a method with the weights of one run; good until the next call."""
        state = {**self._parameters, **self._constants, **self._buffers}
        own = {name.removeprefix("method."): value[run].detach() for name, value in state.items()}
        self._loaded.load_state_dict(own)
        return self._loaded

    def keep(self, n_runs: int) -> None:
        """Go on with the first `n_runs` runs: weights, statistics and the optimiser's moments."""
        if not n_runs:
            return
        self._parameters = {k: v[:n_runs].detach().clone().requires_grad_() for k, v in self._parameters.items()}
        self._constants = {name: value[:n_runs].clone() for name, value in self._constants.items()}
        self._buffers = {name: value[:n_runs].clone() for name, value in self._buffers.items()}
        self._optimiser = self._optimiser.keep(list(self._parameters.values()), n_runs)
        self._graph = None

    def _take_step(self, of_step: ChunkInputs, bank: Bank) -> Tensor:
        """Take one step of all runs; return the terms of the loss, float32 [R, n_terms]."""
        batch = bank.gather(of_step.rows, of_step.views, of_step.clips if bank.one_clip else None)

        def compute(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: FeatureBatch, of_run: ChunkInputs
        ) -> Tensor:
            terms: Tensor = functional_call(self._template, (parameters, buffers), (batch, of_run))
            return terms

        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._schedule.precision == "bf16"):
            # The masks are drawn already; nothing inside is random.
            terms = torch.vmap(compute)({**self._parameters, **self._constants}, self._buffers, batch, of_step)
        terms.sum().backward()
        self._optimiser.step()
        return terms.detach()
