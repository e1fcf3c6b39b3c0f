"""The loop over cached features, against a loop written out here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toy_method as toy

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


def train_by_hand(job: TrainingJob) -> tuple[list[list[float]], Any]:
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
def test_a_run_is_that_of_a_loop_by_hand(schedule):
    job = toy.make_job(3, 10, **schedule)
    run = train(job)
    losses, method = train_by_hand(job)
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


def test_the_same_job_twice_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (
        train(toy.make_job(4)),
        train(toy.make_job(4)),
        train(replace(toy.make_job(4), seed=5)),
    )
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert not torch.equal(first.state["linear.weight"], other.state["linear.weight"])


def test_snapshots_change_nothing_of_the_run_and_are_its_weights_at_that_step():
    plain, snapped = train(toy.make_job(6, 12)), train(toy.make_job(6, 12, snapshots=(1, 5)))
    assert all(torch.equal(plain.state[name], snapped.state[name]) for name in plain.state)
    # The loss' second term grows with the progress, so a shorter run is another run; its first step is the same.
    short = train(toy.make_job(6, 1))
    assert all(torch.equal(snapped.snapshots[0][name], short.state[name]) for name in short.state)
    assert len(snapped.snapshots) == 2


def test_a_run_without_a_target_trains_on_the_source():
    job = toy.make_job(7, 6)
    empty = np.zeros(0, dtype=np.int64)
    job = replace(job, data=replace(job.data, target=empty, pseudo_labels=empty))
    run = train(job)
    assert (run.losses[:, 1] == 0).all() and (run.losses[:, 0] > 0).all()


def test_a_loss_that_is_no_number_names_the_run():
    job = toy.make_job(8, 6, lr=1e30)
    rows = job.data.train
    rows.audio[:] = 1e30
    with pytest.raises(RunError, match=r"toy 8: the loss is no number any more .* lower schedule.lr"):
        train(job)


def test_single_clips_are_drawn_from_all_there_are():
    job = toy.make_job(6, 40, rows=toy.make_rows(30, 6, n_views=1))
    steps = iterate_steps(replace(job.data, one_clip=True), job.schedule, 6, CPU)
    seen = torch.cat([step.source.inputs.visual["pooled"] for step in steps])
    assert seen.shape[1:] == (1, toy.N_VISUAL)
    known = job.data.train.visual["pooled"][:, 0].float()
    assert all(bool((seen[:, 0, None] == known[:18, clip]).all(dim=2).any()) for clip in range(toy.N_CLIPS))


def test_a_loss_of_other_terms_than_are_named_is_refused():
    method = toy.ToyMethod(0)
    method.loss_names = ("source",)
    with pytest.raises(RunError, match=r"losses of ToyMethod are of shape \[2\], its loss_names are 1"):
        train(replace(toy.make_job(0, 3), build=lambda: method))
