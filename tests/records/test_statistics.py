import math

import numpy as np
import pytest
from scipy import stats

from entreg.errors import InputError
from entreg.records.statistics import (
    geometric_mean_ratio,
    holm,
    linear_fit,
    mean_and_interval,
    paired_difference,
    paired_test,
    welch_test,
)


def test_mean_and_interval_by_hand():
    # n = 3: t(0.975, 2) = 4.302653, standard deviation 1, so the half-width is 4.302653 / sqrt(3).
    result = mean_and_interval([1.0, 2.0, 3.0])
    assert (result.mean, result.count) == (2.0, 3)
    assert result.high - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert 2.0 - result.low == pytest.approx(result.high - 2.0)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_mean_and_interval_against_scipy(level):
    values = np.random.default_rng(0).normal(3.0, 2.0, 11)
    low, high = stats.t.interval(level, 10, loc=values.mean(), scale=stats.sem(values))
    assert mean_and_interval(values, level).interval == pytest.approx((low, high), rel=1e-12)


def test_the_interval_covers_at_its_level():
    draws = np.random.default_rng(1).normal(0.0, 1.0, (4000, 4))
    inside = sum(result.low <= 0.0 <= result.high for result in map(mean_and_interval, draws))
    # Four standard errors of a share of 0.95 among 4000.
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_value_has_no_interval_and_equal_values_an_empty_one():
    assert mean_and_interval([5.0]).interval is None
    assert mean_and_interval([5.0, 5.0]).interval == (5.0, 5.0)


def test_paired_difference_is_the_paired_t_test():
    generator = np.random.default_rng(2)
    ours, theirs = generator.normal(size=9), generator.normal(size=9)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert paired_difference(ours, theirs).interval == pytest.approx((expected.low, expected.high), rel=1e-10)


def test_geometric_mean_ratio():
    result = geometric_mean_ratio([2.0, 8.0], [1.0, 1.0])
    assert result.mean == pytest.approx(4.0)
    low, high = result.interval
    assert math.sqrt(low * high) == pytest.approx(4.0)
    swapped = geometric_mean_ratio([1.0, 1.0], [2.0, 8.0])
    assert swapped.mean == pytest.approx(0.25)
    assert swapped.interval == pytest.approx((1 / high, 1 / low))
    assert geometric_mean_ratio([3.0], [2.0]).interval is None


def test_linear_fit_recovers_a_line_and_agrees_with_scipy():
    x = np.linspace(0.0, 5.0, 20)
    exact = linear_fit(x, 2.0 * x - 1.0)
    assert (exact.slope, exact.intercept, exact.r_squared) == pytest.approx((2.0, -1.0, 1.0))
    y = 2.0 * x + np.random.default_rng(3).normal(size=20)
    expected = stats.linregress(x, y)
    fit = linear_fit(x, y)
    assert (fit.slope, fit.intercept) == pytest.approx((expected.slope, expected.intercept))
    assert fit.r_squared == pytest.approx(expected.rvalue**2)
    assert linear_fit([0, 1], [3, 3]).r_squared == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_and_interval([]), "non-empty"),
        (lambda: mean_and_interval([[1.0], [2.0]]), "non-empty sequence"),
        (lambda: mean_and_interval([1.0, math.nan]), "finite"),
        (lambda: mean_and_interval([1.0], 1.0), "level"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "as many on both sides"),
        (lambda: geometric_mean_ratio([1.0, 0.0], [1.0, 1.0]), "positive"),
        (lambda: linear_fit([1.0, 1.0], [1.0, 2.0]), "different x"),
        (lambda: linear_fit([1.0], [1.0]), "at least two"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call()


def samples(seed, first=7, second=5):
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, 0.3, first), rng.normal(1.4, 2.0, second)


@pytest.mark.parametrize("seed", range(4))
def test_tests_of_a_difference_against_scipy(seed):
    first, second = samples(seed, 6, 6)
    found, expected = paired_test(first, second), stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.difference.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    first, second = samples(seed)
    found, expected = welch_test(first, second, 0.9), stats.ttest_ind(first, second, equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.difference.interval == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-9)
    assert found.difference.mean == pytest.approx(first.mean() - second.mean())


def test_differences_without_spread():
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert paired_test([1.5, 2.5], [1.0, 2.0]).p_value == 0.0
    assert paired_test([1.5], [1.0]).p_value is None
    assert welch_test([1.0, 1.0], [1.0, 1.0]).p_value == 1.0
    assert welch_test([2.0, 2.0], [1.0, 1.0]).p_value == 0.0
    for values in ([1.0], []):
        with pytest.raises(InputError):
            welch_test(values, [1.0, 2.0])


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, never falling.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(InputError):
        holm([1.2])


def test_holm_rejects_at_most_five_per_cent_of_families_wrongly():
    draws = np.random.default_rng(3).uniform(size=(4000, 8))
    wrong = sum(min(holm(list(row))) < 0.05 for row in draws)
    assert abs(wrong / 4000 - (1 - (1 - 0.05 / 8) ** 8)) < 4 * math.sqrt(0.05 * 0.95 / 4000)
