"""Checks which segments an epoch's batches hold, and how a batch is cut without changing its mean."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echoshift.train.loop import PlannedBatch, plan_epoch
from echoshift.train.stage1.config import TrainingConfig

SIZES = st.integers(min_value=1, max_value=40)
BATCHES = st.integers(min_value=1, max_value=9)


def plan(n_source: int, n_labelled: int, n_target: int, epoch: int, n: int = 4, seed: int = 0) -> list[PlannedBatch]:
    config = TrainingConfig(n_source=n, n_labelled=n, n_target=n)
    return plan_epoch(n_source, n_labelled, n_target, config, seed=seed, epoch=epoch)


def to_lists(batches: list[PlannedBatch]) -> list[list[list[int]]]:
    return [[rows.tolist() for rows in batch.rows] for batch in batches]


@settings(max_examples=50, deadline=None)
@given(n_source=SIZES, n_target=SIZES, n=BATCHES, epoch=st.integers(0, 5))
def test_an_epoch_shows_a_source_segment_at_most_once(n_source, n_target, n, epoch):
    batches = plan(n_source, 0, n_target, epoch, n)
    shown = np.concatenate([batch.source for batch in batches])
    assert len(set(shown.tolist())) == len(shown) == n_source - n_source % min(n, n_source)
    assert {len(batch.source) for batch in batches} == {min(n, n_source)}
    assert {len(batch.target) for batch in batches} == {min(n, n_target)}
    assert all(len(batch.labelled) == 0 for batch in batches)
    assert set(shown.tolist()) <= set(range(n_source))


@settings(max_examples=50, deadline=None)
@given(n_source=SIZES, n_labelled=SIZES, n_target=SIZES, n=BATCHES, n_epochs=st.integers(1, 6))
def test_the_target_is_seen_equally_often_after_any_number_of_epochs(n_source, n_labelled, n_target, n, n_epochs):
    batches = [batch for epoch in range(n_epochs) for batch in plan(n_source, n_labelled, n_target, epoch, n)]
    for n_rows, groups in ((n_target, [b.target for b in batches]), (n_labelled, [b.labelled for b in batches])):
        seen = Counter(np.concatenate(groups).tolist())
        counts = [seen[i] for i in range(n_rows)]
        assert max(counts) - min(counts) <= 1


def test_every_source_segment_has_its_turn():
    seen = Counter(int(i) for epoch in range(30) for batch in plan(7, 0, 3, epoch) for i in batch.source)
    assert set(seen) == set(range(7))


def test_an_epoch_depends_on_seed_and_number_alone():
    alone = to_lists(plan(11, 3, 6, epoch=4))
    for epoch in range(4):
        plan(11, 3, 6, epoch)
    assert to_lists(plan(11, 3, 6, epoch=4)) == alone
    assert to_lists(plan(11, 3, 6, epoch=5)) != alone
    assert to_lists(plan(11, 3, 6, epoch=4, seed=1)) != alone


@settings(max_examples=80, deadline=None)
@given(n_source=SIZES, n_labelled=st.integers(0, 9), n_target=st.integers(0, 40), n=BATCHES, n_parts=BATCHES)
def test_parts_and_shares_of_processes_cut_a_batch_without_rest(n_source, n_labelled, n_target, n, n_parts):
    for batch in plan(n_source, n_labelled, n_target, 0, n):
        parts = batch.split(n_parts)
        assert all(len(part.source) for part in parts)
        ranks = [batch.take_share(rank, n_parts) for rank in range(n_parts)]
        for cut, total in ((parts, 1.0), (ranks, float(n_parts))):
            for i, rows in enumerate(batch.rows):
                found = np.concatenate([part.rows[i] for part in cut])
                assert sorted(found.tolist()) == sorted(rows.tolist())
                if len(rows):
                    assert sum(part.shares[i] for part in cut) == pytest.approx(total)


@settings(max_examples=80, deadline=None)
@given(sizes=st.tuples(st.integers(4, 9), st.integers(0, 9), st.integers(1, 9)), n_ranks=st.integers(1, 4))
def test_shared_and_cut_means_add_up_to_the_mean_of_the_batch(sizes, n_ranks):
    values = np.random.default_rng(0).random(10)
    batch = PlannedBatch(*(np.arange(size) for size in sizes))
    for i, rows in enumerate(batch.rows):
        total = 0.0
        for rank in range(n_ranks):
            for part in batch.take_share(rank, n_ranks).split(2):
                if len(part.rows[i]):
                    total += part.shares[i] * values[part.rows[i]].mean() / n_ranks
        if len(rows):
            assert total == pytest.approx(values[rows].mean())
