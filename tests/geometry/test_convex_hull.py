"""The convex hull against exact integer arithmetic, Qhull and GEOS."""

import threading

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from entreg.errors import InputError
from entreg.geometry import _hull_paths as paths
from entreg.geometry import convex_hull
from entreg.geometry._chains import hull_of_candidates
from entreg.geometry.generators import generate
from tests.geometry.exact_oracle import hull_indices
from tests.geometry.strategies import point_sets

SHAPES = ["square", "disk", "gaussian", "circle", "circle_ordered", "parabola", "clusters"]


def check(points):
    expected = hull_indices(points)
    if len(expected) < 3:
        with pytest.raises(InputError):
            convex_hull(points)
    else:
        hull = convex_hull(points)
        assert hull.dtype == np.int64
        assert hull.tolist() == expected


def check_every_path(points, sample, bins, tasks):
    """All private routes to the hull, also those that the public function takes only for large inputs."""
    expected = hull_indices(points)
    sample = min(sample, len(points))
    for hull in (
        paths.hull_by_filter(points, 1, sample, bins, 1.0, 1, 1),
        paths.hull_by_filter(points, 2, sample, bins, 1.0, tasks, tasks),
        paths.hull_by_slabs(points, 2, paths.ALL, tasks, 4 * tasks),
        paths.hull_by_runs(points, 2, tasks, 64),
        hull_of_candidates(points, paths.ALL, True),
    ):
        assert len(hull) == len(expected) if len(expected) < 3 else hull.tolist() == expected


@settings(max_examples=1200, deadline=None)
@given(point_sets())
def test_small_inputs_equal_exact_integers(points):
    check(points)


