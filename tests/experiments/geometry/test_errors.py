"""Error measures against closed forms, brute force and shapely."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, Delaunay
from scipy.spatial.distance import pdist

from entreg.errors import InputError
from entreg.experiments.geometry.errors import (
    convex_diameter,
    convex_hausdorff,
    hull_error,
    hypervolume,
    pareto_error,
    polygon_area,
    triangulation_edges,
    triangulation_error,
)
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.generators import generate
from entreg.geometry.pareto import pareto_front

SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def hull_of(points: np.ndarray) -> np.ndarray:
    return points[ConvexHull(points).vertices]


def brute_hausdorff(first: np.ndarray, second: np.ndarray) -> float:
    """Distances to a convex region are convex, so their maxima lie at corners."""
    regions = shapely.Polygon(first), shapely.Polygon(second)
    return max(
        max(regions[1].distance(shapely.Point(p)) for p in first),
        max(regions[0].distance(shapely.Point(p)) for p in second),
    )


def test_area_keeps_its_digits_far_from_the_origin():
    assert polygon_area(SQUARE) == 1.0
    assert polygon_area(SQUARE[::-1]) == -1.0
    assert polygon_area(SQUARE + 2.0**40) == 1.0
    assert polygon_area(SQUARE[:2]) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 30), st.integers(3, 30), st.sampled_from([0.0, 0.3, 5.0]))
def test_hausdorff_and_diameter_against_brute_force(seed, first_count, second_count, shift):
    rng = np.random.default_rng(seed)
    first = hull_of(rng.standard_normal((first_count, 2)))
    second = hull_of(rng.standard_normal((second_count, 2)) * [2.0, 0.5] + shift)
    np.testing.assert_allclose(convex_hausdorff(first, second), brute_hausdorff(first, second), rtol=1e-9)
    np.testing.assert_allclose(convex_hausdorff(second, first), convex_hausdorff(first, second), rtol=1e-12)
    np.testing.assert_allclose(convex_diameter(first), pdist(first).max(), rtol=1e-12)


def test_hausdorff_of_degenerate_polygons():
    segment, point = SQUARE[:2], SQUARE[:1]
    assert convex_hausdorff(point, point) == 0.0
    np.testing.assert_allclose(convex_hausdorff(segment, point), 1.0, rtol=1e-15)
    np.testing.assert_allclose(convex_hausdorff(SQUARE, segment), 1.0, rtol=1e-15)
    np.testing.assert_allclose(convex_hausdorff(SQUARE, SQUARE + 3.0), 3.0 * np.sqrt(2.0), rtol=1e-15)
    np.testing.assert_allclose(convex_diameter(segment), 1.0, rtol=1e-15)
    assert convex_diameter(point) == 0.0
    with pytest.raises(InputError, match="at least one corner"):
        convex_hausdorff(SQUARE, SQUARE[:0])
    with pytest.raises(InputError, match="at least one corner"):
        convex_diameter(SQUARE[:0])


def test_a_circle_of_many_corners():
    points = generate("circle", 50_000, 0)
    polygon = points[convex_hull(points)]
    np.testing.assert_allclose(convex_diameter(polygon), 2.0, rtol=1e-6)
    np.testing.assert_allclose(convex_hausdorff(polygon, 0.9 * polygon), 0.1, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 6), st.integers(-2, 6)), min_size=1, max_size=12))
def test_hypervolume_counts_dominated_unit_squares(points):
    front = np.array(points, dtype=float)
    cells = [(i, j) for i in range(6) for j in range(6) if any(x >= i + 1 and y >= j + 1 for x, y in points)]
    assert hypervolume(front, np.zeros(2)) == len(cells)


def test_hull_error_of_an_exact_answer_is_zero_in_any_order():
    points = generate("disk", 500, 0)
    exact = convex_hull(points)
    result = hull_error(points, exact, exact[::-1])
    assert result == {
        "same_answer": True,
        "area_error": 0.0,
        "hausdorff": 0.0,
        "mapped_area_error": 0.0,
        "mapped_hausdorff": 0.0,
    }


def test_hull_error_reads_moved_points_in_both_ways():
    points = np.concatenate([SQUARE, [[0.5, 0.5]]])
    exact = convex_hull(points)
    # All points moved apart by half: the answer's area is 2.25, its indices are right.
    moved = 1.5 * points
    result = hull_error(points, exact, exact, moved)
    assert result["same_answer"]
    np.testing.assert_allclose(result["area_error"], 1.25)
    np.testing.assert_allclose(result["hausdorff"], 0.5)
    assert result["mapped_area_error"] == 0.0
    # The centre moved out and the answer names it instead of a corner.
    moved = points.copy()
    moved[4] = [1.0, 1.0]
    moved[2] = [0.5, 0.5]
    result = hull_error(points, exact, np.array([0, 1, 4, 3]), moved)
    assert not result["same_answer"]
    np.testing.assert_allclose(result["area_error"], 0.0, atol=1e-15)
    np.testing.assert_allclose(result["mapped_area_error"], 0.5)
    np.testing.assert_allclose(result["mapped_hausdorff"], 0.5)


def test_hull_error_of_an_answer_on_one_line():
    points = np.concatenate([SQUARE, [[0.5, 0.0]]])
    result = hull_error(points, convex_hull(points), np.array([0, 4, 1]))
    np.testing.assert_allclose(result["area_error"], 1.0)
    np.testing.assert_allclose(result["hausdorff"], 1.0 / np.sqrt(2.0))


def test_triangulation_error_counts_edges_and_inverted_triangles():
    points = np.array([[0.0, 0.0], [1.0, 0.1], [1.0, 1.0], [0.0, 0.9]])
    one_diagonal, other_diagonal = np.array([[0, 1, 3], [1, 2, 3]]), np.array([[0, 1, 2], [0, 2, 3]])
    assert len(triangulation_edges(one_diagonal)) == 5
    result = triangulation_error(points, one_diagonal, other_diagonal)
    assert not result["same_answer"]
    assert result["edges_kept"] == 4 / 5
    np.testing.assert_allclose(result["area_error"], 0.0, atol=1e-15)
    assert result["inverted"] == 0.0
    # On moved points where the corners 1 and 3 changed places, the triangles turn over when put back.
    moved = points[[0, 3, 2, 1]]
    turned = triangulation_error(points, one_diagonal, one_diagonal, moved)
    assert turned["same_answer"]
    assert turned["inverted"] == 1.0


def test_triangulation_error_of_qhull_on_random_points_is_zero():
    points = generate("square", 2_000, 0)
    simplices = Delaunay(points).simplices
    result = triangulation_error(points, simplices, simplices[::-1, [1, 2, 0]])
    assert result["same_answer"]
    assert result["edges_kept"] == 1.0
    assert result["inverted"] == 0.0


def test_pareto_error_against_direct_counting():
    points = np.array([[0.0, 0.0], [1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    exact = pareto_front(points)
    assert pareto_error(points, exact, exact)["area_error"] == 0.0
    # Without (2, 2) the unit square between 1 and 2 in both coordinates is lost: 1 of 6.
    result = pareto_error(points, exact, np.array([1, 3]))
    np.testing.assert_allclose(result["area_error"], 1 / 6)
    assert not result["same_answer"]
    moved = points + np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    result = pareto_error(points, exact, exact, moved)
    np.testing.assert_allclose(result["area_error"], 1 / 6)
    assert result["mapped_area_error"] == 0.0


def test_pareto_error_of_a_front_that_dominates_nothing():
    points = np.array([[0.0, 1.0], [1.0, 0.0]])
    exact = pareto_front(points)
    assert pareto_error(points, exact, exact)["area_error"] == 0.0
