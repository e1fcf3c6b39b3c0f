"""Weights labelled samples so that rare activities and rare interactions count as much as frequent ones."""

from __future__ import annotations

from typing import Literal

import numpy as np

from echoshift.pipeline.errors import SpecError


def compute_effective_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Return (1 - beta) / (1 - beta^n) for each count n, float64, any shape (Cui et al., CVPR 2019, used in Eq. 2).

    It is 1 for beta 0 or n 1, and tends to 1/n as beta tends to 1. A count of 0 gives 0: there is nothing to weight.
    """
    counts = np.asarray(counts)
    if not 0 <= beta < 1:
        raise SpecError(f"balance.beta is {beta}; it must be at least 0 and below 1")
    if counts.size and counts.min() < 0:
        raise SpecError(f"a count of samples is {counts.min()}; counts can't be negative")
    if beta == 0:
        return (counts > 0).astype(np.float64)
    effective = -np.expm1(counts * np.log(beta))  # 1 - beta^n, without the cancellation near n log(beta) = 0
    return np.divide(1 - beta, effective, out=np.zeros(counts.shape), where=counts > 0)


def compute_class_weights(counts: np.ndarray, beta: float, *, normalised: bool) -> np.ndarray:
    """Return the weight of each class from its number of samples [K] (Eq. 2), float64 [K].

    Normalised, they sum to the number of classes that have samples, as those of Cui et al. do (their section 4).
    """
    weights = compute_effective_weights(counts, beta)
    return _normalise(weights) if normalised else weights


def compute_cluster_weights(labels: np.ndarray, clusters: np.ndarray, beta: float, *, normalised: bool) -> np.ndarray:
    """Return each sample the weight of its interaction cluster within its class (Eq. 3), float64.

    Args:
        labels: class indices int64 [n], or, multi-label, 0 and 1 [n, K].
        clusters: int64 [n], or [n, K], where entries that aren't positives are ignored.
        beta: of the effective number.
        normalised: whether the weights of a class's C_y clusters sum to C_y.

    Returns:
        [n], or [n, K] with 0 where the label isn't positive.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.shape != clusters.shape:
        raise SpecError(
            f"labels are {list(labels.shape)} and clusters {list(clusters.shape)}; each label needs one cluster"
        )
    weights = np.zeros(labels.shape)
    if labels.ndim == 2:
        for k in range(labels.shape[1]):
            rows = np.flatnonzero(labels[:, k] > 0)
            weights[rows, k] = _weight_members(clusters[rows, k], beta, normalised, k)
        return weights
    for k in np.unique(labels):
        rows = np.flatnonzero(labels == k)
        weights[rows] = _weight_members(clusters[rows], beta, normalised, int(k))
    return weights


def compute_sample_weights(
    kind: Literal["none", "class", "audio"],
    labels: np.ndarray,
    clusters: np.ndarray | None,
    beta: float,
    *,
    normalised: bool,
) -> np.ndarray:
    """Return the weight of each sample's loss: 1, its class weight (Eq. 2), or that times its cluster's (Eq. 3).

    Multi-label, each positive is weighted so by its class, and every negative by the mean weight of all positives [?].
    Then positives and negatives stand to each other as in plain binary cross-entropy, whatever the weights' scale; with
    1 for negatives, the raw products (1e-5 is common) would leave the positives without any say.

    Args:
        kind: "none", "class" or "audio".
        labels: class indices int64 [n], or, multi-label, 0 and 1 [n, K].
        clusters: as in compute_cluster_weights; needed by "audio" alone.
        beta: of the effective number.
        normalised: the released form; see compute_class_weights and compute_cluster_weights.

    Returns:
        float32 [n], or [n, K].
    """
    labels = np.asarray(labels)
    if kind == "none":
        return np.ones(labels.shape, np.float32)
    multi_label = labels.ndim == 2
    counts = (labels > 0).sum(axis=0) if multi_label else np.bincount(labels)
    class_weights = compute_class_weights(counts, beta, normalised=normalised)
    positives = labels > 0
    weights = np.where(positives, class_weights, 0.0) if multi_label else class_weights[labels]
    if kind == "audio":
        if clusters is None:
            raise SpecError(
                'balance.kind is "audio", but there are no interaction clusters; use "class", or find clusters'
            )
        weights = weights * compute_cluster_weights(labels, clusters, beta, normalised=normalised)
    if multi_label:
        weights = np.where(positives, weights, weights[positives].mean() if positives.any() else 1.0)
    return weights.astype(np.float32)


def _weight_members(clusters: np.ndarray, beta: float, normalised: bool, k: int) -> np.ndarray:
    """Weight the samples of one class, [m], by the size of their cluster."""
    if clusters.size and clusters.min() < 0:
        raise SpecError(
            f"a sample of class {k} has cluster {clusters.min()}; every positive needs a cluster, from 0 on"
        )
    _, of_sample, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    weights = compute_effective_weights(sizes, beta)
    return (_normalise(weights) if normalised else weights)[of_sample]


def _normalise(weights: np.ndarray) -> np.ndarray:
    """Scale weights so that they sum to the number of those above 0."""
    total = weights.sum()
    return weights * (np.count_nonzero(weights) / total) if total > 0 else weights
