"""Trains on the simulated GPU and compares with the CPU, number for number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import alignment_batches as alignment
import numpy as np
import pytest
import torch
import toy_method as toy
from simulated_cuda import simulate_gpu

from echoshift.train import loop
from echoshift.train.alignment.method import list_builtin
from echoshift.train.features import FeatureShapes
from echoshift.train.loop import TrainedRun, TrainingJob, train_run
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import build_recogniser
from echoshift.train.watching import SilentWatcher

N_STEPS = 6
BY_DEFAULT = ("rna_grl", "adabn")
EVERY_METHOD = [m if m in BY_DEFAULT else pytest.param(m, marks=pytest.mark.slow) for m in list_builtin()]


def train(job: TrainingJob, device: str) -> TrainedRun:
    return train_run(job, torch.device(device), SilentWatcher())


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the GPU's runs draw the numbers for dropout that a CPU's runs draw."""
    make_draw = loop._make_draw

    def draw_on_cpu(seed: int, device: torch.device) -> Any:
        draw = make_draw(seed, torch.device("cpu"))
        return lambda shape: draw(shape).to(device)

    monkeypatch.setattr(loop, "_make_draw", draw_on_cpu)


def compare(job: TrainingJob) -> None:
    """Train a job on a CPU and on the simulated GPU; both come to the same."""
    one = train(job, "cpu")
    with simulate_gpu():
        other = train(job, "cuda")
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5, atol=1e-5)
    for name, value in one.state.items():
        torch.testing.assert_close(other.state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("same_draws")
def test_a_run_comes_to_what_it_comes_to_on_a_cpu() -> None:
    compare(toy.make_job(0, N_STEPS))
    compare(toy.make_job(1, N_STEPS, optimiser="sgd", momentum=0.9))


def test_a_gpus_own_numbers_for_dropout_are_the_seeds() -> None:
    with simulate_gpu():
        first, again = (train(toy.make_job(1, N_STEPS), "cuda") for _ in range(2))
    np.testing.assert_array_equal(first.losses, again.losses)


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_methods_of_alignment(method: str) -> None:
    shapes = FeatureShapes({"pooled": (toy.N_VISUAL,)}, toy.N_AUDIO)
    compare(replace(toy.make_job(0, N_STEPS, lr=1e-3), build=lambda: alignment.build(method, 0, shapes)))


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
def test_recognisers(recogniser: dict[str, Any]) -> None:
    small = {"width": 8, "n_heads": 2, "head_width": 4, "mlp_width": 8, "visual_width": 4}
    config = Stage2Config.model_validate({"recogniser": {**small, **recogniser}})
    shapes = FeatureShapes({"pooled": (toy.N_VISUAL,)}, toy.N_AUDIO)
    mean_audio = torch.linspace(-1, 1, toy.N_AUDIO)
    job = toy.make_job(0, N_STEPS, lr=1e-3)
    labelled = replace(job.data, pseudo_labels=np.arange(12) % toy.N_CLASSES)
    build = lambda: build_recogniser(config, shapes, toy.N_CLASSES, mean_audio, 0)  # noqa: E731
    compare(replace(job, data=labelled, build=build))