@settings(max_examples=300, deadline=None)
@given(point_sets(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_every_path_equals_exact_integers(points, sample, bins, tasks):
    check_every_path(points, sample, bins, tasks)


@pytest.mark.exhaustive
@settings(max_examples=30_000, deadline=None)
@given(point_sets())
def test_small_inputs_equal_exact_integers_long(points):
    check(points)


@pytest.mark.exhaustive
@settings(max_examples=15_000, deadline=None)
@given(point_sets(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_every_path_equals_exact_integers_long(points, sample, bins, tasks):
    check_every_path(points, sample, bins, tasks)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [48, 49, 64, 65, 100, 1_499, 1_500])
def test_sizes_around_the_changes_of_algorithm(shape, n):
    check(generate(shape, n, seed=n))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2_000, 420_000])
def test_large_inputs_equal_qhull_or_exact_integers(shape, n):
    points = generate(shape, n, seed=n)
    hull = convex_hull(points)
    assert np.array_equal(hull, convex_hull(points, threads=1))
    if n <= 2_000:
        assert hull.tolist() == hull_indices(points)
    elif shape in ("square", "disk", "gaussian", "clusters"):
        # Qhull merges facets within a tolerance, which matters only where points are closer than that to an edge.
        assert set(hull) == set(ConvexHull(points).vertices)
    else:
        assert abs(shapely.Polygon(points[hull]).area - shapely.convex_hull(shapely.multipoints(points)).area) < 1e-12
        assert len(hull) > 0.9 * n


@pytest.mark.parametrize("runs", [1, 2, 3, 40])
def test_sorted_runs_equal_shuffled_input(runs):
    points = generate("sorted_runs", 30_000, seed=1, runs=runs)
    order = np.random.default_rng(0).permutation(len(points))
    assert np.array_equal(points[convex_hull(points)], points[order][convex_hull(points[order])])


@pytest.mark.parametrize("scale", [2.0**-1040, 2.0**-300, 1.0, 2.0**1020])
@pytest.mark.parametrize("shape", ["square", "circle"])
def test_scaling_by_powers_of_two(shape, scale):
    # Exact in binary, except that subnormal results lose bits: then the scaled set is compared with its own oracle.
    points = generate(shape, 3_000, seed=7) * scale
    assert convex_hull(points).tolist() == hull_indices(points)


def test_translation_far_from_the_origin_leaves_few_distinct_points():
    points = generate("square", 5_000, seed=2) * 2.0**-40 + 1.0
    assert convex_hull(points).tolist() == hull_indices(points)


def test_skewed_coordinates():
    rng = np.random.default_rng(5)
    points = np.exp(rng.uniform(-600, 600, size=(20_000, 2))) * rng.choice([-1.0, 1.0], size=(20_000, 2))
    expected = hull_indices(points)
    assert convex_hull(points).tolist() == expected
    assert paths.hull_by_slabs(points, 2, paths.ALL, 4, 64).tolist() == expected


def test_hull_is_convex_contains_all_points_and_starts_at_the_smallest():
    points = generate("disk", 50_000, seed=11)
    hull = convex_hull(points)
    corners = points[hull]
    assert tuple(corners[0]) == min(map(tuple, points))
    edges = np.roll(corners, -1, axis=0) - corners
    for corner, edge in zip(corners, edges, strict=True):
        offset = points - corner
        assert (edge[0] * offset[:, 1] - edge[1] * offset[:, 0]).min() > -1e-15


def test_first_index_among_duplicates():
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    points = np.concatenate([square[::-1], square, square])
    assert convex_hull(points).tolist() == [3, 2, 1, 0]
    assert convex_hull(np.tile(points, (500, 1))).tolist() == [3, 2, 1, 0]
    assert convex_hull(np.array([[0.0, 0.0], [-0.0, -0.0], [1.0, 0.0], [0.0, 1.0]])).tolist() == [0, 2, 3]


def test_points_on_edges_are_no_vertices():
    grid = np.stack(np.meshgrid(np.arange(60.0), np.arange(50.0)), axis=-1).reshape(-1, 2)
    assert grid[convex_hull(grid)].tolist() == [[0, 0], [59, 0], [59, 49], [0, 49]]


@pytest.mark.parametrize("n", [5, 3_000, 420_000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", ["square", "circle"])
def test_nonfinite_coordinates_are_refused_wherever_they_stand(n, value, shape):
    points = generate(shape, n, seed=0)
    for row in (0, n // 2, n - 1):
        for column in (0, 1):
            damaged = points.copy()
            damaged[row, column] = value
            with pytest.raises(InputError, match=f"point {row} "):
                convex_hull(damaged)


@pytest.mark.parametrize("n", [3, 10, 5_000, 420_000])
def test_degenerate_inputs_are_refused(n):
    line = np.arange(n, dtype=np.float64)
    with pytest.raises(InputError, match="lie on one"):
        convex_hull(np.stack([line, 3.0 * line + 1.0], axis=1))
    with pytest.raises(InputError, match="lie on one"):
        convex_hull(np.stack([np.ones(n), line], axis=1))
    with pytest.raises(InputError, match="lie on one"):
        convex_hull(np.stack([line % 2, line % 2], axis=1))
    with pytest.raises(InputError, match="equal"):
        convex_hull(np.full((n, 2), 0.1))


def test_threads_are_validated():
    points = generate("square", 100, seed=0)
    for threads in (0, -1, 1.5, True, "2"):
        with pytest.raises(InputError, match="threads"):
            convex_hull(points, threads=threads)


@pytest.mark.parametrize("shape", ["square", "circle"])
def test_concurrent_calls(shape):
    inputs = [generate(shape, 420_000, seed=seed) for seed in range(4)]
    expected = [convex_hull(points, threads=1) for points in inputs]
    results = [None] * 4

    def work(k):
        results[k] = convex_hull(inputs[k], threads=2)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_float32_input_is_taken_at_its_exact_values():
    points = generate("disk", 5_000, seed=4).astype(np.float32)
    assert convex_hull(points).tolist() == hull_indices(points)


def test_input_is_not_changed():
    points = generate("gaussian", 5_000, seed=4)
    before = points.copy()
    points.flags.writeable = False
    convex_hull(points)
    assert np.array_equal(points, before)
