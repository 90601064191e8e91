"""The few statistics that tables and verdicts need: means with intervals, differences and their tests, a line's fit."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import special

from entreg.errors import InputError

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: the point estimate.
        low: lower end of the interval, or None when a single value gives none.
        high: upper end, or None.
        count: how many values it rests on, at least 1.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """``(low, high)``, or None when a single value gives no interval."""
        if self.low is None or self.high is None:
            return None
        return (self.low, self.high)


@dataclass(frozen=True)
class DifferenceTest:
    """A difference of two means, and how likely one at least as large is by chance.

    Attributes:
        difference: first mean minus second with its interval; ``count`` is the number of pairs, or of all values of
            both sides without pairs.
        p_value: two-sided, of the null hypothesis that the means are equal; None when a single pair gives none.
    """

    difference: Estimate
    p_value: float | None


@dataclass(frozen=True)
class LinearFit:
    """Least-squares line ``y = intercept + slope * x`` and the share of the variance of y that it explains."""

    slope: float
    intercept: float
    r_squared: float
    count: int


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean with the two-sided Student t interval.

    Args:
        values: at least one finite number; independent repeats (seeds), not rounds of one timing.
        level: coverage, in (0, 1).

    Raises:
        InputError: no values, a value that is not finite, or a level out of range.
    """
    sample = _sample(values, "values")
    if not 0.0 < level < 1.0:
        raise InputError(f"level must lie strictly between 0 and 1, not {level}.")
    mean = float(np.mean(sample))
    if sample.size == 1:
        return Estimate(mean, None, None, 1)
    # The quantile from scipy.special: scipy.stats alone takes a second to load.
    error = float(np.std(sample, ddof=1)) / math.sqrt(sample.size)
    half = float(special.stdtrit(sample.size - 1, 0.5 + level / 2.0)) * error
    return Estimate(mean, mean - half, mean + half, int(sample.size))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean of ``ours - theirs`` over pairs (same seed, same data) with its t interval.

    Raises:
        InputError: different lengths, no values, or a value that is not finite.
    """
    return paired_test(ours, theirs, level).difference


def paired_test(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> DifferenceTest:
    """Student's t test of ``first - second`` over pairs (same seed, same item).

    Where all differences are equal there is no spread to judge by: p is 1 if they are zero and 0 otherwise.

    Raises:
        InputError: as :func:`paired_difference`.
    """
    left, right = _pairs(first, second)
    differences = left - right
    found = mean_and_interval(differences, level)
    if found.count == 1:
        return DifferenceTest(found, None)
    error = float(np.std(differences, ddof=1)) / math.sqrt(found.count)
    return DifferenceTest(found, _two_sided(found.mean, error, found.count - 1))


def welch_test(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> DifferenceTest:
    """Welch's t test of two independent samples, which need not have the same spread or size.

    Raises:
        InputError: fewer than two values on a side, a value that is not finite, or a level out of range.
    """
    samples = (_sample(first, "the first values"), _sample(second, "the second values"))
    if min(sample.size for sample in samples) < 2:
        raise InputError("Welch's test needs at least two values on each side.")
    if not 0.0 < level < 1.0:
        raise InputError(f"level must lie strictly between 0 and 1, not {level}.")
    mean = float(samples[0].mean() - samples[1].mean())
    count = sum(sample.size for sample in samples)
    variances = [float(np.var(sample, ddof=1)) / sample.size for sample in samples]
    error = math.sqrt(sum(variances))
    if error == 0.0:
        return DifferenceTest(Estimate(mean, mean, mean, count), _two_sided(mean, error, 1.0))
    # Welch and Satterthwaite's degrees of freedom.
    freedom = error**4 / sum(v**2 / (sample.size - 1) for v, sample in zip(variances, samples, strict=True))
    half = float(special.stdtrit(freedom, 0.5 + level / 2.0)) * error
    return DifferenceTest(Estimate(mean, mean - half, mean + half, count), _two_sided(mean, error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: below 0.05 means significant with at most 5 % chance that
    any of them is so wrongly.

    Raises:
        InputError: a value outside [0, 1].
    """
    if any(not 0.0 <= value <= 1.0 for value in p_values):
        raise InputError("p-values lie between 0 and 1.")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm_by_name(tests: Mapping[K, DifferenceTest | None]) -> dict[K, float]:
    """Holm's p-values of the tests of one table's column, without those that have none (a single pair, no test)."""
    values = {name: test.p_value for name, test in tests.items() if test is not None and test.p_value is not None}
    return dict(zip(values, holm(list(values.values())), strict=True))


def geometric_mean_ratio(numerators: Sequence[float], denominators: Sequence[float], level: float = 0.95) -> Estimate:
    """Geometric mean of the pairwise ratios, with the t interval of the log ratios mapped back.

    The right mean for speed-ups: swapping the two sides gives the reciprocal.

    Raises:
        InputError: different lengths, no values, or a value that is not positive and finite.
    """
    first, second = _pairs(numerators, denominators)
    if np.any(first <= 0) or np.any(second <= 0):
        raise InputError("A geometric mean of ratios needs positive numbers on both sides.")
    logs = mean_and_interval(np.log(first) - np.log(second), level)
    low, high = logs.interval or (None, None)
    return Estimate(
        math.exp(logs.mean),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
        logs.count,
    )


def exponential(value: Estimate) -> Estimate:
    """A difference of logarithms as a ratio: of losses, a ratio of perplexities."""
    ends = [None if end is None else math.exp(end) for end in (value.low, value.high)]
    return Estimate(math.exp(value.mean), *ends, value.count)


def linear_fit(x: Sequence[float], y: Sequence[float]) -> LinearFit:
    """Least-squares line through points.

    Args:
        x: at least two different finite numbers.
        y: as many finite numbers. When all are equal the line explains them fully: R^2 is 1.

    Raises:
        InputError: different lengths, fewer than two points, equal x, or a value that is not finite.
    """
    first, second = _pairs(x, y)
    if first.size < 2 or np.all(first == first[0]):
        raise InputError("A line's fit needs at least two points with different x.")
    centred = first - first.mean()
    slope = float(centred @ (second - second.mean()) / (centred @ centred))
    intercept = float(second.mean() - slope * first.mean())
    residual = float(np.sum((second - intercept - slope * first) ** 2))
    total = float(np.sum((second - second.mean()) ** 2))
    r_squared = 1.0 if total == 0.0 else 1.0 - residual / total
    return LinearFit(slope, intercept, r_squared, int(first.size))


def _two_sided(mean: float, error: float, freedom: float) -> float:
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2.0 * special.stdtr(freedom, -abs(mean) / error))


def _sample(values: Sequence[float], name: str) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise InputError(f"{name} must be a non-empty sequence of numbers.")
    if not np.all(np.isfinite(sample)):
        raise InputError(f"{name} must be finite; leave out failed runs and say so in the table.")
    return sample


def _pairs(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    left, right = _sample(first, "the first values"), _sample(second, "the second values")
    if left.size != right.size:
        raise InputError(f"Paired values must be as many on both sides, not {left.size} and {right.size}.")
    return left, right
