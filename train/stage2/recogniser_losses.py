"""Computes the recogniser's loss (Zhang et al., Eq. 8), single- and multi-label, as masked means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LABEL = -1


def compute_class_loss(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute the mean loss over the samples that count, float32 []; 0 where none does.

    `logits` float [B, K]. Single-label, `labels` int64 [B]: cross-entropy; NO_LABEL counts for nothing. Multi-label,
    float [B, K]: binary cross-entropy, the mean over classes; a row of NaN counts for nothing. `counted` bool [B]
    leaves out more.

    Multi-label, h and h' still mix activity-sound vectors by their softmax; what is computed here is the binary
    cross-entropy of the sigmoid of the same logits, since several activities may sound at once [?].
    """
    if labels.dim() == 1:
        known = labels != NO_LABEL
        each = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")
    else:
        known = ~labels.isnan().any(dim=1)
        filled = torch.where(known[:, None], labels, 0.0)
        each = F.binary_cross_entropy_with_logits(logits.float(), filled, reduction="none").mean(dim=1)
    weights = (known if counted is None else known & counted).float()
    return (each * weights).sum() / weights.sum().clamp(min=1)
