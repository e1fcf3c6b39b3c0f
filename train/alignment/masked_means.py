"""Computes means over those rows of a batch that count, without looking at values."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean of float [B] over the rows where bool [B] counts, float32 []; 0 where none does."""
    weights = counted.float()
    return (values.float() * weights).sum() / weights.sum().clamp(min=1)


def compute_mean_norm(features: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean L2 norm of [B, D] over the rows that count, float32 []; 0 where none does.

    It is the mean of h in Planamente et al., Eq. 1; the gradient of a row of zeros is zero.
    """
    return compute_masked_mean(torch.linalg.vector_norm(features.float(), dim=-1), counted)
