"""Checks balance weights against METHODS' values for the real counts, and against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.errors import SpecError
from echoshift.train.stage1.balancing import (
    compute_class_weights,
    compute_cluster_weights,
    compute_effective_weights,
    compute_sample_weights,
)

PUBLISHED = {  # METHODS 5.3, beta .999, normalised
    "D1": [0.2696, 0.2911, 0.4491, 0.7710, 0.4634, 1.3516, 2.2522, 2.1519],
    "D2": [0.3333, 0.3409, 0.7834, 0.8836, 0.6606, 1.9989, 1.5930, 1.4064],
    "D3": [0.2423, 0.2161, 0.4019, 0.4741, 0.2628, 1.3979, 2.8209, 2.1840],
}


@pytest.mark.parametrize("domain", PUBLISHED)
def test_class_weights_of_mm_sada(domain):
    counts = {c.domain: np.array(c.n_per_class) for c in read_dataset_card("epic").counts if c.split == "train"}[domain]
    weights = compute_class_weights(counts, 0.999, normalised=True)
    assert np.round(weights, 4).tolist() == PUBLISHED[domain]
    raw = compute_class_weights(counts, 0.999, normalised=False)
    np.testing.assert_allclose(raw, 0.001 / (1 - 0.999 ** counts.astype(float)), rtol=1e-10)
    # The same through samples: each sample carries its class's weight.
    labels = np.repeat(np.arange(8), counts)
    samples = compute_sample_weights("class", labels, None, 0.999, normalised=True)
    assert (
        samples.dtype == np.float32
        and np.round(samples[labels == 7], 4).tolist() == [np.float32(weights[7].round(4))] * counts[7]
    )


def test_effective_weights_by_hand():
    assert compute_effective_weights(np.array([0, 1, 2, 3]), 0.5).tolist() == pytest.approx([0, 1, 1 / 1.5, 1 / 1.75])
    assert compute_effective_weights(np.array([0, 1, 900]), 0.0).tolist() == [0, 1, 1]
    # As beta tends to 1 the weight tends to 1/n, without losing digits on the way.
    np.testing.assert_allclose(
        compute_effective_weights(np.array([1, 7, 1000]), 1 - 1e-12), [1, 1 / 7, 1e-3], rtol=1e-4
    )
    for beta in (-0.1, 1.0):
        with pytest.raises(SpecError, match=r"balance\.beta is"):
            compute_effective_weights(np.array([1]), beta)
    with pytest.raises(SpecError, match="-2; counts can't be negative"):
        compute_effective_weights(np.array([1, -2]), 0.5)


def test_a_class_without_samples_takes_no_part_in_the_sum():
    weights = compute_class_weights(np.array([3, 0, 3]), 0.9, normalised=True)
    assert weights.tolist() == pytest.approx([1, 0, 1])
    assert compute_class_weights(np.zeros(3, int), 0.9, normalised=True).tolist() == [0, 0, 0]


def test_cluster_weights_by_hand():
    labels = np.array([4, 4, 4, 4, 1, 1])
    clusters = np.array([0, 0, 0, 5, 2, 2])  # of class 4: sizes 3 and 1; of class 1: one cluster of 2
    raw = compute_cluster_weights(labels, clusters, 0.5, normalised=False)
    assert raw.tolist() == pytest.approx([1 / 1.75] * 3 + [1] + [1 / 1.5] * 2)
    scaled = compute_cluster_weights(labels, clusters, 0.5, normalised=True)
    total = 1 / 1.75 + 1
    assert scaled.tolist() == pytest.approx([2 / 1.75 / total] * 3 + [2 / total] + [1, 1])


def test_audio_weights_are_the_product():
    labels = np.array([0, 0, 0, 1])
    clusters = np.array([0, 0, 1, 0])
    raw = compute_sample_weights("audio", labels, clusters, 0.5, normalised=False)
    assert raw.tolist() == pytest.approx([1 / 1.75 / 1.5, 1 / 1.75 / 1.5, 1 / 1.75, 1])
    scaled = compute_sample_weights("audio", labels, clusters, 0.5, normalised=True)
    common, rare = 2 * (1 / 1.75) / (1 + 1 / 1.75), 2 / (1 + 1 / 1.75)
    large, small = 2 * (1 / 1.5) / (1 + 1 / 1.5), 2 / (1 + 1 / 1.5)
    assert scaled.tolist() == pytest.approx([common * large, common * large, common * small, rare])
    assert compute_sample_weights("none", labels, clusters, 0.5, normalised=True).tolist() == [1, 1, 1, 1]


def test_multi_label_by_hand():
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0]], np.float32)
    clusters = np.array([[0, -1, -1], [0, 0, -1], [1, -1, -1]])
    w0, small = 1 / 1.75, 1.0  # class 0 has 3 positives, in clusters of 2 and 1; class 1 has one; class 2 none
    large = 1 / 1.5
    positives = [w0 * large, w0 * large, 1.0, w0 * small]
    mean = sum(positives) / 4
    found = compute_sample_weights("audio", labels, clusters, 0.5, normalised=False)
    wanted = [[w0 * large, mean, mean], [w0 * large, 1.0, mean], [w0 * small, mean, mean]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found.dtype == np.float32
    by_class = compute_sample_weights("class", labels, None, 0.5, normalised=True)
    common, rare = 2 * w0 / (1 + w0), 2 / (1 + w0)
    mean = (3 * common + rare) / 4
    np.testing.assert_allclose(by_class, [[common, mean, mean], [common, rare, mean], [common, mean, mean]], rtol=1e-6)
    assert (compute_sample_weights("class", np.zeros((2, 3)), None, 0.5, normalised=True) == 1).all()


def test_faults_are_named():
    labels = np.array([0, 1])
    with pytest.raises(SpecError, match="no interaction clusters were found"):
        compute_sample_weights("audio", labels, None, 0.9, normalised=True)
    with pytest.raises(SpecError, match=r"labels are \[2\] and clusters \[3\]"):
        compute_sample_weights("audio", labels, np.zeros(3, int), 0.9, normalised=True)
    with pytest.raises(SpecError, match="a sample of class 1 has cluster -1"):
        compute_sample_weights("audio", labels, np.array([0, -1]), 0.9, normalised=True)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=60),
    st.floats(0, 0.9999),
)
def test_normalised_sums(pairs, beta):
    labels, clusters = np.array(pairs).T
    class_weights = compute_class_weights(np.bincount(labels), beta, normalised=True)
    assert class_weights.sum() == pytest.approx(len(set(labels)))
    weights = compute_cluster_weights(labels, clusters, beta, normalised=True)
    for k in set(labels):
        by_cluster = dict(zip(clusters[labels == k], weights[labels == k], strict=True))
        assert sum(by_cluster.values()) == pytest.approx(len(by_cluster))
    # A larger cluster of the same class never weighs more.
    sizes = np.array([np.sum((labels == k) & (clusters == j)) for k, j in pairs])
    for k in set(labels):
        order = np.argsort(sizes[labels == k])
        assert (np.diff(weights[labels == k][order]) <= 1e-12).all()
