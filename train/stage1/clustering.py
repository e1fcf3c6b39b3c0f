"""Groups the samples of each activity by their sound, one group an interaction (Zhang et al., section 3.1)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from echoshift.pipeline.errors import SpecError

# How far below its chord the normalised inertia curve must dip to have a knee. Gaussian noise without groups dips 0.03
# (100 samples of 512 dimensions) to 0.21 (421 of 64), planted groups that k-means recovers 0.4 to 0.9. Noise of few
# dimensions dips more (0.56 at 2): there the elbow cuts what has no groups, as it always does.
MIN_BEND = 0.2


@dataclass(frozen=True, slots=True)
class ClassClusters:
    """How one class was clustered.

    Attributes:
        name: of the class.
        n_samples: of the class, those without sound among them.
        n_clusters: of samples with sound, numbered from 0, the largest first.
        sizes: of these clusters.
        n_silent: samples without sound; they are a cluster of their own, number `n_clusters`.
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
    """Cluster the sounds of each class by k-means (k-means++), k from the elbow of 1..`max_clusters` (METHODS 5.2).

    k goes no further than half the samples with sound. Samples without sound tell nothing of an interaction and are one
    cluster of their own. The same seed gives the same clusters on one machine; a class's clusters depend on no other
    class.

    Args:
        features: of the sound, float [n, D]; rows without sound may hold anything.
        labels: class indices int64 [n], or, multi-label, 0 and 1 [n, K].
        has_audio: bool [n].
        class_names: K names.
        max_clusters: the largest k tried.
        n_init: how often k-means starts anew for each k; the best is kept.
        seed: of the starts.
    """
    heard = np.asarray(has_audio, bool)
    features = np.asarray(features, np.float32)
    labels = np.asarray(labels)
    multi_label = labels.ndim == 2
    broken = np.flatnonzero(heard & ~np.isfinite(features).all(axis=1))
    if len(broken):
        raise SpecError(
            f"the audio feature of sample {broken[0]}, which has sound, isn't finite ({len(broken)} such samples); "
            "run `echoshift store verify` on the store of sound"
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
    There is none in fewer than three inertias, or in some that don't fall.
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
    """Return the cluster of each of m samples with sound, the inertias, and why there is one cluster or none."""
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
    """Number clusters anew from 0 without gaps, the largest first, then the one whose sample comes first."""
    _, first, of_sample, sizes = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    return np.argsort(order)[of_sample]
