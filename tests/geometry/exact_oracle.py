"""Independent truth for the geometry tests: plain algorithms in Python's unbounded integers.

A finite float is an integer times a power of two, so a set of points scaled by one common power of two is a set of
integer points with the same orientations, circles, order and equalities.
"""

from collections.abc import Iterable

import numpy as np

IntegerPoint = tuple[int, int]


def integer_points(points: Iterable) -> list[IntegerPoint]:
    """Points scaled by one common power of two so that all coordinates are integers."""
    ratios = [(float(x).as_integer_ratio(), float(y).as_integer_ratio()) for x, y in points]
    scale = max((max(x[1], y[1]) for x, y in ratios), default=1)
    return [(x[0] * (scale // x[1]), y[0] * (scale // y[1])) for x, y in ratios]


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


def orientation(a: IntegerPoint, b: IntegerPoint, c: IntegerPoint) -> int:
    """Sign of the doubled signed area of the triangle a, b, c."""
    return sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def in_circle(a: IntegerPoint, b: IntegerPoint, c: IntegerPoint, d: IntegerPoint) -> int:
    """Sign of the 4 x 4 in-circle determinant with rows (x, y, x^2 + y^2, 1), by expansion along the last column."""

    def minor(p: IntegerPoint, q: IntegerPoint, r: IntegerPoint) -> int:
        rows = [(x, y, x * x + y * y) for x, y in (p, q, r)]
        (p0, p1, p2), (q0, q1, q2), (r0, r1, r2) = rows
        return p0 * (q1 * r2 - q2 * r1) - p1 * (q0 * r2 - q2 * r0) + p2 * (q0 * r1 - q1 * r0)

    return sign(-minor(b, c, d) + minor(a, c, d) - minor(a, b, d) + minor(a, b, c))


def hull_indices(points: Iterable) -> list[int]:
    """Strict hull vertices, counter-clockwise from the lexicographically smallest, first index among duplicates.

    Fewer than three indices mean that all points coincide or are collinear.
    """
    exact = integer_points(points)
    first: dict[IntegerPoint, int] = {}
    for index, point in enumerate(exact):
        first.setdefault(point, index)
    ordered = sorted(first)
    if len(ordered) <= 2:
        return [first[point] for point in ordered]

    def chain(sequence: list[IntegerPoint]) -> list[IntegerPoint]:
        kept: list[IntegerPoint] = []
        for point in sequence:
            while len(kept) >= 2 and orientation(kept[-2], kept[-1], point) <= 0:
                kept.pop()
            kept.append(point)
        return kept[:-1]

    return [first[point] for point in chain(ordered) + chain(ordered[::-1])]


def pareto_indices(points: Iterable) -> list[int]:
    """Points that no other point dominates (>= in both coordinates, > in one), by increasing x; first duplicates."""
    values = [(float(x), float(y)) for x, y in points]
    first: dict[tuple[float, float], int] = {}
    for index, point in enumerate(values):
        first.setdefault(point, index)
    front = []
    best = -np.inf
    for point in sorted(first, reverse=True):
        if point[1] > best:
            front.append(first[point])
            best = point[1]
    return front[::-1]
