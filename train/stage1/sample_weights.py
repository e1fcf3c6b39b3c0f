"""Weights labelled segments by class and by interaction cluster (Eq. 2 and 3), whoever's sound was clustered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echoshift.pipeline.segments import Segment
from echoshift.train.balancing import compute_sample_weights
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.config import BalanceConfig

NO_CLUSTER = -1


def weight_segments(labelled: LabelledSegments, clusters: np.ndarray | None, config: BalanceConfig) -> np.ndarray:
    """Return the weight of each sample, float32 [n] or [n, K]; without clusters `audio` weighs by class alone."""
    kind = "class" if config.kind == "audio" and clusters is None else config.kind
    if not len(labelled):
        return np.zeros(labelled.labels.shape, dtype=np.float32)
    if clusters is not None:  # positives without a pair are a cluster of their own
        clusters = np.where(clusters == NO_CLUSTER, clusters.max() + 1, clusters)
    return compute_sample_weights(kind, labelled.labels, clusters, config.beta, normalised=config.normalised)


def map_to_pairs(clusters: np.ndarray, clustered: Sequence[Segment], segments: Sequence[Segment]) -> np.ndarray:
    """Return segments the clusters of the segments that show the same event from the other view.

    clusters int64 [n, K] of `clustered`; gives [m, K] of `segments`, -1 where there is no pair (METHODS 9).
    """
    row_of = {segment.pair_id: i for i, segment in enumerate(clustered) if segment.pair_id}
    mapped = np.full((len(segments), *clusters.shape[1:]), NO_CLUSTER, dtype=np.int64)
    for i, segment in enumerate(segments):
        if segment.pair_id in row_of:
            mapped[i] = clusters[row_of[segment.pair_id]]
    return mapped
