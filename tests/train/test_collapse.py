"""Trainings that come to nothing: when a step of RNA is too long, how dead units are measured, what is said."""

from __future__ import annotations

from typing import Any

import alignment_batches as alignment
import numpy as np
import pytest
import torch
from scipy import stats

from echoshift.train.alignment.config import AlignmentConfig, AlignmentScheduleConfig, AlignmentStageConfig
from echoshift.train.alignment.method import build_method
from echoshift.train.alignment.run import (
    compute_guessing_loss,
    describe_collapse,
    measure_dead_units,
    plan_schedule,
)
from echoshift.train.features import FeatureRows
from echoshift.train.loop import TrainedRun, TrainingData, TrainingJob, train_run
from echoshift.train.watching import SilentWatcher


def make_rows(n: int, n_visual: int, n_audio: int, scale: float, n_clips: int = 2) -> FeatureRows:
    """Make features of which those of frames are `scale` times as long as those of audio; every fifth is silent."""
    rng = np.random.default_rng(0)
    has_audio = torch.from_numpy(np.arange(n) % 5 != 0)
    visual = scale * np.abs(rng.standard_normal((n, 1, n_clips, n_visual))) / n_visual**0.5
    audio = np.abs(rng.standard_normal((n, n_audio))) / n_audio**0.5
    return FeatureRows(
        tuple(f"s{i}" for i in range(n)),
        {"pooled": torch.from_numpy(visual.astype(np.float32))},
        torch.from_numpy(audio.astype(np.float32)) * has_audio[:, None],
        has_audio,
    )


def test_units_that_no_segment_moves_are_counted():
    rows = make_rows(40, alignment.N_VISUAL, alignment.N_AUDIO, 1.0)
    method: Any = alignment.build("rna")
    with torch.no_grad():
        method.streams.project_visual.bias[:6] = -100.0
        method.streams.project_audio.bias[:] = -100.0
    index = np.arange(40)
    shares = measure_dead_units(method, rows, index, one_clip=True)
    with torch.no_grad():
        layer = method.streams.project_visual
        values = np.maximum(rows.visual["pooled"].numpy() @ layer.weight.numpy().T + layer.bias.numpy(), 0)
    flat = values.reshape(-1, alignment.WIDTH)
    assert shares["frames"] == pytest.approx((flat.min(axis=0) == flat.max(axis=0)).mean())
    assert shares["audio"] == 1.0
    assert measure_dead_units(torch.nn.Linear(2, 2), rows, index, one_clip=True) == {}


def test_a_silent_source_and_a_missing_stream_are_not_measured():
    rows = make_rows(6, alignment.N_VISUAL, alignment.N_AUDIO, 1.0).without_sound()
    assert set(measure_dead_units(alignment.build("rna"), rows, np.arange(6), one_clip=False)) == {"frames"}
    alone = alignment.build("source_only", network={"modalities": "visual"})
    heard = make_rows(6, alignment.N_VISUAL, alignment.N_AUDIO, 1.0)
    assert set(measure_dead_units(alone, heard, np.arange(6), one_clip=False)) == {"frames"}


def make_run(class_loss: float) -> TrainedRun:
    """Make a run whose last epoch had a class loss."""
    return TrainedRun({}, ("class", "RNA"), np.array([[0.1, 0.0], [class_loss, 0.0]], np.float32))


def test_the_lines_name_what_failed_and_the_settings():
    config = AlignmentStageConfig(alignment=AlignmentConfig(method="rna"))
    labels = np.array([0, 0, 1, 2])
    [line] = describe_collapse(make_run(1.0), {"frames": 0.995, "audio": 0.98}, labels, config)
    assert line == (
        "training has left 99.5% of the units of frames the same for every segment; where that isn't what the method "
        "is for, lower iterations.lr (0.01) or alignment.rna.weight (1)"
    )
    assert describe_collapse(make_run(1.0), {"frames": 0.98, "audio": 0.0}, labels, config) == ()
    alone = AlignmentStageConfig(alignment=AlignmentConfig(method="source_only"))
    first, second = describe_collapse(make_run(1.05), {"frames": 1.0, "audio": 1.0}, labels, alone)
    assert "100.0% of the units of frames and 100.0% of the units of audio" in first
    assert first.endswith("lower iterations.lr (0.01)")
    # The entropy of 1/2, 1/4, 1/4 is 1.5 ln 2 = 1.04.
    assert second == (
        "no class was learned: at the end the source's class loss is 1.05, that of guessing 1.04; lower iterations.lr "
        "(0.01), or, where it has hardly begun, raise iterations.n_steps (9000)"
    )


def test_the_class_loss_is_judged_without_its_weight():
    config = AlignmentStageConfig(alignment=AlignmentConfig(method="source_only", class_weight=0.2))
    labels = np.array([0, 0, 1, 2])
    assert describe_collapse(make_run(0.2 * 1.0), {}, labels, config) == ()
    assert "class loss is 1.10" in describe_collapse(make_run(0.2 * 1.1), {}, labels, config)[0]


def test_who_guesses_loses_the_entropy_of_the_classes():
    labels = np.array([0, 3, 3, 1, 3])
    assert compute_guessing_loss(labels) == pytest.approx(stats.entropy([1, 1, 0, 3]))
    several = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]], np.float32)
    of_class = [stats.entropy([3, 1]), stats.entropy([1, 3]), 0.0]
    assert compute_guessing_loss(several) == pytest.approx(np.mean(of_class))


@pytest.mark.parametrize(("weight", "is_killed"), [(1.0, True), (0.001, False)])
def test_rna_kills_long_features_with_weight_1_and_not_with_less(weight, is_killed):
    """The features of frames are 40 long, those of audio 1; 20 steps of the paper's rate."""
    rows = make_rows(32, 16, 16, 40.0)
    config = AlignmentConfig.model_validate({"method": "rna", "network": {"width": 32}, "rna": {"weight": weight}})
    schedule = AlignmentScheduleConfig(n_steps=20, n_batch=16, n_checkpoints=1)
    empty = np.zeros(0, dtype=np.int64)
    labels = np.arange(32) % 2
    data = TrainingData(rows, np.arange(32), labels, np.zeros(32, np.int64), empty, empty, empty, empty, one_clip=True)
    job = TrainingJob(
        title="long frames",
        build=lambda: build_method(config, rows.describe_shapes(), 2, 0),
        data=data,
        schedule=plan_schedule(schedule, has_target=False),
        seed=0,
    )
    run = train_run(job, torch.device("cpu"), SilentWatcher())
    method = job.build()
    method.load_state_dict(run.state)
    share = measure_dead_units(method, rows, np.arange(32), one_clip=True)["frames"]
    assert (share > 0.8) == is_killed
