"""Exact check that a result is a Delaunay triangulation, in Python integers and independent of the package."""

from itertools import pairwise

import numpy as np

from entreg.geometry.delaunay import Triangulation
from tests.geometry.exact_oracle import IntegerPoint, in_circle, integer_points, orientation


def doubled_area(a: IntegerPoint, b: IntegerPoint, c: IntegerPoint) -> int:
    """Twice the signed area of the triangle a, b, c."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def hull_area(integers: list[IntegerPoint]) -> int:
    """Twice the area of the convex hull, by the monotone chain."""
    ordered = sorted(set(integers))

    def chain(sequence):
        hull = []
        for point in sequence:
            while len(hull) > 1 and orientation(hull[-2], hull[-1], point) <= 0:
                hull.pop()
            hull.append(point)
        return hull[:-1]

    corners = chain(ordered) + chain(reversed(ordered))
    return sum(doubled_area((0, 0), a, b) for a, b in pairwise([*corners, corners[0]]))


def assert_delaunay(points: np.ndarray, triangulation: Triangulation) -> None:
    """Assert that ``triangulation`` is a valid Delaunay triangulation of ``points`` in all its fields."""
    integers = integer_points(points)
    first = {}
    for index, point in enumerate(integers):
        first.setdefault(point, index)
    simplices = triangulation.simplices.tolist()
    neighbors = triangulation.neighbors.tolist()
    hull = [tuple(edge) for edge in triangulation.convex_hull.tolist()]

    # Every distinct point is a vertex, by its first index.
    assert {vertex for corners in simplices for vertex in corners} == set(first.values())

    # All triangles are counter-clockwise and together as large as the hull.
    areas = [doubled_area(*(integers[vertex] for vertex in corners)) for corners in simplices]
    assert min(areas) > 0
    assert sum(areas) == hull_area(integers)

    # Each directed edge belongs to one triangle, and its neighbour has it reversed.
    owner = {}
    for triangle, corners in enumerate(simplices):
        for k in range(3):
            edge = (corners[(k + 1) % 3], corners[(k + 2) % 3])
            assert edge not in owner
            owner[edge] = (triangle, k)
    boundary = []
    for (a, b), (triangle, k) in owner.items():
        neighbor = neighbors[triangle][k]
        if (b, a) not in owner:
            assert neighbor == -1
            boundary.append((a, b))
            continue
        other, other_k = owner[b, a]
        assert neighbor == other
        if a < b:
            corners = (integers[vertex] for vertex in simplices[triangle])
            assert in_circle(*corners, integers[simplices[other][other_k]]) <= 0

    # The boundary is the convex hull, listed once around.
    assert sorted(boundary) == sorted(hull)
    for (a, b), (c, d) in pairwise([*hull, hull[0]]):
        assert b == c
        assert orientation(integers[a], integers[b], integers[d]) >= 0

    # Euler's formula for a triangulated disk.
    assert len(simplices) == 2 * len(first) - 2 - len(hull)

    # Every point left out equals the vertex named beside it, which the triangle named has.
    left_out = [index for index, point in enumerate(integers) if first[point] != index]
    assert triangulation.coplanar[:, 0].tolist() == left_out
    for index, triangle, vertex in triangulation.coplanar.tolist():
        assert first[integers[index]] == vertex
        assert vertex in simplices[triangle]
