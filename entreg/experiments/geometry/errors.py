"""How far a geometric answer is from the exact one.

The paper gives one number, a relative deviation of the result, and does not say of what. Every measure that the
words allow is therefore computed (our choice): for hulls the relative difference of the areas and the Hausdorff
distance relative to the diameter; for triangulations the fraction of Delaunay edges kept and the difference of the
triangulated area; for Pareto fronts the relative difference of the dominated hypervolume.

An answer computed on *moved* points can be read in two ways, and both are reported: as it stands, on the moved
points (what the paper seems to measure), and *mapped back*, the returned indices applied to the points that the
user asked about (what a user gets).
"""

from __future__ import annotations

import numpy as np

from entreg.errors import InputError
from entreg.geometry.convex_hull import convex_hull


def polygon_area(vertices: np.ndarray) -> float:
    """Area enclosed by a simple polygon, positive when counter-clockwise.

    Args:
        vertices: (h, 2) corners in order. Fewer than three have area 0.

    Returns:
        Signed area, by the shoelace formula around the first vertex (so that far-away polygons keep their digits).
    """
    if len(vertices) < 3:
        return 0.0
    x, y = (vertices - vertices[0]).T
    return 0.5 * float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))


def convex_hausdorff(first: np.ndarray, second: np.ndarray) -> float:
    """Hausdorff distance between two convex polygons (as filled regions).

    For convex bodies it equals the largest gap between their support functions, max over unit u of
    \\|h_A(u) - h_B(u)\\|. Between two consecutive edge normals both supporting corners stay the same, so the gap
    is a sinusoid there and its maximum is known in closed form: O((h + k) log(h + k)) in all.

    Args:
        first: (h, 2) corners, counter-clockwise, at least one.
        second: (k, 2) corners, counter-clockwise, at least one.

    Returns:
        The distance, at least 0, in the unit of the coordinates.

    Raises:
        InputError: a polygon without corners.
    """
    if len(first) == 0 or len(second) == 0:
        raise InputError("convex_hausdorff needs two polygons with at least one corner each")
    normals_first, normals_second = _edge_normals(first), _edge_normals(second)
    starts = np.sort(np.concatenate([normals_first, normals_second]))
    return _largest_gap(starts, lambda u: first[_support(normals_first, u)] - second[_support(normals_second, u)])


def convex_diameter(vertices: np.ndarray) -> float:
    """Largest distance between two corners of a convex polygon.

    Args:
        vertices: (h, 2) corners, counter-clockwise, at least one.

    Returns:
        The diameter: the largest width over all directions.

    Raises:
        InputError: no corners.
    """
    if len(vertices) == 0:
        raise InputError("convex_diameter needs at least one corner")
    normals = _edge_normals(vertices)
    opposite = _wrap(normals + np.pi)
    starts = np.sort(np.concatenate([normals, opposite]))
    return _largest_gap(
        starts, lambda u: vertices[_support(normals, u)] - vertices[_support(normals, _wrap(u + np.pi))]
    )


