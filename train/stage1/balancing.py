"""Balancing of the source: interaction clusters of its audio, and weights by class and cluster (Eq. 2 and 3)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.segments import Segment
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.config import BalanceConfig

NO_CLUSTER = -1
# How far below its chord the normalised inertia curve must dip to have a knee. Gaussian noise without groups dips 0.03
# (100 samples of 512 dimensions) to 0.21 (421 of 64), planted groups that k-means recovers 0.4 to 0.9. Noise of few
# dimensions dips more (0.56 at 2): there the elbow cuts what has no groups, as it always does.
MIN_BEND = 0.2


@dataclass(frozen=True, slots=True)
class ClassClusters:
    """How one class was clustered.

    Attributes:
        name: of the class.
        n_samples: of the class, those without audio among them.
        n_clusters: of samples with audio, numbered from 0, the largest first.
        sizes: of these clusters.
        n_silent: samples without audio; they are a cluster of their own, number `n_clusters`.
        inertias: the sum of squared distances to the nearest centre, for k = 1, 2, ...; empty where k-means didn't run.
        note: why there is one cluster or none; "" where the elbow chose.
    """

    name: str
    n_samples: int
    n_clusters: int
    sizes: tuple[int, ...]
    n_silent: int
    inertias: tuple[float, ...]
    note: str


@dataclass(frozen=True, slots=True)
class InteractionClusters:
    """The cluster of each sample within its class, int64 [n], or multi-label [n, K] with -1 where not positive."""

    assignment: np.ndarray
    classes: tuple[ClassClusters, ...]


def cluster_interactions(
    features: np.ndarray,
    labels: np.ndarray,
    has_audio: np.ndarray,
    class_names: Sequence[str],
    max_clusters: int,
    n_init: int,
    seed: int,
) -> InteractionClusters:
    """Cluster the audio of each class by k-means (k-means++), k from the elbow of 1..`max_clusters` (METHODS 5.2).

    k goes no further than half the samples with audio. Samples without audio tell nothing of an interaction and are one
    cluster of their own. The same seed gives the same clusters on one machine; a class's clusters depend on no other
    class.

    Args:
        features: of the audio, float [n, D]; rows without audio may hold anything.
        labels: class indices int64 [n], or, multi-label, 0 and 1 [n, K].
        has_audio: bool [n].
        class_names: K names.
        max_clusters: the largest k tried.
        n_init: how often k-means starts for each k; the best is kept.
        seed: of the starts.
    """
    heard = np.asarray(has_audio, bool)
    features = np.asarray(features, np.float32)
    labels = np.asarray(labels)
    multi_label = labels.ndim == 2
    broken = np.flatnonzero(heard & ~np.isfinite(features).all(axis=1))
    if len(broken):
        raise SpecError(
            f"the audio feature of sample {broken[0]}, which has audio, isn't finite ({len(broken)} such samples); "
            "run `echoshift store verify` on the store of audio"
        )
    assignment = np.full(labels.shape, -1, np.int64)
    classes = []
    for k, name in enumerate(class_names):
        members = np.flatnonzero(labels[:, k] > 0 if multi_label else labels == k)
        with_sound = members[heard[members]]
        found, inertias, note = _cluster_class(features[with_sound], max_clusters, n_init, f"{seed}/{name}")
        n_clusters = int(found.max(initial=-1)) + 1
        clusters = np.full(len(members), n_clusters)
        clusters[heard[members]] = found
        if multi_label:
            assignment[members, k] = clusters
        else:
            assignment[members] = clusters
        sizes = tuple(np.bincount(found, minlength=n_clusters).tolist())
        n_silent = len(members) - len(with_sound)
        classes.append(ClassClusters(name, len(members), n_clusters, sizes, n_silent, inertias, note))
    return InteractionClusters(assignment, tuple(classes))


def find_elbow(inertias: Sequence[float]) -> int | None:
    """Find the k at which the inertias of k = 1, 2, ... bend most, or None where they have no knee.

    Both axes are scaled to 0..1, and the knee is the point farthest below the chord from the first to the last (Satopaa
    et al., Finding a "Kneedle" in a Haystack, 2011; the elbow of Thorndike, 1953). It must lie at least MIN_BEND below.
    Fewer than three inertias, or some that don't fall, have none.
    """
    curve = np.asarray(inertias, np.float64)
    if len(curve) < 3 or not curve[-1] < curve[0]:
        return None
    height = (curve - curve[-1]) / (curve[0] - curve[-1])
    bend = np.linspace(1, 0, len(curve)) - height
    knee = int(bend.argmax())
    return knee + 1 if bend[knee] >= MIN_BEND else None


def _cluster_class(
    features: np.ndarray, max_clusters: int, n_init: int, seed: str
) -> tuple[np.ndarray, tuple[float, ...], str]:
    """Return the cluster of each of m samples with audio, the inertias, and why there is one cluster or none."""
    n = len(features)
    one = np.zeros(n, np.int64)
    if n == 0:
        return one, (), "no samples with sound"
    spread = np.square(features - features.mean(axis=0, dtype=np.float64)).sum()
    if n > 1 and spread <= 1e-10 * np.square(features, dtype=np.float64).sum():
        return one, (), "constant features"
    if n < 6:
        return one, (), f"{n} samples with sound are too few for a knee; it takes 6"
    if max_clusters < 3:
        return one, (), f"up to {max_clusters} clusters can't show a knee; it takes 3"
    last = min(max_clusters, n // 2)
    n_distinct = len(np.unique(features, axis=0))
    results = [_run_kmeans(features, k, n_init, seed) for k in range(1, min(last, n_distinct) + 1)]
    # With a centre on each distinct feature the inertia is 0, and further centres change nothing.
    inertias = (*(inertia for _, inertia in results), *[0.0] * (last - len(results)))
    knee = find_elbow(inertias)
    if knee is None:
        return one, inertias, "no knee in the inertias"
    return _number_by_size(results[knee - 1][0]), inertias, ""


def _run_kmeans(features: np.ndarray, k: int, n_init: int, seed: str) -> tuple[np.ndarray, float]:
    """Return the clusters [m] and the inertia of the best of `n_init` runs."""
    start = int.from_bytes(hashlib.blake2b(f"{seed}/{k}".encode(), digest_size=4).digest())
    # With several threads the sums over samples are added in an order that varies from run to run.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # samples that all but coincide fill fewer than k clusters
        fitted = KMeans(k, init="k-means++", n_init=n_init, random_state=start).fit(features)
    return fitted.labels_.astype(np.int64), float(fitted.inertia_)


def _number_by_size(clusters: np.ndarray) -> np.ndarray:
    """Number clusters from 0 without gaps, the largest first, then the one whose sample comes first."""
    _, first, of_sample, sizes = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    return np.argsort(order)[of_sample]


def weight_segments(labelled: LabelledSegments, clusters: np.ndarray | None, config: BalanceConfig) -> np.ndarray:
    """Return the weight of each sample, float32 [n] or [n, K]; without clusters `audio` weighs by class alone."""
    kind = "class" if config.kind == "audio" and clusters is None else config.kind
    if not len(labelled):
        return np.zeros(labelled.labels.shape, dtype=np.float32)
    if clusters is not None:  # positives without a pair are a cluster of their own
        clusters = np.where(clusters == NO_CLUSTER, clusters.max() + 1, clusters)
    return compute_sample_weights(kind, labelled.labels, clusters, config.beta, normalised=config.normalised)


def map_to_pairs(clusters: np.ndarray, clustered: Sequence[Segment], segments: Sequence[Segment]) -> np.ndarray:
    """Map the clusters of segments to those that show the same event from the other view.

    `clusters` are int64 [n, K] of `clustered`; returns [m, K] of `segments`, -1 without a pair (METHODS 9).
    """
    row_of = {segment.pair_id: i for i, segment in enumerate(clustered) if segment.pair_id}
    mapped = np.full((len(segments), *clusters.shape[1:]), NO_CLUSTER, dtype=np.int64)
    for i, segment in enumerate(segments):
        if segment.pair_id in row_of:
            mapped[i] = clusters[row_of[segment.pair_id]]
    return mapped


def compute_effective_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Return (1 - beta) / (1 - beta^n) for each count n, float64, any shape (Cui et al., CVPR 2019, used in Eq. 2).

    It is 1 for beta 0 or n 1, and tends to 1/n as beta tends to 1. A count of 0 weighs 0.
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
                'balance.kind is "audio", but no interaction clusters were found; use "class", or find clusters'
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
