"""Advice may cost time but never change an answer: exact oracles, whatever the advice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.errors import InputError
from entreg.experiments.geometry.speed.certificates import delaunay_defect, triangle_neighbors
from entreg.geometry import advice
from entreg.geometry.advice import advised_convex_hull, advised_delaunay, advised_order, advised_pareto_front
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.generators import DISTRIBUTIONS, generate
from entreg.geometry.pareto import pareto_front
from tests.geometry.exact_oracle import hull_indices, pareto_indices
from tests.geometry.strategies import point_sets

COMPASS = np.array([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4])


def advice_sets() -> st.SearchStrategy[np.ndarray]:
    """Sensible, useless and adversarial advice."""
    number = st.one_of(st.integers(-3, 3).map(float), st.floats(allow_nan=False, allow_infinity=False))
    garbage = st.lists(st.tuples(number, number), min_size=1, max_size=9).map(lambda rows: np.array(rows, dtype=float))
    return st.one_of(st.just(COMPASS), st.just(np.zeros((3, 2))), garbage)


@settings(max_examples=400, deadline=None)
@given(point_sets(), advice_sets())
def test_hull_is_exact_whatever_the_advice(points, directions):
    expected = hull_indices(points)
    if len(expected) < 3:
        with pytest.raises(InputError):
            advised_convex_hull(points, directions)
    else:
        assert advised_convex_hull(points, directions).tolist() == expected


@settings(max_examples=400, deadline=None)
@given(point_sets(), advice_sets())
def test_front_is_exact_whatever_the_advice(points, directions):
    assert advised_pareto_front(points, directions).tolist() == pareto_indices(points)


@settings(max_examples=200, deadline=None)
@given(point_sets(), advice_sets())
def test_triangulation_is_delaunay_whatever_the_advice(points, anchors):
    if len(hull_indices(points)) < 3:
        with pytest.raises(InputError):
            advised_delaunay(points, anchors)
        return
    simplices = advised_delaunay(points, anchors)
    oriented, neighbors = triangle_neighbors(points, simplices)
    assert neighbors is not None
    assert delaunay_defect(points, oriented, neighbors) is None


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_large_sets_agree_with_the_unadvised_algorithms(distribution):
    points = generate(distribution, 120_000, 3)
    rng = np.random.default_rng(0)
    for directions in (COMPASS, rng.standard_normal((5, 2)), np.ones((1, 2)), 1e300 * rng.standard_normal((4, 2))):
        np.testing.assert_array_equal(advised_convex_hull(points, directions), convex_hull(points))
        np.testing.assert_array_equal(advised_pareto_front(points, directions), pareto_front(points))


def test_good_advice_drops_nearly_everything_and_bad_advice_nothing():
    points = generate("square", 100_000, 0)
    assert len(advice._survivors(points, COMPASS, advice._interior_filter, 2)) < 5_000
    assert advice._survivors(points, COMPASS[:1], advice._interior_filter, 2) is None
    assert len(advice._survivors(points, np.abs(COMPASS), advice._dominated_filter, 2)) < 5_000
    assert advice._survivors(generate("circle", 50_000, 0), COMPASS, advice._interior_filter, 1) is None


def test_threads_do_not_matter():
    points = generate("disk", 200_000, 1)
    np.testing.assert_array_equal(
        advised_convex_hull(points, COMPASS, threads=1), advised_convex_hull(points, COMPASS, threads=4)
    )


def test_order_is_a_permutation_that_keeps_cells_together():
    points = generate("square", 5_000, 0)
    anchors = np.array([[0.2, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.8]])
    order = advised_order(points, anchors)
    assert np.array_equal(np.sort(order), np.arange(5_000))
    cells = (points[order] > 0.5) @ [1, 2]
    assert np.count_nonzero(np.diff(cells)) == 3
    step = np.hypot(*np.diff(points[order], axis=0).T).mean()
    assert step < 0.1 * np.hypot(*np.diff(points, axis=0).T).mean()


@pytest.mark.parametrize("function", [advised_convex_hull, advised_pareto_front, advised_delaunay])
@pytest.mark.parametrize(
    "wrong", [np.zeros((0, 2)), np.zeros((3, 3)), np.zeros(2), [[0.0, np.nan]], [[1.0, 0.0], [np.inf, 0.0]]]
)
def test_malformed_advice_is_refused(function, wrong):
    with pytest.raises(InputError, match="must"):
        function(generate("square", 50, 0), wrong)


@pytest.mark.parametrize("function", [advised_convex_hull, advised_pareto_front, advised_delaunay])
def test_non_finite_points_are_named_by_their_own_row(function):
    points = generate("square", 3_000, 0)
    points[1234, 1] = np.nan
    with pytest.raises(InputError, match="1234"):
        function(points, COMPASS)
