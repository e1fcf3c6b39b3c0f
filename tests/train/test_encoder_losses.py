"""Checks the encoder's losses against cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from echoshift.train.batches import EncoderInputs, SourceBatch, TargetBatch
from echoshift.train.stage1.encoder_losses import compute_encoder_losses, compute_source_loss


def _make_inputs(n: int) -> EncoderInputs:
    return EncoderInputs(visual={}, audio_map=torch.zeros(n, 1, 1, 1), has_audio=torch.ones(n, dtype=torch.bool))


P = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64)


def test_weighted_cross_entropy() -> None:
    loss = compute_source_loss(P.log(), torch.tensor([0, 2]), torch.tensor([0.5, 3.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(-(0.5 * math.log(0.7) + 3 * math.log(0.25)) / 2, rel=1e-12)


def test_weighted_binary_cross_entropy() -> None:
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    weights = torch.tensor([[2.0, 0.5, 0.5], [3.0, 4.0, 0.5]], dtype=torch.float64)
    loss = compute_source_loss(torch.logit(P), labels, weights)
    terms = [2 * math.log(0.7), 0.5 * math.log(0.8), 0.5 * math.log(0.9)]
    terms += [3 * math.log(0.5), 4 * math.log(0.25), 0.5 * math.log(0.75)]
    assert loss.item() == pytest.approx(-sum(terms) / 6, rel=1e-12)


def test_losses_add_up_with_lambda() -> None:
    source = SourceBatch(_make_inputs(2), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
    target = TargetBatch(_make_inputs(2), torch.tensor([[False, True, True], [True, False, False]]))
    losses = compute_encoder_losses(P.log(), source, P.log(), target, 0.01, multi_label=False)
    source_loss = -(math.log(0.7) + 2 * math.log(0.25)) / 2
    absent_loss = -(math.log(0.8) + math.log(0.9) + math.log(0.5)) / 2
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {"source": source_loss, "absent": absent_loss, "total": source_loss + 0.01 * absent_loss}
    )


def test_losses_of_a_multi_label_dataset() -> None:
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    source = SourceBatch(_make_inputs(2), labels, torch.ones(2, 3))
    target = TargetBatch(_make_inputs(1), torch.tensor([[True, False, True]]))
    losses = compute_encoder_losses(torch.logit(P), source, torch.logit(P[:1]), target, 1.0, multi_label=True)
    p_right = (0.7, 0.8, 0.9, 0.5, 0.25, 0.75)
    assert losses["source"].item() == pytest.approx(-sum(map(math.log, p_right)) / 6)
    assert losses["absent"].item() == pytest.approx(-(math.log(0.3) + math.log(0.9)))
    assert losses["total"].item() == pytest.approx(losses["source"].item() + losses["absent"].item())


def test_without_a_target_batch_the_source_is_all() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    source = SourceBatch(_make_inputs(2), torch.tensor([0, 2]), torch.ones(2))
    losses = compute_encoder_losses(logits, source, None, None, 1.0, multi_label=False)
    assert losses["absent"].item() == 0 and not losses["absent"].requires_grad
    assert torch.equal(losses["total"], torch.nn.functional.cross_entropy(logits, source.labels))


def test_gradients_are_finite_for_certain_networks() -> None:
    for multi_label in (False, True):
        logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
        labels = torch.tensor([[0.0, 1.0, 0.0]]) if multi_label else torch.tensor([1])
        source = SourceBatch(_make_inputs(1), labels, torch.ones_like(labels, dtype=torch.float32))
        target = TargetBatch(_make_inputs(1), torch.tensor([[True, False, True]]))
        losses = compute_encoder_losses(logits, source, logits, target, 1.0, multi_label=multi_label)
        (gradient,) = torch.autograd.grad(losses["total"], logits)
        assert torch.isfinite(gradient).all() and gradient[0, 0] > 0 > gradient[0, 1]


def test_labels_of_another_kind_of_dataset_are_refused() -> None:
    source = SourceBatch(_make_inputs(2), torch.tensor([0, 2]), torch.ones(2))
    with pytest.raises(AssertionError, match="multi-label"):
        compute_encoder_losses(P.log(), source, None, None, 1.0, multi_label=True)
