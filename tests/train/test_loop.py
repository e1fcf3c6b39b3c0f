"""The loop over cached features, against a loop written out here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from echoshift.pipeline.errors import RunError
from echoshift.train.features import FeatureBatch
from echoshift.train.loop import (
    Dropouts,
    SourceFeatures,
    StepInputs,
    TargetFeatures,
    TrainedRun,
    TrainingJob,
    iterate_steps,
    plan_epoch,
    predict_rows,
    train_run,
)
from echoshift.train.watching import SilentWatcher

CPU = torch.device("cpu")
DRAWS, VIEWS = 4, 3


def train(job: TrainingJob) -> TrainedRun:
    return train_run(job, CPU, SilentWatcher())


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
            draw = lambda shape: torch.from_numpy(generator.random(shape, dtype=np.float32))  # noqa: E731
            terms = method.losses(step, Dropouts(draw))
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
    run = train(job)
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
    found = predict_rows(method, rows, np.arange(18, 30), "target", CPU)
    np.testing.assert_allclose(found, torch.stack(views).mean(0).numpy(), atol=1e-5)


def test_the_same_job_twice_gives_the_same_bytes_and_another_seed_others(toy: ModuleType) -> None:
    first, again, other = (
        train(toy.make_job(4)),
        train(toy.make_job(4)),
        train(replace(toy.make_job(4), seed=5)),
    )
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert not torch.equal(first.state["linear.weight"], other.state["linear.weight"])


def test_snapshots_change_nothing_of_the_run_and_are_its_weights_at_that_step(toy: ModuleType) -> None:
    plain, snapped = train(toy.make_job(6, 12)), train(toy.make_job(6, 12, snapshots=(1, 5)))
    assert all(torch.equal(plain.state[name], snapped.state[name]) for name in plain.state)
    # The loss' second term grows with the progress, so a shorter run is another run; its first step is the same.
    short = train(toy.make_job(6, 1))
    assert all(torch.equal(snapped.snapshots[0][name], short.state[name]) for name in short.state)
    assert len(snapped.snapshots) == 2


def test_a_run_without_a_target_trains_on_the_source(toy: ModuleType) -> None:
    job = toy.make_job(7, 6)
    empty = np.zeros(0, dtype=np.int64)
    job = replace(job, data=replace(job.data, target=empty, pseudo_labels=empty))
    run = train(job)
    assert (run.losses[:, 1] == 0).all() and (run.losses[:, 0] > 0).all()


def test_a_loss_that_is_no_number_names_the_run(toy: ModuleType) -> None:
    job = toy.make_job(8, 6, lr=1e30)
    rows = job.data.train
    rows.audio[:] = 1e30
    with pytest.raises(RunError, match=r"toy 8: the loss is no number any more .* lower schedule.lr"):
        train(job)


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
    run = train_run(toy.make_job(3, n_steps=1), CPU, told)
    assert told.said == [("toy 3: training", 1), (1, f"loss {run.losses[0].sum():.3f}")]


def list_rows(job: TrainingJob) -> np.ndarray:
    """List the rows that each step sees, told by their audio features."""
    seen = []
    for step in iterate_steps(job.data, job.schedule, job.seed, CPU):
        assert step.target is not None
        audio = torch.cat([step.source.inputs.audio, step.target.inputs.audio])
        seen.append((audio[:, None] == job.data.train.audio[None]).all(dim=2).long().argmax(dim=1).numpy())
    return np.stack(seen)


def test_an_epoch_has_no_segment_of_the_source_twice_and_its_label_beside_it(toy: ModuleType) -> None:
    job = toy.make_job(1, 12)
    rows = list_rows(job)[:, :4]
    for epoch in np.split(rows, 3):
        assert len(np.unique(epoch)) == 16 and set(epoch.ravel()) <= set(range(18))
    labels = [step.source.labels.numpy() for step in iterate_steps(job.data, job.schedule, job.seed, CPU)]
    np.testing.assert_array_equal(labels, job.data.source_labels[rows])


def test_the_target_is_seen_equally_often(toy: ModuleType) -> None:
    rows = list_rows(toy.make_job(2, 20))[:, 4:]  # 60 places for 12 segments, over five epochs
    np.testing.assert_array_equal(np.bincount(rows.ravel())[18:], np.full(12, 5))


def test_single_clips_are_drawn_from_all_there_are(toy: ModuleType) -> None:
    job = toy.make_job(6, 40, rows=toy.make_rows(30, 6, n_views=1))
    steps = iterate_steps(replace(job.data, one_clip=True), job.schedule, 6, CPU)
    seen = torch.cat([step.source.inputs.visual["pooled"] for step in steps])
    assert seen.shape[1:] == (1, toy.N_VISUAL)
    known = job.data.train.visual["pooled"][:, 0].float()
    assert all(bool((seen[:, 0, None] == known[:18, clip]).all(dim=2).any()) for clip in range(toy.N_CLIPS))


def test_a_loss_of_other_terms_than_are_named_is_refused(toy: ModuleType) -> None:
    method = toy.ToyMethod(0)
    method.loss_names = ("source",)
    with pytest.raises(RunError, match=r"losses of ToyMethod are of shape \[2\], its loss_names are 1"):
        train(replace(toy.make_job(0, 3), build=lambda: method))
