"""Computes what the audio-adaptive encoder minimises (Eq. 4): a balanced loss on the source, absences on the target."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from echoshift.train.absent_activities import compute_absent_loss
from echoshift.train.batches import SourceBatch, TargetBatch


def compute_source_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy of a labelled batch (Eq. 2 and 3), a scalar.

    `logits` are [B, K]. With labels int64 [B] and weights [B] it is mean(w CE) over the batch; with labels float [B, K]
    and weights [B, K] it is mean(w BCE) over all entries. The mean divides by their number, not by the weights' sum.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), weight=weights)


def compute_encoder_losses(
    source_logits: Tensor,
    source: SourceBatch,
    target_logits: Tensor | None,
    target: TargetBatch | None,
    absent_weight: float,
    *,
    multi_label: bool,
) -> dict[str, Tensor]:
    """Return the scalars `source`, `absent` and `total` = source + `absent_weight` (lambda) * absent (Eq. 4).

    The second sum of Eq. 4 is over the source; the T in print is a slip. Both sums are means over their batch here.
    Without a target batch `absent` is 0, without a gradient.
    """
    assert (source.labels.ndim == 2) == multi_label, (
        "labels [B, K] belong to a multi-label dataset, [B] to a single-label one"
    )
    assert (target_logits is None) == (target is None), "a target batch comes with its logits"
    source_loss = compute_source_loss(source_logits, source.labels, source.weights)
    if target_logits is None or target is None:
        return {"source": source_loss, "absent": torch.zeros_like(source_loss.detach()), "total": source_loss}
    absent_loss = compute_absent_loss(target_logits, target.absent, multi_label=multi_label)
    return {"source": source_loss, "absent": absent_loss, "total": source_loss + absent_weight * absent_loss}
