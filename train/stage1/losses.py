"""Losses of the encoder (Eq. 4): weighted on the labelled source, of absent activities on the target (Eq. 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from echoshift.pipeline.errors import SpecError


def compute_source_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy of a labelled batch (Eq. 2 and 3), a scalar.

    `logits` are [B, K]. With labels int64 [B] and weights [B] it is mean(w CE) over the batch; with labels float [B, K]
    and weights [B, K] it is mean(w BCE) over all entries. The mean divides by their number, not by the weights' sum.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), weight=weights)


def mark_absent_single(p_audio: np.ndarray, has_audio: np.ndarray, n_absent: int) -> np.ndarray:
    """Mark the `n_absent` (r) classes of lowest audio probability of each segment (METHODS 5.4), bool [n, K].

    Ties go to the lower class index. A segment without audio gets no mark, whatever `p_audio` [n, K] holds there.
    Raises SpecError where r isn't below K, or a segment with audio has no finite probabilities.
    """
    check_n_absent(n_absent, p_audio.shape[1])
    heard = _find_heard(p_audio, has_audio)
    marks = np.zeros(p_audio.shape, bool)
    lowest = np.argsort(p_audio[heard], axis=1, kind="stable")[:, :n_absent]
    marks[heard[:, None], lowest] = True
    return marks


def check_n_absent(n_absent: int, n_classes: int) -> None:
    """Check that r is at least 1 and below K; raises SpecError."""
    if not 0 < n_absent < n_classes:
        raise SpecError(
            f"absent.n_absent is {n_absent} of {n_classes} classes; it must be at least 1 and leave one class "
            "unmarked: --set absent.n_absent=1, say, or absent.weight=0 to train without"
        )


def mark_absent_multi(
    p_audio: np.ndarray, has_audio: np.ndarray, source_shares: np.ndarray, gamma: float
) -> np.ndarray:
    """Mark of each class k the (1 - alpha_k) gamma of the segments where its probability is lowest, bool [n, K].

    It is a share of the segments with audio, rounded down; those without are never marked. Ties go to the earlier one.

    Args:
        p_audio: probabilities of the audio classifier [n, K].
        has_audio: bool [n].
        source_shares: alpha [K], the share (0..1) of labelled source segments that contain each class.
        gamma: in (0, 1].
    """
    if not 0 < gamma <= 1:
        raise SpecError(f"absent.gamma is {gamma}; it must be above 0 and at most 1")
    shares = np.asarray(source_shares, np.float64)
    if shares.shape != p_audio.shape[1:] or not ((shares >= 0) & (shares <= 1)).all():
        raise SpecError(f"the source's shares of {p_audio.shape[1]} classes must be as many numbers from 0 to 1")
    heard = _find_heard(p_audio, has_audio)
    # The small number keeps a product such as 0.3 * 10 from being rounded down to 2.
    n_marked = np.floor((1 - shares) * gamma * len(heard) + 1e-9).astype(np.int64)
    marks = np.zeros(p_audio.shape, bool)
    order = np.argsort(p_audio[heard], axis=0, kind="stable")
    for k, n in enumerate(n_marked):
        marks[heard[order[:n, k]], k] = True
    return marks


def compute_absent_loss(logits: Tensor, absent: Tensor, *, multi_label: bool) -> Tensor:
    """Return -sum over the absent classes of log(1 - p), averaged over the batch (Eq. 1 of Zhang et al.); a scalar.

    p is the softmax of `logits` [B, K], or with `multi_label` their sigmoid; `absent` is bool [B, K]. A segment without
    marks counts as 0 in the mean. log(1 - p) is never computed from p: it is -softplus(logit) for a sigmoid, and for a
    softmax the log-sum-exp of the other classes' log-probabilities, so value and gradient stay finite as p nears 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 has too few digits for a sum of these
    if multi_label:
        losses = F.softplus(logits)[absent]
    else:
        rows, classes = absent.nonzero(as_tuple=True)
        others = F.log_softmax(logits, dim=1)[rows]
        itself = F.one_hot(classes, logits.shape[1]).bool()
        losses = -others.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    return losses.sum() / len(logits)


def _find_heard(p_audio: np.ndarray, has_audio: np.ndarray) -> np.ndarray:
    """Find the indices of segments with audio; their probabilities must be finite."""
    heard = np.flatnonzero(has_audio)
    broken = heard[~np.isfinite(p_audio[heard]).all(axis=1)]
    if len(broken):
        raise SpecError(
            f"the audio classifier gives segment {broken[0]}, which has audio, no finite probabilities "
            f"({len(broken)} such segments); lower audio_classifier.lr, or check the store of audio"
        )
    return heard