def hypervolume(front: np.ndarray, reference: np.ndarray) -> float:
    """Area dominated by a set of maxima, above and to the right of a reference point.

    Args:
        front: (m, 2) mutually non-dominated points in any order.
        reference: (2,) lower-left corner; points not above it in both coordinates dominate nothing.

    Returns:
        Area of the union of the rectangles between ``reference`` and each point.
    """
    inside = front[(front > reference).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    order = np.lexsort((-inside[:, 1], inside[:, 0]))
    x, y = inside[order].T
    # Duplicates and dominated points may appear in an answer read on moved points; the running maximum from the
    # right makes the staircase that the union really has.
    heights = np.maximum.accumulate(y[::-1])[::-1]
    widths = np.diff(np.concatenate([[reference[0]], x]))
    return float(np.dot(widths, heights - reference[1]))


def hull_error(
    points: np.ndarray, exact: np.ndarray, answer: np.ndarray, answer_points: np.ndarray | None = None
) -> dict[str, float | bool]:
    """Compare a convex hull with the exact one.

    Args:
        points: (n, 2) the points whose hull was asked for.
        exact: (h,) indices of the exact hull, counter-clockwise.
        answer: (k,) indices returned by the method, in any order.
        answer_points: (n, 2) the points that the method really worked on, row i standing for ``points[i]``;
            None: ``points`` themselves.

    Returns:
        ``same_answer``: the same set of indices; ``area_error`` and ``hausdorff`` of the answer as it stands;
        ``mapped_area_error`` and ``mapped_hausdorff`` of the original points that it names. Areas relative to the
        exact area, Hausdorff distances relative to the exact diameter.
    """
    same = len(exact) == len(answer) and bool(np.array_equal(np.sort(exact), np.sort(answer)))
    polygon = points[exact]
    mapped = (0.0, 0.0) if same else _polygon_error(polygon, points[answer])
    as_it_stands = mapped if answer_points is None else _polygon_error(polygon, answer_points[answer])
    return {
        "same_answer": same,
        "area_error": as_it_stands[0],
        "hausdorff": as_it_stands[1],
        "mapped_area_error": mapped[0],
        "mapped_hausdorff": mapped[1],
    }


def _polygon_error(polygon: np.ndarray, corners: np.ndarray) -> tuple[float, float]:
    """Relative area and Hausdorff error of the hull of ``corners`` against a convex polygon."""
    try:
        other = corners[convex_hull(corners)]
    except InputError:
        # All on one line: the hull is the segment between the lexicographic extremes.
        order = np.lexsort((corners[:, 1], corners[:, 0]))
        other = corners[order[[0, -1]]]
    area = polygon_area(polygon)
    error = abs(polygon_area(other) - area) / area
    return error, convex_hausdorff(polygon, other) / convex_diameter(polygon)


def triangulation_edges(simplices: np.ndarray) -> np.ndarray:
    """Undirected edges of a triangulation.

    Args:
        simplices: (m, 3) vertex indices.

    Returns:
        Sorted unique int64 codes, ``smaller index * 2**32 + larger index``.
    """
    corners = np.asarray(simplices, dtype=np.int64)
    ends = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    ends.sort(axis=1)
    return np.unique((ends[:, 0] << 32) | ends[:, 1])


def triangulation_error(
    points: np.ndarray,
    exact_simplices: np.ndarray,
    answer_simplices: np.ndarray,
    answer_points: np.ndarray | None = None,
) -> dict[str, float | bool]:
    """Compare a triangulation with the exact Delaunay triangulation of the points.

    Args:
        points: (n, 2) the points whose triangulation was asked for.
        exact_simplices: (m, 3) an exact Delaunay triangulation of them.
        answer_simplices: (k, 3) the triangles returned by the method.
        answer_points: (n, 2) the points that the method really worked on; None: ``points`` themselves.

    Returns:
        ``edges_kept``: fraction of the exact edges that the answer contains (cocircular points leave a choice,
        so that even two exact answers may differ there); ``area_error``: relative difference of the triangulated
        areas; ``inverted``: fraction of the answer's triangles that are flat or turned over when their corners
        are put back on ``points`` (the mapped-back answer is no triangulation unless it is 0);
        ``same_answer``: all edges kept and none added.
    """
    exact_edges, answer_edges = triangulation_edges(exact_simplices), triangulation_edges(answer_simplices)
    kept = np.intersect1d(exact_edges, answer_edges, assume_unique=True).size
    moved = points if answer_points is None else answer_points
    area = float(np.abs(_signed_areas(points, exact_simplices)).sum())
    on_moved, mapped = _signed_areas(moved, answer_simplices), _signed_areas(points, answer_simplices)
    return {
        "same_answer": bool(kept == exact_edges.size == answer_edges.size),
        "edges_kept": kept / exact_edges.size,
        "area_error": _beyond_rounding(abs(float(np.abs(on_moved).sum()) - area) / area),
        # Callers orient triangles either way; what counts is whether putting the corners back turns one over.
        "inverted": float(np.mean(np.sign(mapped) != np.sign(on_moved))),
    }


def pareto_error(
    points: np.ndarray, exact: np.ndarray, answer: np.ndarray, answer_points: np.ndarray | None = None
) -> dict[str, float | bool]:
    """Compare a Pareto front (maxima) with the exact one by dominated hypervolume.

    Args:
        points: (n, 2) the points whose front was asked for.
        exact: (m,) indices of the exact front.
        answer: (k,) indices returned by the method.
        answer_points: (n, 2) the points that the method really worked on; None: ``points`` themselves.

    Returns:
        ``same_answer``: the same set of indices; ``area_error`` and ``mapped_area_error``: relative difference of
        the hypervolumes above the lower-left corner of the data's bounding box, of the answer as it stands and of
        the original points that it names.
    """
    reference = points.min(axis=0)
    volume = hypervolume(points[exact], reference)
    moved = points if answer_points is None else answer_points
    same = len(exact) == len(answer) and bool(np.array_equal(np.sort(exact), np.sort(answer)))

    def relative(chosen: np.ndarray) -> float:
        # A set of points can have a front that dominates nothing (all on one line): then only equality counts.
        difference = abs(hypervolume(chosen, reference) - volume)
        return difference / volume if volume > 0 else float(difference > 0)

    return {
        "same_answer": same,
        "area_error": relative(moved[answer]),
        "mapped_area_error": relative(points[answer]),
    }


def _signed_areas(points: np.ndarray, simplices: np.ndarray) -> np.ndarray:
    a, b, c = (points[simplices[:, corner]] for corner in range(3))
    u, v = b - a, c - a
    return 0.5 * (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])


