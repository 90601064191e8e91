"""The rivals are only worth beating if they are right: each against Fraction arithmetic or a hand-made case."""

from fractions import Fraction

import numpy as np
import pytest

from entreg.experiments.geometry.speed.certificates import edge_keys, vertex_set_difference
from entreg.experiments.geometry.speed.rivals import (
    COMPARISON_HULLS,
    DELAUNAY_RIVALS,
    HULL_RIVALS,
    INPUT_ORDERS,
    PARETO_RIVALS,
    hilbert_order,
    hull_vertices,
)

EXACT_HULLS = {
    **COMPARISON_HULLS,
    "plain_filter": HULL_RIVALS["plain_filter"],
    "x_sort_chain": HULL_RIVALS["x_sort_chain"],
}


def rational_hull(points: np.ndarray) -> list[int]:
    """Gift wrapping in exact rational arithmetic: strict vertices, first index among duplicates."""
    exact = [(Fraction(float(x)), Fraction(float(y))) for x, y in points]
    first: dict[tuple[Fraction, Fraction], int] = {}
    for index, point in enumerate(exact):
        first.setdefault(point, index)
    distinct = sorted(first)

    def turn(a, b, c):
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    hull = [distinct[0]]
    while True:
        current = hull[-1]
        best = next(p for p in distinct if p != current)
        for p in distinct:
            t = turn(current, best, p)
            further = sum((x - y) ** 2 for x, y in zip(p, current, strict=True)) > sum(
                (x - y) ** 2 for x, y in zip(best, current, strict=True)
            )
            if p != current and (t < 0 or (t == 0 and further)):
                best = p
        if best == distinct[0]:
            return [first[p] for p in hull]
        hull.append(best)


def hard_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    grid = rng.integers(0, 6, size=(80, 2)).astype(np.float64)
    line = np.repeat(rng.random((40, 1)), 2, axis=1)
    almost_collinear = np.vstack([line, np.nextafter(line[:10], 1.0) * [1.0, 0.0] + line[:10] * [0.0, 1.0]])
    return {
        "grid with duplicates": grid,
        "one ulp beside a line": almost_collinear,
        "huge": rng.standard_normal((60, 2)) * 1e307,
        "tiny": rng.standard_normal((60, 2)) * 1e-310,
        "random": rng.random((60, 2)),
        "triangle": np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    }


@pytest.mark.parametrize("name", EXACT_HULLS)
@pytest.mark.parametrize("case", hard_cases())
def test_exact_textbook_hulls_agree_with_rational_arithmetic(name, case):
    points = hard_cases()[case]
    expected = points[rational_hull(points)]
    assert np.array_equal(points[EXACT_HULLS[name](points)], expected)


@pytest.mark.parametrize("name", ["plain_filter", "x_sort_chain"])
def test_first_index_among_duplicates(name):
    points = np.tile(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [1.0, 1.0]]), (3, 1))
    assert HULL_RIVALS[name](points).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", HULL_RIVALS)
def test_every_hull_rival_finds_the_corners_of_a_square(name):
    inside = np.random.default_rng(0).random((300, 2)) * 0.75 + 0.125
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    points = np.vstack([inside[:150], corners, inside[150:]])
    rival = HULL_RIVALS[name]
    given = rival.prepare(points)
    vertices = hull_vertices(given if isinstance(given, np.ndarray) else points, rival.run(given))
    assert vertices.dtype == np.dtype(rival.dtype)
    assert vertex_set_difference(corners, vertices) == (0, 0)


@pytest.mark.parametrize("name", PARETO_RIVALS)
def test_pareto_rivals_agree_with_the_definition(name):
    points = np.random.default_rng(3).integers(0, 12, size=(90, 2)).astype(np.float64)
    expected = [
        i
        for i, p in enumerate(points)
        if not any((q >= p).all() and (q > p).any() for q in points) and not any((q == p).all() for q in points[:i])
    ]
    expected.sort(key=lambda i: points[i, 0])
    assert PARETO_RIVALS[name](points).tolist() == expected


@pytest.mark.parametrize("name", DELAUNAY_RIVALS)
def test_delaunay_rivals_agree_on_points_without_ties(name):
    points = np.random.default_rng(5).random((400, 2))
    reference = DELAUNAY_RIVALS["qhull"](points)
    assert np.array_equal(edge_keys(DELAUNAY_RIVALS[name](points), 400), edge_keys(reference, 400))


@pytest.mark.parametrize("name", INPUT_ORDERS)
def test_orders_are_permutations(name):
    points = np.vstack([np.random.default_rng(2).random((500, 2)), np.zeros((20, 2))])
    assert np.array_equal(np.sort(INPUT_ORDERS[name](points)), np.arange(520))


def test_x_order_breaks_ties_by_y_then_index():
    points = np.array([[1.0, 2.0], [0.0, 5.0], [1.0, 1.0], [0.0, 5.0]])
    assert INPUT_ORDERS["x_sorted"](points).tolist() == [1, 3, 2, 0]


def test_hilbert_order_walks_a_grid_from_cell_to_neighbouring_cell():
    side = 16
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(np.float64)
    shuffled = grid[np.random.default_rng(1).permutation(len(grid))]
    walk = shuffled[hilbert_order(shuffled)]
    assert np.array_equal(np.abs(np.diff(walk, axis=0)).sum(axis=1), np.ones(side * side - 1))
