"""Trains on the simulated GPU, stacked and by replayed graphs, and compares with the CPU, number for number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import alignment_batches as alignment
import numpy as np
import pytest
import torch
import toy_method as toy
from simulated_cuda import simulate_gpu
from simulated_graphs import SimulatedGraph

from echoshift.train.alignment.config import METHOD_NAMES
from echoshift.train.alignment.two_streams import StreamShapes
from echoshift.train.cached.training import TrainedRun, TrainingJob, train_jobs
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import FeatureShapes, build_recogniser
from echoshift.train.watching import SilentWatcher

N_STEPS = 6  # three as they are written, one captured and replayed, two replayed
BY_DEFAULT = ("rna_grl", "adabn")
EVERY_METHOD = [m if m in BY_DEFAULT else pytest.param(m, marks=pytest.mark.slow) for m in METHOD_NAMES]


def train(jobs: Sequence[TrainingJob], device: str, stack: int = 1) -> list[TrainedRun]:
    return train_jobs(list(jobs), torch.device(device), SilentWatcher(), stack=stack)


def compare(jobs: Sequence[TrainingJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train jobs on a CPU one after the other, and on the simulated GPU as one stack; both come to the same."""
    graphs: list[SimulatedGraph] = []

    class Counted(SimulatedGraph):
        def __init__(self) -> None:
            super().__init__()
            graphs.append(self)

    alone = [run for job in jobs for run in train([job], "cpu")]
    with simulate_gpu():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
        stacked = train(jobs, "cuda", stack=0)
    assert [graph.n_replays for graph in graphs] == [N_STEPS - 3], "the steps weren't replayed from one graph"
    for one, other in zip(alone, stacked, strict=True):
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5, atol=1e-5)
        for name, values in one.predictions.items():
            np.testing.assert_allclose(other.predictions[name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("same_draws")
def test_three_stacked_runs_come_to_what_each_comes_to_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compare([toy.make_job(seed, N_STEPS) for seed in range(3)], monkeypatch)


def test_a_gpus_own_numbers_for_dropout_are_the_runs_own() -> None:
    with simulate_gpu():
        together = train([toy.make_job(seed, N_STEPS) for seed in range(2)], "cuda", stack=0)
        [alone] = train([toy.make_job(1, N_STEPS)], "cuda")
    np.testing.assert_allclose(together[1].losses, alone.losses, atol=1e-5)


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_methods_of_alignment(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = StreamShapes({"pooled": (toy.N_VISUAL,)}, toy.N_AUDIO)

    def make_job(seed: int) -> Any:
        job = toy.make_job(seed, N_STEPS, lr=1e-3)
        return replace(job, build=lambda: alignment.build(method, seed, shapes), signature=method)

    compare([make_job(seed) for seed in range(2)], monkeypatch)


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize(
    "recogniser",
    [
        pytest.param(
            {"class_token": "learnable", "audio_tokens": True, "domain_embedding": "none"}, marks=pytest.mark.slow
        ),
        pytest.param({"class_token": "h", "domain_embedding": "shared"}, marks=pytest.mark.slow),
        {},
    ],
    ids=("z^m", "z'", "z"),
)
def test_recognisers(recogniser: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"width": 8, "n_heads": 2, "head_width": 4, "mlp_width": 8, "visual_width": 4}
    config = Stage2Config.model_validate({"recogniser": {**small, **recogniser}})
    shapes = FeatureShapes({"pooled": (toy.N_VISUAL,)}, toy.N_AUDIO, toy.N_CLASSES, False)

    def make_job(seed: int) -> Any:
        job = toy.make_job(seed, N_STEPS, lr=1e-3)
        labelled = replace(job.data, pseudo_labels=np.arange(12) % toy.N_CLASSES)
        mean_audio = torch.linspace(-1, 1, toy.N_AUDIO)
        return replace(
            job, data=labelled, build=lambda: build_recogniser(config, shapes, mean_audio, seed), signature="recogniser"
        )

    compare([make_job(seed) for seed in range(2)], monkeypatch)