def _beyond_rounding(error: float) -> float:
    """0 for what the rounding of a sum over triangles explains."""
    return error if error > 1e-12 else 0.0


def _wrap(angles: np.ndarray) -> np.ndarray:
    """Angles moved into [-pi, pi)."""
    return (angles + np.pi) % (2 * np.pi) - np.pi


def _edge_normals(vertices: np.ndarray) -> np.ndarray:
    """Outward normal angle of each edge i -> i+1, unwrapped so that it never decreases along the polygon."""
    edges = np.roll(vertices, -1, axis=0) - vertices
    angles = np.arctan2(-edges[:, 0], edges[:, 1])
    turns = np.diff(angles) % (2 * np.pi)
    # A convex corner turns by 0 to pi; rounding on a nearly straight corner gives a hair less than 0.
    turns[turns > 1.5 * np.pi] = 0.0
    return angles[0] + np.concatenate([[0.0], np.cumsum(turns)])


def _support(normals: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Index of the corner that is extreme in each direction, given the polygon's unwrapped edge normals."""
    first = normals[0]
    return np.searchsorted(normals, first + (angles - first) % (2 * np.pi)) % len(normals)


def _largest_gap(starts: np.ndarray, difference) -> float:
    """Maximum over all unit u of |difference(u) . u|, where difference is constant between ``starts``."""
    starts = np.sort(_wrap(starts))
    lengths = np.diff(np.concatenate([starts, [starts[0] + 2 * np.pi]]))
    vectors = difference(starts + 0.5 * lengths)
    norms = np.hypot(vectors[:, 0], vectors[:, 1])
    peaks = np.arctan2(vectors[:, 1], vectors[:, 0])
    inside = (peaks - starts) % np.pi <= lengths
    ends = np.abs(np.cos(peaks - starts)), np.abs(np.cos(peaks - starts - lengths))
    return float(np.max(norms * np.where(inside, 1.0, np.maximum(*ends))))
