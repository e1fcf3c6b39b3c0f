"""Checks interaction clusters against planted groups, and what is said where there are none."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from echoshift.pipeline.errors import SpecError
from echoshift.train.stage1.balancing import MIN_BEND, InteractionClusters, cluster_interactions, find_elbow


def _plant(n_per_group: list[int], n_dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make groups of unit noise around centres about 5 sqrt(2 D) apart, shuffled; return features and groups."""
    generator = np.random.default_rng(seed)
    groups = generator.permutation(np.repeat(np.arange(len(n_per_group)), n_per_group))
    centres = 5 * generator.normal(size=(len(n_per_group), n_dimensions))
    return (centres[groups] + generator.normal(size=(len(groups), n_dimensions))).astype(np.float32), groups


def _cluster(features: np.ndarray, labels: np.ndarray, **changed: object) -> InteractionClusters:
    """Cluster with sound everywhere and a warning being an error."""
    settings = {"has_audio": np.ones(len(features), bool), "class_names": ["open", "cut"], "max_clusters": 12}
    settings |= {"n_init": 4, "seed": 0} | changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cluster_interactions(features, labels, **settings)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_groups_are_found(seed):
    open_features, open_groups = _plant([40, 25, 15], 512, seed)
    cut_features, cut_groups = _plant([20, 18, 16, 14, 12], 512, seed + 10)
    order = np.random.default_rng(seed).permutation(160)
    labels = np.repeat([0, 1], 80)[order]
    found = _cluster(np.concatenate([open_features, cut_features])[order], labels)
    for k, groups, sizes in ((0, open_groups, (40, 25, 15)), (1, cut_groups, (20, 18, 16, 14, 12))):
        planted = np.concatenate([open_groups, cut_groups])[order][labels == k]
        assert adjusted_rand_score(planted, found.assignment[labels == k]) == 1
        report = found.classes[k]
        assert (report.n_samples, report.n_clusters, report.sizes) == (80, len(sizes), sizes)  # the largest first
        assert report.n_silent == 0 and report.note == "" and len(report.inertias) == 12
        for j, size in enumerate(sizes):
            assert np.sum(found.assignment[labels == k] == j) == size
        # The first inertia is the sum of squares about the mean, the planted one that within the groups.
        rows = (open_features, cut_features)[k]
        means = np.stack([rows[groups == j].mean(axis=0) for j in range(len(sizes))])
        assert report.inertias[0] == pytest.approx(np.square(rows - rows.mean(axis=0)).sum(), rel=1e-4)
        assert report.inertias[len(sizes) - 1] == pytest.approx(np.square(rows - means[groups]).sum(), rel=1e-4)


def test_the_same_seed_gives_the_same_clusters_and_other_classes_dont_matter():
    features = np.random.default_rng(3).normal(size=(400, 2)).astype(np.float32)  # no groups: many solutions
    labels = np.arange(400) % 2
    found, again = _cluster(features, labels), _cluster(features, labels)
    assert np.array_equal(found.assignment, again.assignment) and found.classes == again.classes
    alone = _cluster(features[labels == 1], np.ones(200, int))
    assert np.array_equal(alone.assignment, found.assignment[labels == 1])
    assert found.classes[0].n_clusters > 1
    assert not np.array_equal(_cluster(features, labels, seed=1).assignment, found.assignment)


def test_reasons_for_one_cluster():
    generator = np.random.default_rng(0)
    cases = {
        "no knee in the inertias": generator.normal(size=(100, 512)),
        "constant features": np.full((30, 8), 0.1),
        "5 samples with sound are too few for a knee; it takes 6": _plant([3, 2], 8, 0)[0],
    }
    for note, features in cases.items():
        found = _cluster(features, np.zeros(len(features), int))
        open_, cut = found.classes
        assert open_.note == note and open_.n_clusters == 1 and open_.sizes == (len(features),)
        assert (found.assignment == 0).all()
        assert len(open_.inertias) == (12 if "knee in" in note else 0)
        assert (cut.note, cut.n_samples, cut.n_clusters, cut.sizes) == ("no samples with sound", 0, 0, ())
    few = _cluster(_plant([20, 20], 8, 0)[0], np.zeros(40, int), max_clusters=2)
    assert few.classes[0].note == "up to 2 clusters can't show a knee; it takes 3"


