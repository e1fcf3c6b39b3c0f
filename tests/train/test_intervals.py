import numpy as np
import pytest
from scipy import stats

from echoshift.pipeline.errors import RunError
from echoshift.train.scores import MeanInterval, PairedTest, compare_pairs, compare_segments, compute_interval


def test_interval_by_hand():
    # t(.975, 2) is 4.302653; the deviation of 1, 2, 3 is 1.
    interval = compute_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.n) == (2.0, 3)
    assert interval.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_interval_is_scipys():
    values = np.random.default_rng(0).normal(0.5, 0.1, 7)
    interval = compute_interval(values.tolist())
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert (interval.mean - interval.half_width, interval.mean + interval.half_width) == pytest.approx((low, high))


def test_one_run_has_no_interval():
    assert compute_interval([0.4]) == MeanInterval(0.4, None, 1)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
def test_no_runs_and_no_numbers_are_errors(values):
    with pytest.raises(RunError, match="scores of runs"):
        compute_interval(values)


def test_pairs_are_compared_as_scipy_does_over_what_both_have():
    rng = np.random.default_rng(1)
    keys = [(shift, seed) for shift in ("a-b", "b-a") for seed in range(3)]
    ours = dict(zip(keys, rng.normal(0.6, 0.1, 6), strict=True)) | {("a-b", 7): 0.9}
    baseline = {key: rng.normal(0.5, 0.1) for key in reversed(keys)} | {("a-b", 8): 0.1}
    test = compare_pairs(ours, baseline)
    expected = stats.ttest_rel([ours[k] for k in keys], [baseline[k] for k in keys])
    low, high = expected.confidence_interval(0.95)
    assert test.n == 6
    assert test.p_value == pytest.approx(expected.pvalue)
    assert test.difference == pytest.approx((low + high) / 2)
    assert test.half_width == pytest.approx((high - low) / 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ours", "baseline", "expected"),
    [
        ([0.5, 0.7], [0.5, 0.7], PairedTest(0.0, 0.0, 1.0, 2)),
        ([0.5], [0.25], PairedTest(0.25, None, None, 1)),
        ([0.5], [0.5], PairedTest(0.0, None, None, 1)),
        ([0.5, 0.75], [0.25, 0.5], PairedTest(0.25, 0.0, None, 2)),
    ],
)
def test_pairs_without_spread(ours, baseline, expected):
    assert compare_pairs(dict(enumerate(ours)), dict(enumerate(baseline))) == expected


def test_pairs_that_differ_by_rounding_alone_have_no_spread():
    ours = {i: 0.1 * i + 0.3 for i in range(5)}
    test = compare_pairs(ours, {i: value - 0.1 for i, value in ours.items()})
    assert test.p_value is None
    assert test.difference == pytest.approx(0.1)


def test_nothing_in_common_is_an_error():
    with pytest.raises(RunError, match="same shift and seed"):
        compare_pairs({("a-b", 0): 0.5}, {("a-b", 1): 0.5})


def draw_hits(seed, rates, n=400):
    rng = np.random.default_rng(seed)
    return {shift: (rng.random(n) < rate).astype(np.float64) for shift, rate in rates.items()}


def test_bootstrap_finds_the_interval_that_theory_gives():
    ours, baseline = draw_hits(0, {"a-b": 0.8, "b-a": 0.6}), draw_hits(1, {"a-b": 0.6, "b-a": 0.6})
    test = compare_segments(ours, baseline, n_draws=4000, seed=3)
    differences = {shift: ours[shift] - baseline[shift] for shift in ours}
    mean = np.mean([d.mean() for d in differences.values()])
    deviation = np.sqrt(sum(d.var() / len(d) for d in differences.values())) / 2
    assert test.n == 800
    assert test.difference == pytest.approx(mean)
    assert (test.low, test.high) == pytest.approx((mean - 1.96 * deviation, mean + 1.96 * deviation), abs=0.004)
    assert test.p_value == pytest.approx(2 * stats.norm.sf(mean / deviation), abs=0.002)
    assert test == compare_segments(ours, baseline, n_draws=4000, seed=3)
    assert test != compare_segments(ours, baseline, n_draws=4000, seed=4)


def test_bootstrap_is_paired():
    ours = draw_hits(0, {"a-b": 0.5}, n=1000)
    baseline = {"a-b": ours["a-b"].copy()}
    baseline["a-b"][np.flatnonzero(ours["a-b"])[:10]] = 0
    # Unpaired, a difference of .01 would lie well within the interval; paired, only 10 segments differ, all one way.
    assert compare_segments(ours, baseline, n_draws=4000).p_value < 0.01


def test_bootstrap_of_what_is_equal():
    hits = draw_hits(0, {"a-b": 0.5})
    test = compare_segments(hits, hits, n_draws=500)
    assert (test.difference, test.low, test.high, test.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("ours", "baseline", "words"),
    [
        ({}, {}, "can't be compared"),
        ({"a-b": np.ones(3)}, {"b-a": np.ones(3)}, r"\['a-b'\] can't be compared with those of \['b-a'\]"),
        ({"a-b": np.ones(3)}, {"a-b": np.ones(4)}, r"a-b: \[3\] and \[4\]"),
        ({"a-b": np.ones(1)}, {"a-b": np.ones(1)}, "2 or more segments"),
        ({"a-b": np.array([1, np.nan])}, {"a-b": np.ones(2)}, "a-b: differences of segments: 2 values, 1 of them"),
    ],
)
def test_segments_that_do_not_fit_are_named(ours, baseline, words):
    with pytest.raises(RunError, match=words):
        compare_segments(ours, baseline)
