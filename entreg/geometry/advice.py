"""Exact algorithms that take advice: good advice saves time, bad advice costs time, no advice changes the answer.

A learned method knows where the work is, roughly. The paper lets it move the points, which changes the question.
Here what was learned (directions, cells) only chooses *where to look first*; every point that is dropped is dropped
for an exact reason, and an exact algorithm answers on what is left.

* hull: the extreme points in the advised directions span a polygon inside the hull; what is certainly inside it is no
  vertex. Once with the extremes of a sample, then with those of all points.
* Pareto front: what one of these extremes dominates is not maximal.
* triangulation: cells and their order give the order in which the points are handed over.

Our choice throughout; the paper has no such mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from entreg.errors import InputError
from entreg.geometry._filtering import (
    bin_edges,
    bin_placement,
    interior_table,
    keep_in_chunks,
    share_kept,
)
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.delaunay import delaunay
from entreg.geometry.pareto import pareto_front
from entreg.geometry.validation import as_points, require_finite
from entreg.kernels import kernel
from entreg.parallel import resolve_threads

BINS = 256
"""Vertical strips that a filter region is cut into: finer ones follow it more closely and cost more to build."""

SAMPLE_SIZE = 8192
"""Points looked at for the first, rough filter; the second filter uses the extremes of all points."""

# Sizes and shares as in entreg.geometry.convex_hull.
_THREADS_FROM = 200_000
_WORTHWHILE = 0.85

# Table, origin and scale as entreg.geometry._filtering has them.
_Filter = tuple[np.ndarray, float, float]


def advised_convex_hull(points: Any, directions: Any, *, threads: int | None = None) -> np.ndarray:
    """Exact convex hull with a filter polygon in advised directions.

    Args:
        points: (n, 2) finite points, as for :func:`entreg.geometry.convex_hull.convex_hull`.
        directions: (t, 2) finite advice, t >= 1; lengths do not matter, any values are allowed.
        threads: threads to use; None for all cores of this process.

    Returns:
        (h,) int64, equal to ``convex_hull(points)`` whatever the advice.

    Raises:
        InputError: points or directions of a wrong shape or not finite, or a point set without a hull.
    """
    array = _finite_points(points)
    kept = _survivors(array, _finite_advice(directions, "directions"), _interior_filter, threads)
    return convex_hull(array, threads=threads) if kept is None else kept[convex_hull(array[kept], threads=threads)]


def advised_pareto_front(points: Any, directions: Any, *, threads: int | None = None) -> np.ndarray:
    """Exact Pareto front (maxima) after dropping what the extremes in advised directions dominate.

    Args:
        points: (n, 2) finite points, as for :func:`entreg.geometry.pareto.pareto_front`.
        directions: (t, 2) finite advice, t >= 1; signs are ignored, because maxima are extreme in directions
            without negative entries.
        threads: threads to use; None for all cores of this process.

    Returns:
        (m,) int64, equal to ``pareto_front(points)`` whatever the advice.

    Raises:
        InputError: points or directions of a wrong shape or not finite.
    """
    array = _finite_points(points)
    kept = _survivors(array, np.abs(_finite_advice(directions, "directions")), _dominated_filter, threads)
    return pareto_front(array, threads=threads) if kept is None else kept[pareto_front(array[kept], threads=threads)]


def advised_delaunay(points: Any, anchors: Any, *, threads: int | None = None) -> np.ndarray:
    """Triangles of an exact Delaunay triangulation of points handed over cell by cell.

    Args:
        points: (n, 2) finite points, as for :func:`entreg.geometry.delaunay.delaunay`.
        anchors: (k, 2) finite advice, k >= 1: a point's cell is that of its nearest anchor.
        threads: threads to use; None for all cores of this process.

    Returns:
        (m, 3) indices, counter-clockwise: a Delaunay triangulation of ``points`` whatever the advice (which may
        decide the diagonals among cocircular points).

    Raises:
        InputError: points or anchors of a wrong shape or not finite, or a point set without a triangulation.
    """
    array = _finite_points(points)
    order = advised_order(array, anchors)
    return order[delaunay(array[order], threads=threads).simplices]


def advised_order(points: np.ndarray, anchors: Any) -> np.ndarray:
    """A spatially coherent order of the points: cell by cell along a path of short steps, in strips within a cell.

    Args:
        points: (n, 2) finite float64.
        anchors: (k, 2) finite advice, k >= 1.

    Returns:
        (n,) int64, a permutation; equal points keep their order.

    Raises:
        InputError: anchors of a wrong shape or not finite.
    """
    centers = _finite_advice(anchors, "anchors")
    centers = np.ascontiguousarray(centers[_short_path(centers)])
    cells = _nearest(points, centers)
    # About three points per strip crossing, were the cells equally full.
    strips = max(1, int(np.sqrt(len(points) / (3.0 * len(centers)))))
    return np.argsort(_cell_keys(points, cells, len(centers), strips), kind="stable")


def _finite_points(points: Any) -> np.ndarray:
    # Before any filter: the algorithms behind it would see only what is left, under other row numbers.
    array = as_points(points)
    require_finite(array)
    return array


def _finite_advice(values: Any, name: str) -> np.ndarray:
    array = np.array(values, dtype=np.float64, order="C", ndmin=1)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) == 0:
        raise InputError(f"{name} must have shape (t, 2) with t at least 1, but the shape is {array.shape}.")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise InputError(f"{name} must be finite, but row {int(np.argmin(finite))} is not.")
    return array


def _survivors(
    points: np.ndarray,
    directions: np.ndarray,
    make_filter: Callable[[np.ndarray], _Filter | None],
    threads: int | None,
) -> np.ndarray | None:
    """Increasing indices that pass a filter by the extremes of a sample and one by the extremes of all points.

    None when the sample shows that the filter would keep nearly everything: bad advice costs this one look.
    """
    workers = resolve_threads(threads)
    sample = np.arange(0, len(points), max(1, len(points) // SAMPLE_SIZE))
    rough = make_filter(_extremes(points[sample], directions))
    if rough is None or share_kept(points, sample, *rough) > _WORTHWHILE:
        return None
    kept = _apply(points, rough, workers)
    # The extremes of all points are on the boundary of the hull and so survive the first filter: looking among the
    # survivors finds them (or, for maxima, what dominates them).
    remaining = points[kept]
    fine = make_filter(_extremes(remaining, directions))
    return kept if fine is None else kept[_apply(remaining, fine, workers)]


def _apply(points: np.ndarray, region: _Filter, workers: int) -> np.ndarray:
    tasks = 4 * workers if len(points) >= _THREADS_FROM else 1
    return keep_in_chunks(points, *region, workers, tasks)


def _interior_filter(extremes: np.ndarray) -> _Filter | None:
    """Drops what is certainly inside the hull of a few points."""
    try:
        hull = convex_hull(extremes, threads=1)
    except InputError:
        return None
    table, origin, scale, _ = interior_table(extremes, hull, hull, BINS)
    return (table, origin, scale) if scale > 0.0 else None


def _dominated_filter(extremes: np.ndarray) -> _Filter | None:
    """Drops what is strictly below, and not to the right of, one of a few points."""
    x, y = extremes[np.argsort(extremes[:, 0], kind="stable")].T
    origin, scale = bin_placement(x[0], x[-1], BINS)
    if scale == 0.0:
        return None
    _, right_edges = bin_edges(origin, scale, BINS)
    # The highest of the points at or beyond the right edge of each bin dominates whatever is below it in the bin.
    highest = np.append(np.maximum.accumulate(y[::-1])[::-1], -np.inf)
    table = np.full((BINS + 2, 2), -np.inf)
    table[:, 1] = highest[np.searchsorted(x, right_edges)]
    return table, origin, scale


@kernel
def _extremes(points, directions):
    """(t, 2) float64: for each direction a point with the largest product (up to rounding, which is harmless)."""
    count = directions.shape[0]
    best = np.full(count, -np.inf)
    chosen = np.zeros(count, dtype=np.int64)
    for i in range(points.shape[0]):
        x = points[i, 0]
        y = points[i, 1]
        for t in range(count):
            value = x * directions[t, 0] + y * directions[t, 1]
            if value > best[t]:
                best[t] = value
                chosen[t] = i
    return points[chosen]


@kernel
def _nearest(points, anchors):
    """(n,) int64 index of the nearest anchor of each point."""
    cells = np.empty(points.shape[0], dtype=np.int64)
    for i in range(points.shape[0]):
        best = np.inf
        cell = 0
        for j in range(anchors.shape[0]):
            dx = points[i, 0] - anchors[j, 0]
            dy = points[i, 1] - anchors[j, 1]
            distance = dx * dx + dy * dy
            if distance < best:
                best = distance
                cell = j
        cells[i] = cell
    return cells


@kernel
def _short_path(anchors):
    """A permutation of the anchors: the leftmost, then always the nearest one not yet visited."""
    count = anchors.shape[0]
    order = np.zeros(count, dtype=np.int64)
    visited = np.zeros(count, dtype=np.bool_)
    for i in range(1, count):
        if anchors[i, 0] < anchors[order[0], 0]:
            order[0] = i
    visited[order[0]] = True
    for position in range(1, count):
        here = order[position - 1]
        best = np.inf
        chosen = -1
        for j in range(count):
            if not visited[j]:
                distance = (anchors[j, 0] - anchors[here, 0]) ** 2 + (anchors[j, 1] - anchors[here, 1]) ** 2
                # Distances of far-apart garbage overflow to infinity; any unvisited anchor will do then.
                if chosen < 0 or distance < best:
                    best = distance
                    chosen = j
        order[position] = chosen
        visited[chosen] = True
    return order


@kernel
def _cell_keys(points, cells, count, strips):
    """(n,) int64 keys: cell, then strip of its bounding box, then place along the strip, alternately up and down."""
    low = np.full((count, 2), np.inf)
    high = np.full((count, 2), -np.inf)
    for i in range(points.shape[0]):
        c = cells[i]
        for axis in range(2):
            low[c, axis] = min(low[c, axis], points[i, axis])
            high[c, axis] = max(high[c, axis], points[i, axis])
    fine = 8 * strips
    keys = np.empty(points.shape[0], dtype=np.int64)
    place = np.zeros(2, dtype=np.int64)
    for i in range(points.shape[0]):
        c = cells[i]
        for axis in range(2):
            # Halves first: the extent of a cell may exceed the largest float.
            extent = 0.5 * high[c, axis] - 0.5 * low[c, axis]
            fraction = (0.5 * points[i, axis] - 0.5 * low[c, axis]) / extent if extent > 0.0 else 0.0
            place[axis] = int(fraction * (strips if axis == 0 else fine))
        strip = min(place[0], strips - 1)
        along = min(place[1], fine - 1)
        if strip % 2 == 1:
            along = fine - 1 - along
        keys[i] = (c * strips + strip) * fine + along
    return keys