def test_single_samples_and_samples_that_coincide():
    assert _cluster(np.ones((1, 8)), np.zeros(1, int)).assignment.tolist() == [0]
    # Few sounds, each many times, exactly and but for rounding: k-means itself would warn of both.
    for n_sounds, noise in ((2, 0), (3, 0), (5, 0), (3, 1e-7)):
        sounds = np.random.default_rng(0).normal(size=(n_sounds, 16))
        groups = np.arange(60) % n_sounds
        features = sounds[groups] + noise * np.random.default_rng(1).normal(size=(60, 16))
        found = _cluster(features.astype(np.float32), np.zeros(60, int))
        assert found.classes[0].n_clusters == n_sounds and adjusted_rand_score(groups, found.assignment) == 1
        assert len(found.classes[0].inertias) == 12
        assert found.classes[0].inertias[n_sounds - 1 :] == pytest.approx([0] * (13 - n_sounds), abs=1e-9)


def test_samples_without_sound_are_a_cluster_of_their_own():
    features, groups = _plant([30, 20], 32, 0)
    has_audio = np.arange(50) % 5 > 0
    features[~has_audio] = np.nan
    found = _cluster(features, np.zeros(50, int), has_audio=has_audio)
    (report, _) = found.classes
    assert (report.n_samples, report.n_clusters, report.n_silent, sum(report.sizes)) == (50, 2, 10, 40)
    assert (found.assignment[~has_audio] == 2).all()
    assert adjusted_rand_score(groups[has_audio], found.assignment[has_audio]) == 1
    silent = _cluster(features, np.zeros(50, int), has_audio=np.zeros(50, bool))
    assert silent.classes[0].n_clusters == 0 and (silent.assignment == 0).all() and silent.classes[0].n_silent == 50
    features[3] = np.inf
    with pytest.raises(SpecError, match="feature of sample 3, which has audio, isn't finite"):
        _cluster(features, np.zeros(50, int), has_audio=has_audio)


def test_multi_label_clusters_each_class_among_its_positives():
    features, groups = _plant([30, 20, 10], 64, 4)
    labels = np.stack([groups != 2, groups != 0], axis=1).astype(np.float32)
    found = _cluster(features, labels)
    assert found.assignment.shape == (60, 2)
    assert np.array_equal(found.assignment == -1, labels == 0)
    assert [c.sizes for c in found.classes] == [(30, 20), (20, 10)]
    assert adjusted_rand_score(groups[groups != 2], found.assignment[groups != 2, 0]) == 1
    # As a single-label problem with the same members, a class has the same clusters.
    alone = _cluster(features[groups != 2], np.zeros(50, int))
    assert np.array_equal(alone.assignment, found.assignment[groups != 2, 0])
    assert dataclasses.asdict(alone.classes[0]) == dataclasses.asdict(found.classes[0])


def test_elbow_by_hand():
    assert find_elbow([100, 60, 20, 15, 10, 5, 0]) == 3
    assert find_elbow([10, 1, 0.9, 0.8]) == 2
    # Scaled, the second point lies at (1/2, y); its dip 1/2 - y must reach MIN_BEND.
    assert find_elbow([1, 0.5 - MIN_BEND - 0.001, 0]) == 2
    assert find_elbow([1, 0.5 - MIN_BEND + 0.001, 0]) is None
    assert find_elbow([6, 5, 4, 3, 2]) is None  # a straight line
    assert find_elbow([10, 9.5, 8, 0]) is None  # bent the other way
    for inertias in ([], [3], [3, 1], [0, 0, 0], [1, 2, 3], [np.nan, np.nan, np.nan]):
        assert find_elbow(inertias) is None


@given(st.lists(st.floats(0, 1), min_size=3, max_size=20), st.integers(-4, 4), st.integers(-100, 100))
def test_elbow_knows_no_units(inertias: list[float], power: int, offset: int) -> None:
    # Multiples of 2^-20 and a scale by a power of two keep the arithmetic exact.
    curve = sorted((round(x * 2**20) / 2**20 for x in inertias), reverse=True)
    knee = find_elbow(curve)
    assert find_elbow([x * 2.0**power + offset for x in curve]) == knee
    assert knee is None or 1 < knee < len(curve)
