"""Checks absent-activity marks and their loss against cases worked by hand, and the loss at p = 0 and 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echoshift.pipeline.errors import SpecError
from echoshift.train.stage1.losses import (
    compute_absent_loss,
    compute_source_loss,
    mark_absent_multi,
    mark_absent_single,
)


def test_single_label_marks_by_hand():
    p = np.array([[0.5, 0.1, 0.3, 0.1], [np.nan] * 4, [0.25, 0.25, 0.25, 0.25], [0.0, 0.9, 0.04, 0.06]])
    marks = mark_absent_single(p, np.array([True, False, True, True]), 2)
    assert marks.tolist() == [
        [False, True, False, True],
        [False] * 4,  # no sound says nothing
        [True, True, False, False],  # ties: the lower index
        [True, False, True, False],
    ]
    for n_absent in (0, 4):
        with pytest.raises(SpecError, match=f"absent.n_absent is {n_absent} of 4 classes.*--set absent.n_absent=1"):
            mark_absent_single(p, np.zeros(4, bool), n_absent)


def test_multi_label_marks_by_hand():
    p = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.3, 0.5], [0.6, 0.4, 0.5], [0.0, 0.0, 0.0], [0.5, 0.5, 0.1]])
    has_audio = np.array([True, True, True, True, False, True])  # 5 with sound
    # (1 - alpha) gamma n: 1 * .8 * 5 = 4; .5 * .8 * 5 = 2; .3 * .8 * 5 = 1.2, rounded down
    marks = mark_absent_multi(p, has_audio, np.array([0.0, 0.5, 0.7]), 0.8)
    assert marks.T.astype(int).tolist() == [[0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert not mark_absent_multi(p, has_audio, np.ones(3), 1.0).any()  # every source segment has the class
    assert mark_absent_multi(p, has_audio, np.zeros(3), 1.0).sum() == 15
    tenths = np.linspace(0, 1, 10)[:, None]
    assert (
        mark_absent_multi(tenths, np.ones(10, bool), np.array([0.9]), 1.0).sum() == 1
    )  # though (1 - .9) 10 < 1 in binary


def test_marks_refuse_what_makes_no_sense():
    p = np.full((2, 3), 0.3)
    with pytest.raises(SpecError, match=r"absent\.gamma is 0"):
        mark_absent_multi(p, np.ones(2, bool), np.zeros(3), 0)
    for shares in (np.zeros(2), np.array([0, 0, 30.0]), np.array([0, np.nan, 0])):
        with pytest.raises(SpecError, match="shares of 3 classes"):
            mark_absent_multi(p, np.ones(2, bool), shares, 0.5)
    p[1, 2] = np.nan
    with pytest.raises(SpecError, match="gives segment 1, which has audio, no finite probabilities"):
        mark_absent_single(p, np.ones(2, bool), 1)
    assert mark_absent_single(p, np.array([True, False]), 1).sum() == 1


def test_single_label_loss_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64)
    absent = torch.tensor([[False, True, True], [True, False, False]])
    wanted = -(math.log(0.8) + math.log(0.9) + math.log(0.5)) / 2
    assert compute_absent_loss(p.log() + 3.0, absent, multi_label=False).item() == pytest.approx(wanted, rel=1e-12)
    # A segment without marks counts in the mean, and gets no gradient.
    absent[0] = False
    logits = p.log().requires_grad_()
    loss = compute_absent_loss(logits, absent, multi_label=False)
    assert loss.item() == pytest.approx(math.log(2) / 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    # d(-log(1 - p_q)) / dz_q = p_q; for another class -p_q p_k / (1 - p_q); halved by the mean
    torch.testing.assert_close(gradient, torch.tensor([[0, 0, 0], [0.25, -0.125, -0.125]], dtype=torch.float64))


def test_multi_label_loss_by_hand():
    p = torch.tensor([[0.9, 0.2], [0.5, 0.4]], dtype=torch.float64)
    absent = torch.tensor([[True, True], [False, True]])
    wanted = -(math.log(0.1) + math.log(0.8) + math.log(0.6)) / 2
    logits = torch.logit(p).requires_grad_()
    loss = compute_absent_loss(logits, absent, multi_label=True)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.45, 0.1], [0, 0.2]], dtype=torch.float64))


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("scale", [30.0, 200.0, 1e4])
def test_loss_is_finite_where_probabilities_are_0_and_1(multi_label, scale):
    logits = torch.tensor([[scale, -scale, 0.0], [-scale, 0.0, scale]], requires_grad=True)
    absent = torch.tensor([[True, True, False], [False, False, True]])
    loss = compute_absent_loss(logits, absent, multi_label=multi_label)
    # -log(1 - p): of a softmax near 1 it is the lead over the next class, of a sigmoid near 1 the logit itself.
    assert loss.item() == pytest.approx(scale, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    wanted = [[0.5, 0, 0], [0, 0, 0.5]] if multi_label else [[0.5, 0, -0.5], [0, -0.5, 0.5]]
    torch.testing.assert_close(gradient, torch.tensor(wanted), rtol=0, atol=1e-6)


def test_loss_without_any_mark_is_zero_and_differentiable():
    for multi_label in (False, True):
        logits = torch.randn(3, 4, requires_grad=True)
        loss = compute_absent_loss(logits, torch.zeros(3, 4, dtype=torch.bool), multi_label=multi_label)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and not gradient.any()


def test_loss_of_half_precision_is_computed_in_single():
    logits = torch.tensor([[8.0, -4.0, 1.0]])
    absent = torch.tensor([[False, True, True]])
    for multi_label in (False, True):
        loss = compute_absent_loss(logits.bfloat16(), absent, multi_label=multi_label)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(
            compute_absent_loss(logits, absent, multi_label=multi_label).item(), rel=1e-6
        )


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 9), st.booleans())
def test_loss_equals_the_printed_formula(seed, n, n_classes, multi_label):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    absent = torch.rand(n, n_classes, generator=generator) < 0.4
    p = logits.sigmoid() if multi_label else logits.softmax(dim=1)
    wanted = -(torch.log(1 - p) * absent).sum(dim=1).mean()
    torch.testing.assert_close(compute_absent_loss(logits, absent, multi_label=multi_label), wanted)


P = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64)


def test_weighted_cross_entropy():
    loss = compute_source_loss(P.log(), torch.tensor([0, 2]), torch.tensor([0.5, 3.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(-(0.5 * math.log(0.7) + 3 * math.log(0.25)) / 2, rel=1e-12)


def test_weighted_binary_cross_entropy():
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    weights = torch.tensor([[2.0, 0.5, 0.5], [3.0, 4.0, 0.5]], dtype=torch.float64)
    loss = compute_source_loss(torch.logit(P), labels, weights)
    terms = [2 * math.log(0.7), 0.5 * math.log(0.8), 0.5 * math.log(0.9)]
    terms += [3 * math.log(0.5), 4 * math.log(0.25), 0.5 * math.log(0.75)]
    assert loss.item() == pytest.approx(-sum(terms) / 6, rel=1e-12)
