"""The triangulation against an exact oracle and SciPy, through every path that the size of the input selects."""

import importlib
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.spatial
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from entreg.errors import InputError
from entreg.geometry import delaunay, delaunay_predicates
from entreg.geometry.delaunay_predicates import ANGLE_BOUND, CROSS_BOUND, LARGEST_SCALED, MARGIN
from tests.geometry.delaunay_oracle import assert_delaunay
from tests.geometry.exact_oracle import hull_indices, in_circle, integer_points, orientation
from tests.geometry.strategies import point_sets

module = importlib.import_module("entreg.geometry.delaunay")
# Parts of kernels have no wrapper for Python of their own.
angle_parts, is_above, is_inside, is_left_turn = (
    njit(getattr(delaunay_predicates, name).py_func)
    for name in ("angle_parts", "is_above", "is_inside", "is_left_turn")
)


@contextmanager
def thresholds(parallel_points, block_points, column_limit):
    """Let small inputs take the paths of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PARALLEL_POINTS", parallel_points)
        patch.setattr(module, "_BLOCK_POINTS", block_points)
        patch.setattr(module, "_COLUMN_LIMIT", column_limit)
        yield


def edge_set(simplices):
    pairs = np.concatenate((simplices[:, [0, 1]], simplices[:, [1, 2]], simplices[:, [2, 0]]))
    return np.unique(np.sort(pairs, axis=1), axis=0)


def morton_order(points):
    """Indices of points of the unit square along the Z curve of a 65536 x 65536 grid."""
    cells = (points * 65536).astype(np.uint64)
    key = np.zeros(len(points), np.uint64)
    for bit in range(16):
        for axis in range(2):
            key |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return np.argsort(key, kind="stable")


@st.composite
def clustered_sets(draw):
    """Lattices, circles, rounded and nearly rounded points, all magnitudes, clusters within clusters."""
    rng = np.random.default_rng(draw(st.integers(0, 2**63)))
    count = int(rng.integers(3, 30)) if rng.random() < 0.9 else int(rng.integers(30, 120))
    kind = draw(st.integers(0, 9))
    signs = rng.choice([-1, 1], (count, 2))
    if kind == 0:
        points = rng.random((count, 2))
    elif kind == 1:
        points = rng.integers(0, int(rng.integers(2, 8)), (count, 2)) * rng.choice([1.0, 0.1, 1e-300, 1e300])
    elif kind == 2:
        points = np.nextafter(np.round(rng.random((count, 2)) * 4) / 4, rng.choice([-1, 0.5, 2], (count, 2)))
    elif kind == 3:
        points = rng.uniform(-1.79, 1.79, (count, 2)) * 1e308
    elif kind == 4:
        points = rng.integers(-9, 9, (count, 2)) * 5e-324
    elif kind == 5:
        points = np.exp(rng.uniform(-700, 700, (count, 2))) * signs
    elif kind == 6:
        angles = rng.integers(0, 16, count) * (np.pi / 8)
        points = np.stack((np.cos(angles), np.sin(angles)), axis=1) * rng.choice([1, 1, 2], (count, 1))
    elif kind == 7:
        points = np.where(rng.random((count, 1)) < 0.5, 1.0, 10.0 ** -rng.integers(1, 300, (count, 1))) * rng.random(
            (count, 2)
        )
    elif kind == 8:
        points = rng.random((3, 2))[rng.integers(0, 3, count)]
        points = points + rng.integers(-2, 3, (count, 2)) * 10.0 ** -rng.integers(5, 18)
    else:
        points = rng.random((count, 2)).astype(np.float32)
    return points


def check(points, threads, parallel, block_points, column_limit):
    with thresholds(0 if parallel else 10**9, block_points, column_limit):
        if len(hull_indices(points)) < 3:
            with pytest.raises(InputError):
                delaunay(points, threads=threads)
        else:
            assert_delaunay(points, delaunay(points, threads=threads))


fuzz = given(
    points=st.one_of(clustered_sets(), clustered_sets(), point_sets(30).filter(lambda points: len(points) > 2)),
    threads=st.integers(1, 2),
    parallel=st.booleans(),
    block_points=st.sampled_from([2, 5, 20]),
    column_limit=st.sampled_from([1, 3, 12]),
)


@pytest.mark.slow
@settings(max_examples=2500, deadline=None, derandomize=True)
@fuzz
def test_fuzz(points, threads, parallel, block_points, column_limit):
    check(points, threads, parallel, block_points, column_limit)


@pytest.mark.exhaustive
@settings(max_examples=40_000, deadline=None)
@fuzz
def test_fuzz_exhaustive(points, threads, parallel, block_points, column_limit):
    check(points, threads, parallel, block_points, column_limit)


def four_points(kind, rng):
    if kind == 0:
        return np.nextafter(np.round(rng.random((4, 2)) * 4) / 4, rng.choice([-1, 0.5, 2], (4, 2)))
    if kind == 1:
        return rng.integers(-3, 4, (4, 2)) * 0.1
    if kind == 2:
        return rng.integers(-3, 4, (4, 2)) * 10.0 ** -rng.integers(0, 300, (4, 1))
    if kind == 3:
        return 1 + rng.integers(-3, 4, (4, 2)) * 2.0**-52
    return rng.integers(-(2**24), 2**24, (4, 2)) * 2.0**-10


def test_comparisons_against_integers():
    rng = np.random.default_rng(7)
    inside = 0
    for case in range(20_000):
        points = four_points(case % 5, rng)
        flat = points.ravel().copy()
        left, right, c, d = integer_points(points)
        above = orientation(left, right, c) > 0
        assert is_above(flat, 0, 1, 2) == above
        assert is_left_turn(flat, flat, 0, 1, 2) == above
        if above and orientation(left, right, d) > 0:
            expected = in_circle(left, right, c, d) > 0
            inside += expected
            assert is_inside(flat, 0, 1, 2, 3) == expected
            dot_c, cross_c, span_c = angle_parts(flat, *flat[:4], 2)
            dot_d, cross_d, span_d = angle_parts(flat, *flat[:4], 3)
            assert cross_c >= -(CROSS_BOUND * span_c + MARGIN)
            excess = dot_d * cross_c - dot_c * cross_d
            if abs(excess) > ANGLE_BOUND * (span_c * span_d) + MARGIN:
                assert (excess < 0) == expected
    assert inside > 1000


def test_high_part_zero_is_not_zero():
    # The angle at d is right up to the square of an ulp: the high part of its dot product is 0, the low part is not.
    points = [
        (0.7500000000000001, 0.5000000000000001),
        (0.7499999999999999, 1.0000000000000002),
        (0.7499999999999999, 0.5000000000000001),
        (0.49999999999999994, 0.7500000000000001),
    ]
    flat = np.array(points).ravel()
    assert is_inside(flat, 0, 1, 2, 3) == (in_circle(*integer_points(points)) > 0)


@pytest.mark.parametrize("count", [3, 4, 10, 100, 3000, 40_000])
def test_same_as_scipy(count):
    points = np.random.default_rng(count).standard_normal((count, 2))
    ours = delaunay(points)
    theirs = scipy.spatial.Delaunay(points)
    assert np.array_equal(ours.edges, edge_set(theirs.simplices))
    assert ours.simplices.dtype == ours.neighbors.dtype == ours.convex_hull.dtype == ours.coplanar.dtype == np.int32
    assert ours.coplanar.shape == theirs.coplanar.shape

    def facets(hull):
        return {frozenset(edge) for edge in hull.tolist()}

    assert facets(ours.convex_hull) == facets(theirs.convex_hull)

    def adjacency(result):
        triangles = [frozenset(corners) for corners in result.simplices.tolist()]
        return {
            (triangles[i], result.simplices[i, k], triangles[j] if j >= 0 else None)
            for i, row in enumerate(result.neighbors.tolist())
            for k, j in enumerate(row)
        }

    if count <= 3000:
        assert adjacency(ours) == adjacency(theirs)


def test_threads_do_not_matter():
    points = np.random.default_rng(0).random((60_000, 2))
    points[:20_000] = np.round(points[:20_000], 2)
    results = [delaunay(points, threads=threads) for threads in (1, 2, 3)]
    for other in results[1:]:
        for name in ("simplices", "neighbors", "convex_hull", "coplanar"):
            assert np.array_equal(getattr(results[0], name), getattr(other, name))
    assert_delaunay(points, results[0])


@pytest.mark.parametrize("parallel_points", [0, 10**9])
def test_morton_order_is_not_sorted_again(monkeypatch, parallel_points):
    points = np.random.default_rng(3).random((5000, 2))
    points[:2] = [[0, 0], [1, 1]]
    points = points[morton_order(np.minimum(points, 1 - 1e-9))]
    monkeypatch.setattr(module, "_PARALLEL_POINTS", parallel_points)
    sorted_result = delaunay(points, order="sort", threads=2)

    def refuse(*arguments):
        raise AssertionError("sorted again")

    monkeypatch.setattr(module, "_sort", refuse)
    result = delaunay(points, threads=2)
    assert_delaunay(points, result)
    assert np.array_equal(result.simplices, sorted_result.simplices)
    if parallel_points == 0:
        with pytest.raises(AssertionError, match="sorted again"):
            delaunay(points[::-1], threads=2)


def test_duplicates():
    rng = np.random.default_rng(1)
    points = rng.random((50, 2))[rng.integers(0, 50, 20_000)]
    result = delaunay(points)
    assert_delaunay(points, result)
    assert len(result.coplanar) == 20_000 - len(np.unique(points, axis=0))


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e6])
def test_grid(offset):
    side = np.arange(60) * 0.1 + offset
    points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    points = np.random.default_rng(2).permutation(points)
    assert_delaunay(points, delaunay(points))


def test_circle_and_centre():
    angles = np.random.default_rng(2).random(2000) * 2 * np.pi
    points = np.concatenate((np.stack((np.cos(angles), np.sin(angles)), axis=1), [[0.0, 0.0]]))
    assert_delaunay(points, delaunay(points))


def test_clusters_far_smaller_than_the_extent():
    rng = np.random.default_rng(4)
    points = rng.random((400, 2)) * 10.0 ** -rng.integers(0, 200, (400, 1)) + rng.integers(0, 2, (400, 1))
    points = np.concatenate((points, [[1e300, -1e300], [3e300, 1e299]]))
    assert_delaunay(points, delaunay(points))


@pytest.mark.parametrize("exponent", [-1000, -400, -61, 62, 900])
def test_powers_of_two_do_not_matter(exponent):
    points = np.random.default_rng(5).random((500, 2)) - 0.5
    expected = delaunay(points)
    factor = 2.0**exponent
    assert not 1 / LARGEST_SCALED <= np.abs(points * factor).max() <= LARGEST_SCALED
    assert np.array_equal(delaunay(points * factor).simplices, expected.simplices)


def test_layouts_and_types():
    points = np.random.default_rng(6).random((300, 2)).astype(np.float32)
    expected = delaunay(points.astype(np.float64)).simplices
    wide = np.zeros((300, 4))
    wide[:, ::2] = points
    for variant in (points, np.asfortranarray(points), wide[:, ::2], points.tolist()):
        assert np.array_equal(delaunay(variant).simplices, expected)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[0, 0], [1, 0], [np.nan, 1]], "finite"),
        ([[0, 0], [1, 0], [0, np.inf]], "finite"),
        ([0, 1, 2], "shape"),
        (np.zeros((3, 3)), "shape"),
        (np.zeros((0, 2)), "At least 3"),
        ([[0, 0], [1, 1]], "At least 3"),
        (np.ones((5, 2)), "three distinct"),
        ([[0, 0], [1, 1], [0, 0], [1, 1]], "three distinct"),
        ([[0, 0], [1, 1], [2, 2], [3, 3]], "collinear"),
        ([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.7, 0.7]], "collinear"),
        (np.full((20_000, 2), 0.5), "three distinct"),
        (np.repeat(np.arange(20_000.0)[:, None], 2, axis=1), "collinear"),
        (np.where(np.arange(40_000).reshape(-1, 2) == 39_999, np.nan, 1.0), "point 19999"),
    ],
)
def test_bad_input(points, message):
    with pytest.raises(InputError, match=message) as caught:
        delaunay(points)
    assert "\n" not in str(caught.value)


def test_unknown_order():
    with pytest.raises(InputError, match="order must be one of 'auto', 'sort'"):
        delaunay(np.eye(3, 2), order="hilbert")


def test_too_many_points(monkeypatch):
    monkeypatch.setattr(module, "_MOST_POINTS", 4)
    with pytest.raises(InputError, match="At most 4 points"):
        delaunay(np.random.default_rng(0).random((5, 2)))
