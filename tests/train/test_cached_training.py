"""The loop over cached features, against a loop written out here, alone and in stacks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from echoshift.pipeline.errors import RunError
from echoshift.train.cached.batches import Dropouts, FeatureBatch, SourceFeatures, StepInputs, TargetFeatures
from echoshift.train.cached.training import TrainedRun, TrainingJob, train_jobs
from echoshift.train.epoch_plan import plan_epoch
from echoshift.train.watching import SilentWatcher

CPU = torch.device("cpu")
DRAWS, VIEWS = 4, 3


def train(*jobs: TrainingJob, stack: int = 1) -> list[TrainedRun]:
    return train_jobs(jobs, CPU, SilentWatcher(), stack=stack)


def train_by_hand(toy: ModuleType, job: TrainingJob) -> tuple[list[list[float]], Any]:
    """Train with torch.optim and plain indexing."""
    method, data, schedule = toy.ToyMethod(job.seed).train(), job.data, job.schedule
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimiser: torch.optim.Optimizer
    if schedule.optimiser == "adam":
        optimiser = torch.optim.Adam(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    else:
        optimiser = torch.optim.SGD(
            parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, momentum=schedule.momentum
        )
    generator = np.random.default_rng([job.seed, DRAWS])
    losses: list[list[float]] = []
    epoch = 0
    while len(losses) < schedule.n_steps:
        batches = plan_epoch(18, 0, 12, schedule, seed=job.seed, epoch=epoch)
        views = np.random.default_rng([job.seed, epoch, VIEWS]).integers(0, data.train.n_views, (len(batches), 7))
        for batch, view in zip(batches, views, strict=True):
            if len(losses) == schedule.n_steps:
                break
            for start, lr in schedule.lr_drops:
                if len(losses) == start:
                    optimiser.param_groups[0]["lr"] = lr

            def look_up(rows: np.ndarray, view: np.ndarray) -> FeatureBatch:
                visual = data.train.visual["pooled"][rows, view].float()
                return FeatureBatch({"pooled": visual}, data.train.audio[rows], data.train.has_audio[rows])

            source, target = data.source[batch.source], data.target[batch.target]
            step = StepInputs(
                SourceFeatures(
                    look_up(source, view[:4]), torch.from_numpy(data.source_labels[batch.source]), torch.zeros(4)
                ),
                TargetFeatures(look_up(target, view[4:]), torch.full((3,), -1)),
                None,
                torch.tensor(len(losses) / schedule.n_steps),
            )
            draws = torch.from_numpy(generator.random(9 * 7, dtype=np.float32))
            terms = method.losses(step, Dropouts(draws))
            optimiser.zero_grad()
            terms.sum().backward()
            optimiser.step()
            losses.append(terms.tolist())
        epoch += 1
    return losses, method.eval()


@pytest.mark.parametrize(
    "schedule",
    [{}, {"optimiser": "sgd", "momentum": 0.9}, {"lr_drops": ((5, 1e-3),)}],
    ids=["adam", "sgd", "a drop of the learning rate"],
)
def test_a_run_is_that_of_a_loop_by_hand(toy: ModuleType, schedule: dict[str, object]) -> None:
    job = toy.make_job(3, 10, **schedule)
    [run] = train(job)
    losses, method = train_by_hand(toy, job)
    # 18 // 4 steps an epoch; what is left counts as one.
    expected = [np.mean(losses[:4], axis=0), np.mean(losses[4:8], axis=0), np.mean(losses[8:], axis=0)]
    np.testing.assert_allclose(run.losses, expected, rtol=1e-4)
    for name, value in method.state_dict().items():
        torch.testing.assert_close(run.state[name], value, rtol=1e-4, atol=1e-6)
    assert run.loss_names == ("source", "target")
    rows = job.data.train
    with torch.no_grad():
        views = [
            method.predict(
                FeatureBatch({"pooled": rows.visual["pooled"][18:, v].float()}, rows.audio[18:], rows.has_audio[18:]),
                "target",
            )
            for v in range(2)
        ]
    np.testing.assert_allclose(run.predictions["target_test"], torch.stack(views).mean(0).numpy()[None], atol=1e-5)


def test_runs_of_other_seeds_lengths_and_data_come_to_the_same_alone_and_stacked(toy: ModuleType) -> None:
    jobs = [toy.make_job(0, 9), toy.make_job(1, 14, snapshots=(4, 9)), toy.make_job(2, 14)]
    alone = [train(job)[0] for job in jobs]
    for stack in (0, 2):
        for one, other in zip(alone, train(*jobs, stack=stack), strict=True):
            np.testing.assert_allclose(other.losses, one.losses, atol=1e-4)
            assert set(other.state) == set(one.state)
            for name, value in one.state.items():
                torch.testing.assert_close(other.state[name], value, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(other.predictions["target_test"], one.predictions["target_test"], atol=1e-4)
    assert [run.predictions["target_test"].shape for run in alone] == [
        (1, 12, toy.N_CLASSES), (3, 12, toy.N_CLASSES), (1, 12, toy.N_CLASSES)
    ]  # fmt: skip


def test_the_same_job_twice_gives_the_same_bytes_and_another_seed_others(toy: ModuleType) -> None:
    first, again, other = (
        train(toy.make_job(4))[0],
        train(toy.make_job(4))[0],
        train(replace(toy.make_job(4), seed=5))[0],
    )
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert not torch.equal(first.state["linear.weight"], other.state["linear.weight"])


def test_snapshots_change_nothing_of_the_run_and_predict_what_a_shorter_run_does(toy: ModuleType) -> None:
    plain, snapped = train(toy.make_job(6, 12))[0], train(toy.make_job(6, 12, snapshots=(5,)))[0]
    assert all(torch.equal(plain.state[name], snapped.state[name]) for name in plain.state)
    rows = toy.make_rows(30, 6)
    # The loss' second term grows with the progress, so a shorter run is another run; its first step is the same.
    short = train(toy.make_job(6, 12, rows=rows, snapshots=(5, 12)))[0]
    np.testing.assert_array_equal(short.predictions["target_test"][-1], plain.predictions["target_test"][-1])
    np.testing.assert_array_equal(short.predictions["target_test"][0], snapped.predictions["target_test"][0])


def test_a_run_without_a_target_trains_on_the_source(toy: ModuleType) -> None:
    job = toy.make_job(7, 6)
    empty = np.zeros(0, dtype=np.int64)
    job = replace(job, data=replace(job.data, target=empty, pseudo_labels=empty))
    [run] = train(job)
    assert (run.losses[:, 1] == 0).all() and (run.losses[:, 0] > 0).all()


def test_a_loss_that_is_no_number_names_the_run(toy: ModuleType) -> None:
    job = toy.make_job(8, 6, lr=1e30)
    rows = job.data.train
    rows.audio[:] = 1e30
    with pytest.raises(RunError, match=r"toy 8: the loss is no number any more .* lower schedule.lr"):
        train(job)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_comes_to_what_the_cpu_comes_to_without_dropout(toy: ModuleType) -> None:
    cuda = torch.device("cuda")
    jobs = [toy.make_job(seed, 12) for seed in range(3)]
    stacked = train_jobs(jobs, cuda, SilentWatcher(), stack=0)
    alone = [train_jobs([job], cuda, SilentWatcher())[0] for job in jobs]
    for one, other in zip(alone, stacked, strict=True):
        np.testing.assert_allclose(other.losses, one.losses, atol=1e-4)


@dataclass
class Told:
    """Keeps what a watcher is told."""

    said: list[tuple[Any, ...]] = field(default_factory=list)

    def start(self, what: str, n_total: int) -> None:
        self.said.append((what, n_total))

    def advance(self, n: int = 1, note: str = "") -> None:
        self.said.append((n, note))

    def describe(self, what: str) -> None:
        raise AssertionError(f"the title is taken away by {what!r}")


def test_the_loss_is_told_beside_the_steps_of_a_run_that_is_named(toy: ModuleType) -> None:
    told = Told()
    [run] = train_jobs([toy.make_job(3, n_steps=1)], CPU, told)
    assert told.said == [("toy 3: training", 1), (1, f"loss {run.losses[0].sum():.3f}")]
    told = Told()
    runs = train_jobs([toy.make_job(3, n_steps=1), toy.make_job(4, n_steps=1)], CPU, told, stack=2)
    mean = np.mean([run.losses[0].sum() for run in runs])
    assert told.said == [("toy 3 and 1 more run: training", 2), (2, f"mean loss {mean:.3f}")]
    told = Told()
    assert train_jobs([], CPU, told) == [] and told.said == [("training", 0)]
