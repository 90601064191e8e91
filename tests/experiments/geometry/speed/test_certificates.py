"""The certificates accept what is right and name what is wrong."""

import numpy as np
import pytest
import scipy.spatial

from entreg.experiments.geometry.speed.certificates import (
    canonical_indices,
    delaunay_defect,
    edge_keys,
    hull_defect,
    triangle_neighbors,
    triangle_set_fingerprint,
    vertex_set_difference,
)
from entreg.experiments.geometry.speed.rivals import HULL_RIVALS


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).random((300, 2))


@pytest.fixture
def triangulation(points) -> scipy.spatial.Delaunay:
    return scipy.spatial.Delaunay(points)


def test_hull_certificate(points):
    hull = HULL_RIVALS["x_sort_chain"](points)
    assert hull_defect(points, hull) is None
    assert "outside" in hull_defect(points, np.delete(hull, 3))
    assert "left to right" in hull_defect(points, np.roll(hull, 1))
    assert "left to right" in hull_defect(points, hull[::-1])
    inner = next(i for i in range(300) if i not in hull)
    assert hull_defect(points, np.insert(hull, 1, inner)) is not None
    assert "fewer" in hull_defect(points, hull[:2])


def test_hull_certificate_with_vertical_edges_and_points_on_edges():
    x, y = np.meshgrid(np.arange(5.0), np.arange(5.0))
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    assert hull_defect(grid, np.array([0, 4, 24, 20])) is None
    assert "strictly convex" in hull_defect(grid, np.array([0, 2, 4, 24, 20]))
    # One ulp beyond an edge is outside.
    moved = np.vstack([grid, [np.nextafter(4.0, 5.0), 2.0]])
    assert "1 points lie outside" in hull_defect(moved, np.array([0, 4, 24, 20]))


def test_delaunay_certificate_accepts_an_independent_library(points, triangulation):
    assert delaunay_defect(points, triangulation.simplices, triangulation.neighbors) is None


def test_delaunay_certificate_sees_a_flipped_edge(points, triangulation):
    simplices = triangulation.simplices.astype(np.int64)
    neighbors = triangulation.neighbors
    for t, u in ((t, neighbors[t, 0]) for t in range(len(simplices)) if neighbors[t, 0] >= 0):
        p, a, b = simplices[t]
        q = next(v for v in simplices[u] if v not in (a, b))
        flipped = simplices.copy()
        flipped[t], flipped[u] = (p, a, q), (p, q, b)
        oriented, fitting = triangle_neighbors(points, flipped)
        area = np.abs(_areas(points, oriented)).sum()
        if np.isclose(area, np.abs(_areas(points, simplices)).sum()):
            # The quadrilateral was convex: still a triangulation, no longer Delaunay.
            assert "locally Delaunay" in delaunay_defect(points, oriented, fitting)
            return
    pytest.fail("no convex quadrilateral found")


def _areas(points, simplices):
    a, b, c = (points[simplices[:, k]] for k in range(3))
    return ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2.0


def test_delaunay_certificate_names_other_defects(points, triangulation):
    simplices, neighbors = triangulation.simplices, triangulation.neighbors
    mirrored = simplices.copy()
    mirrored[0] = mirrored[0, ::-1]
    assert "counter-clockwise" in delaunay_defect(points, mirrored, neighbors)
    shifted = np.roll(neighbors, 1, axis=1)
    assert "neighbour" in delaunay_defect(points, simplices, shifted)
    keep = simplices[~(simplices == simplices[5, 0]).any(axis=1)]
    assert delaunay_defect(points, *triangle_neighbors(points, keep)) is not None
    extra = np.vstack([points, points[:1] + 1e-3])
    assert "distinct" in delaunay_defect(extra, simplices, neighbors)


def test_duplicates_count_once(points, triangulation):
    doubled = np.vstack([points, points])
    assert delaunay_defect(doubled, triangulation.simplices, triangulation.neighbors) is None
    assert np.array_equal(canonical_indices(doubled), np.tile(np.arange(300), 2))


def test_neighbours_from_triangles_alone(points, triangulation):
    mixed = triangulation.simplices.copy()
    mixed[::2] = mixed[::2, ::-1]
    assert delaunay_defect(points, *triangle_neighbors(points, mixed)) is None
    assert triangle_neighbors(points, np.vstack([mixed, mixed[:1]]))[1] is None


def test_fingerprint_and_edges_ignore_order_and_orientation(triangulation):
    simplices = triangulation.simplices
    rng = np.random.default_rng(4)
    shuffled = rng.permuted(simplices[rng.permutation(len(simplices))], axis=1)
    assert triangle_set_fingerprint(shuffled) == triangle_set_fingerprint(simplices)
    assert np.array_equal(edge_keys(shuffled, 300), edge_keys(simplices, 300))
    changed = simplices.copy()
    changed[0, 0] = next(v for v in range(300) if v not in changed[0])
    assert triangle_set_fingerprint(changed) != triangle_set_fingerprint(simplices)


def test_vertex_set_difference_counts_both_ways_and_knows_negative_zero():
    exact = np.array([[0.0, -0.0], [1.0, 0.0], [0.0, 1.0]])
    assert vertex_set_difference(exact, exact[::-1] + 0.0) == (0, 0)
    assert vertex_set_difference(exact, np.array([[0.0, 0.0], [5.0, 5.0]])) == (2, 1)
