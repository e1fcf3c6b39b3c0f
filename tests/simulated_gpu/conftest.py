"""Has runs on the simulated GPU draw the numbers that a CPU draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the GPU's runs draw the numbers for dropout that a CPU's runs draw."""
    from echoshift.train.cached import run_steps

    def fill(generator: run_steps._Generator, numbers: torch.Tensor) -> None:
        drawn = torch.empty(numbers.shape)
        generator._numpy.random(dtype=np.float32, out=drawn.numpy())
        numbers.copy_(drawn)

    monkeypatch.setattr(run_steps._Generator, "fill", fill)
