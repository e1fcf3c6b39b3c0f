"""Means of runs with intervals, and paired tests against a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import RunError

PairKey = tuple[str, int]  # a shift's name and a seed
LEVEL = 0.95
# Differences this close are equal up to rounding; a t-test would divide by the rounding error.
_EQUAL = 1e-12


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """Mean of n runs with the half width of its 95 % t-interval, None for a single run."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Mean difference of a method to a baseline on the same n pairs, with a two-sided p-value of a paired t-test.

    `p_value` is None for a single pair, and where all differences are equal but not 0, so that there is no spread; it
    is 1 where all are 0.
    """

    difference: float
    half_width: float | None
    p_value: float | None
    n: int


@dataclass(frozen=True, slots=True)
class SegmentTest:
    """Difference with its 95 % bootstrap interval over n test segments, and its two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def compute_interval(values: Sequence[float]) -> MeanInterval:
    """Compute the mean of runs and the half width of its 95 % t-interval; raises RunError for none or a NaN."""
    from scipy.special import stdtrit  # Student's t; importing scipy.stats takes a second

    numbers = _check(values, "scores of runs")
    n = len(numbers)
    half_width = float(stdtrit(n - 1, (1 + LEVEL) / 2) * numbers.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return MeanInterval(float(numbers.mean()), half_width, n)


def compare_pairs(ours: Mapping[PairKey, float], baseline: Mapping[PairKey, float]) -> PairedTest:
    """Test, by a paired t-test over the (shift, seed) pairs that both have, whether `ours` differs from the baseline.

    Runs that share a seed or a shift are not independent, so the p-value tends to be too small. Raises RunError if no
    pair is in both.
    """
    from scipy.special import stdtr

    keys = [key for key in ours if key in baseline]
    if not keys:
        raise RunError("no run has a baseline of the same shift and seed to compare with")
    first = _check([ours[key] for key in keys], "scores of runs")
    second = _check([baseline[key] for key in keys], "scores of the baseline's runs")
    differences, n = first - second, len(keys)
    interval = compute_interval(differences.tolist())
    if np.ptp(differences) <= _EQUAL:
        p_value = 1.0 if n > 1 and abs(interval.mean) <= _EQUAL else None
    else:
        statistic = interval.mean / (differences.std(ddof=1) / np.sqrt(n))
        p_value = float(2 * stdtr(n - 1, -abs(statistic)))
    return PairedTest(interval.mean, interval.half_width, p_value, n)


def compare_segments(
    ours: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray], *, n_draws: int = 10_000, seed: int = 0
) -> SegmentTest:
    """Test by a paired bootstrap over test segments whether a mean over segments differs from the baseline's.

    Both map a shift to one number a test segment, float [n] in the same order: whether it is right, or the share of
    seeds in which it is. The difference is the mean over shifts of the mean over segments; segments are resampled
    within each shift. The test is of these trained networks on other segments, not of another training. Average
    precision is not a mean over segments and cannot be tested so. Raises RunError naming the shift that does not fit.
    """
    if not ours or set(ours) != set(baseline):
        raise RunError(f"segments of shifts {sorted(ours)} can't be compared with those of {sorted(baseline)}")
    rng = np.random.default_rng(seed)
    means, drawn = [], []
    for shift, values in ours.items():
        if values.shape != baseline[shift].shape or values.ndim != 1 or len(values) < 2:
            raise RunError(f"{shift}: {list(values.shape)} and {list(baseline[shift].shape)} aren't 2 or more segments")
        differences = np.subtract(values, baseline[shift], dtype=np.float64)
        _check(differences, f"{shift}: differences of segments")
        # Equivalent to drawing n segments with replacement: count how often each distinct difference is drawn.
        distinct, counts = np.unique(differences, return_counts=True)
        n = len(differences)
        drawn.append(rng.multinomial(n, counts / n, size=n_draws) @ distinct / n)
        means.append(differences.mean())
    averages = np.mean(drawn, axis=0)
    low, high = np.quantile(averages, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    n_beyond = min(int((averages <= 0).sum()), int((averages >= 0).sum()))
    return SegmentTest(
        difference=float(np.mean(means)),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (n_beyond + 1) / (n_draws + 1)),
        n=sum(map(len, ours.values())),
    )


def _check(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise RunError(f"{what}: {len(numbers)} values, {int((~np.isfinite(numbers)).sum())} of them not finite")
    return numbers
