"""What each step of a run sees, and the numbers for its dropout."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import torch

from echoshift.train.cached.feature_bank import FeatureBank
from echoshift.train.cached.run_steps import ChunkInputs, RunSteps, StepSource
from echoshift.train.cached.training import TrainingJob

CPU = torch.device("cpu")
DRAWS = 4
N_DRAWS = 5  # odd, so that a generator that makes two numbers at a time has one over


def make_source(*jobs: TrainingJob) -> StepSource:
    bank = FeatureBank([job.data.train for job in jobs], CPU)
    source = StepSource(bank, [RunSteps(job.data, job.schedule, job.seed) for job in jobs], CPU)
    source.n_draws = N_DRAWS
    return source


def copy(chunk: ChunkInputs) -> list[np.ndarray]:
    return [values.numpy().copy() for values in chunk]  # the numbers' memory is taken again


def test_an_epoch_has_no_segment_of_the_source_twice_and_its_label_beside_it(toy: ModuleType) -> None:
    data = toy.make_job(1).data
    steps = RunSteps(data, toy.make_job(1).schedule, 1)
    assert steps.n_per_epoch == 4
    for _ in range(3):
        planned = steps.take(4)
        rows = planned.rows[:, :4]
        assert len(np.unique(rows)) == 16 and set(rows.ravel()) <= set(range(18))
        np.testing.assert_array_equal(planned.source_labels, data.source_labels[rows])


def test_the_target_is_seen_equally_often(toy: ModuleType) -> None:
    job = toy.make_job(2)
    rows = RunSteps(job.data, job.schedule, 2).take(20).rows[:, 4:]  # 60 places for 12 segments, over five epochs
    np.testing.assert_array_equal(np.bincount(rows.ravel())[18:], np.full(12, 5))


def test_steps_are_the_same_in_whatever_chunks_they_are_taken(toy: ModuleType) -> None:
    job = toy.make_job(3, 14)
    whole = copy(make_source(job).take(0, 14, 1))
    source, parts = make_source(job), []
    for start, stop in ((0, 1), (1, 6), (6, 14)):
        parts.append(copy(source.take(start, stop, 1)))
    for one, cut in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(cut))


def test_a_run_draws_the_same_numbers_alone_and_beside_others(toy: ModuleType) -> None:
    jobs = [toy.make_job(seed, 6) for seed in (4, 5)]
    stacked = copy(make_source(*jobs).take(0, 6, 2))
    expected = np.stack(
        [np.random.default_rng([job.seed, DRAWS]).random((6, N_DRAWS), dtype=np.float32) for job in jobs],
        axis=1,
    )
    np.testing.assert_array_equal(stacked[7], expected)
    alone = copy(make_source(jobs[1]).take(0, 6, 1))
    np.testing.assert_array_equal(alone[7][:, 0], stacked[7][:, 1])
    # The second run's rows lie after the first one's 30.
    np.testing.assert_array_equal(alone[0][:, 0] + 30, stacked[0][:, 1])


def test_single_clips_are_drawn_anew_from_all_there_are(toy: ModuleType) -> None:
    job = toy.make_job(6)
    planned = RunSteps(replace(job.data, one_clip=True), job.schedule, 6).take(40)
    assert set(planned.clips.ravel()) == set(range(toy.N_CLIPS))
    assert not RunSteps(job.data, job.schedule, 6).take(40).clips.any()
