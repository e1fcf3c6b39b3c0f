"""Checks that the simulated GPU refuses what a GPU refuses, so that tests on it can fail."""

from __future__ import annotations

import pytest
import torch
from simulated_cuda import simulate_gpu
from torch import nn


def test_operands_on_two_devices_are_refused_and_scalars_and_indices_of_the_cpu_are_not() -> None:
    with simulate_gpu():
        on_gpu, on_cpu = torch.arange(4.0, device="cuda"), torch.ones(4)
        assert str(on_gpu.device) == "cuda:0" and on_gpu.is_cuda
        with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
            _ = on_gpu + on_cpu
        with pytest.raises(RuntimeError, match="found at least two devices"):
            nn.Linear(4, 2)(on_gpu)
        with pytest.raises(RuntimeError, match="found at least two devices"):
            torch.stack([on_gpu[0], on_cpu[0]])
        assert (on_gpu + on_cpu[0])[torch.tensor([2, 0])].tolist() == [3, 1]
        assert on_gpu[[3, 1]].cpu().tolist() == [3, 1]


def test_memory_of_the_device_is_not_numpys_and_a_cpu_generator_draws_nothing_there() -> None:
    with simulate_gpu():
        on_gpu = torch.zeros(3, device="cuda")
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            on_gpu.numpy()
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        drawn = torch.rand(3, device="cuda", generator=torch.Generator(device="cuda"))
        assert 0 <= drawn.min().item() <= drawn.max().item() < 1


def test_a_copy_that_does_not_block_is_not_there_before_it_is_waited_for() -> None:
    with simulate_gpu():
        target = torch.empty(2, pin_memory=True).copy_(torch.ones(2, device="cuda"), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        assert target.isnan().all()
        event.synchronize()
        assert target.tolist() == [1, 1]
