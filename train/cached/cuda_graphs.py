"""Captures a step of training in a CUDA graph, so that it is launched at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echoshift.train.cached.run_steps import ChunkInputs

_N_EAGER_STEPS = 3  # torch's documentation warms up as many before it captures


class StepGraph:
    """Takes steps of training: the first as they are written, on a side stream, the rest by replaying a graph.

    The first steps are steps of the training like any others; capturing runs nothing.
    """

    def __init__(self, take_step: Callable[[ChunkInputs], Tensor]) -> None:
        self._take_step = take_step
        self._stream = torch.cuda.Stream()
        self._n_taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: ChunkInputs | None = None
        self._terms: Tensor | None = None

    def run(self, chunk: ChunkInputs) -> Tensor:
        """Take a chunk's steps; return the terms of the loss, float32 [S, R, n_terms]."""
        found = []
        for step in range(len(chunk.rows)):
            of_step = ChunkInputs(*(values[step] for values in chunk))
            found.append(self._take(of_step))
        return torch.stack(found)

    def _take(self, of_step: ChunkInputs) -> Tensor:
        if self._n_taken < _N_EAGER_STEPS:
            self._n_taken += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                terms = self._take_step(of_step)
            torch.cuda.current_stream().wait_stream(self._stream)
            return terms.clone()
        if self._graph is None:
            self._inputs = ChunkInputs(*(values.clone() for values in of_step))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._terms = self._take_step(self._inputs)
            self._graph = graph
        assert self._inputs is not None and self._terms is not None
        for kept, values in zip(self._inputs, of_step, strict=True):
            kept.copy_(values)
        self._graph.replay()
        return self._terms.clone()
