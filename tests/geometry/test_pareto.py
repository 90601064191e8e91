"""The Pareto front against the definition and against a plain scan of exact values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.errors import InputError
from entreg.geometry import pareto_front
from entreg.geometry.generators import generate
from entreg.geometry.pareto import front_by_filter
from tests.geometry.exact_oracle import pareto_indices
from tests.geometry.strategies import point_sets


def by_definition(points):
    """Quadratic: keeps what no other point dominates, then the first of equal points."""
    x, y = points[:, 0], points[:, 1]
    at_least = (x[:, None] >= x) & (y[:, None] >= y)
    larger = (x[:, None] > x) | (y[:, None] > y)
    front = np.flatnonzero(~(at_least & larger).any(axis=0))
    _, first = np.unique(x[front] + 0.0, return_index=True)
    return front[first].tolist()


@settings(max_examples=800, deadline=None)
@given(point_sets())
def test_small_inputs_equal_the_definition(points):
    expected = by_definition(points)
    assert pareto_indices(points) == expected
    front = pareto_front(points)
    assert front.dtype == np.int64
    assert front.tolist() == expected


def check_every_path(points, sample, bins, tasks, worthwhile):
    sample = min(sample, len(points))
    expected = pareto_indices(points)
    assert front_by_filter(points, 1, sample, bins, worthwhile, 1).tolist() == expected
    assert front_by_filter(points, 2, sample, bins, worthwhile, tasks).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(point_sets(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.sampled_from([-1.0, 1.0]))
def test_every_path_equals_the_oracle(points, sample, bins, tasks, worthwhile):
    check_every_path(points, sample, bins, tasks, worthwhile)


@pytest.mark.exhaustive
@settings(max_examples=15_000, deadline=None)
@given(point_sets(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.sampled_from([-1.0, 1.0]))
def test_every_path_equals_the_oracle_long(points, sample, bins, tasks, worthwhile):
    check_every_path(points, sample, bins, tasks, worthwhile)


@pytest.mark.parametrize("shape", ["square", "disk", "gaussian", "circle_ordered", "parabola", "clusters"])
@pytest.mark.parametrize("n", [3_000, 420_000])
def test_large_inputs_equal_the_oracle(shape, n):
    points = generate(shape, n, seed=n)
    front = pareto_front(points)
    assert front.tolist() == pareto_indices(points)
    assert np.array_equal(front, pareto_front(points, threads=1))


@pytest.mark.parametrize("n", [3_000, 420_000])
def test_everything_on_the_front(n):
    x = np.random.default_rng(0).permutation(n).astype(np.float64)
    front = pareto_front(np.stack([x, -x], axis=1))
    assert np.array_equal(x[front], np.arange(n))


@pytest.mark.parametrize("n", [1, 2_000, 420_000])
def test_equal_points_are_represented_by_the_first(n):
    assert pareto_front(np.full((n, 2), 0.5)).tolist() == [0]
    assert pareto_front(np.concatenate([np.zeros((1, 2)), np.full((n, 2), 0.5)])).tolist() == [1]


def test_one_dominating_point_and_ties():
    points = np.array([[0.0, 2.0], [1.0, 2.0], [1.0, 1.0], [2.0, 1.0], [2.0, 0.0], [2.0, 1.0]])
    assert pareto_front(points).tolist() == [1, 3]
    assert pareto_front(np.vstack([points, [[2.0, 2.0]]])).tolist() == [6]


@pytest.mark.parametrize("n", [1, 3_000, 420_000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_coordinates_are_refused_wherever_they_stand(n, value):
    points = generate("square", n, seed=0)
    for row in (0, n // 2, n - 1):
        for column in (0, 1):
            damaged = points.copy()
            damaged[row, column] = value
            with pytest.raises(InputError, match=f"point {row} "):
                pareto_front(damaged)


def test_no_points_are_refused():
    with pytest.raises(InputError, match="At least 1 point"):
        pareto_front(np.empty((0, 2)))


def test_threads_are_validated():
    for threads in (0, "2", True):
        with pytest.raises(InputError, match="threads"):
            pareto_front(np.zeros((5, 2)), threads=threads)
