"""The libraries and textbook methods that the geometry package is measured against.

A rival is a named callable with what it may have for free written beside it. ``prepare`` holds work that is
deliberately kept out of the timer (a dtype conversion in the rival's favour); everything else, including any
reordering of the input, is inside ``run``. ``HULL_RIVALS``, ``PARETO_RIVALS`` and ``DELAUNAY_RIVALS`` are the only
places where rivals are listed.

The libraries come with ``pip install 'entreg[dev]'``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.spatial
from numba import njit
from scipy.cluster.vq import kmeans2

from entreg.errors import ConfigError
from entreg.geometry.predicates import orient2d

try:
    import cv2
    import shapely
    import shull
    import triangle
except ImportError as error:
    raise ConfigError(
        f"the rival library '{error.name}' is not installed; pip install 'entreg[dev]' brings all of them"
    ) from error

KMEANS_CLUSTERS = 32
KMEANS_SAMPLE = 10_000


def _identity(points: np.ndarray) -> np.ndarray:
    return points


@dataclass(frozen=True)
class Rival:
    """One method to compare with.

    Attributes:
        name: key in its registry and in the records.
        run: prepared input to result, inside the timer.
        dtype: precision in which the method computes.
        note: what the reader of a table must know.
        prepare: ``(n, 2)`` float64 points to the input of ``run``, outside the timer.
        threads: threads it may use; 0 means all of the machine's.
    """

    name: str
    run: Callable[[object], object]
    dtype: str = "float64"
    note: str = ""
    prepare: Callable[[np.ndarray], object] = _identity
    threads: int = 1

    def __call__(self, points: np.ndarray) -> object:
        """``run(prepare(points))``: the result on ``(n, 2)`` float64 points."""
        return self.run(self.prepare(points))


# --- orders of the input -------------------------------------------------------------------------------------------


def x_order(points: np.ndarray) -> np.ndarray:
    """Indices that sort ``(n, 2)`` points by x, then y, then index: ``(n,)`` int64."""
    order = np.argsort(points[:, 0])
    x = points[order, 0]
    # The unstable sort by one key is several times faster; only ties need the slow, stable sort by both keys.
    if np.any(x[1:] == x[:-1]):
        return np.lexsort((points[:, 1], points[:, 0]))
    return order


@njit(cache=True, nogil=True)
def _hilbert_keys(points: np.ndarray, low: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Position of each point's grid cell along the Hilbert curve of ``4**bits`` cells (standard bit recurrence)."""
    top = (1 << bits) - 1
    keys = np.empty(points.shape[0], dtype=np.uint32)
    for i in range(points.shape[0]):
        x = min(max(np.int64((points[i, 0] - low[0]) * scale[0]), 0), top)
        y = min(max(np.int64((points[i, 1] - low[1]) * scale[1]), 0), top)
        key = np.int64(0)
        side = np.int64(1) << (bits - 1)
        while side > 0:
            right = 1 if x & side else 0
            upper = 1 if y & side else 0
            key += side * side * ((3 * right) ^ upper)
            if upper == 0:
                if right == 1:
                    x = top - x
                    y = top - y
                x, y = y, x
            side >>= 1
        keys[i] = key
    return keys


def hilbert_order(points: np.ndarray) -> np.ndarray:
    """Indices that sort ``(n, 2)`` points along a Hilbert curve on a grid of 65,536 x 65,536 cells: ``(n,)`` int64."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = np.maximum(high - low, np.finfo(np.float64).tiny)
    return np.argsort(_hilbert_keys(points, low, 65_535.0 / extent, 16), kind="stable")


def kmeans_order(points: np.ndarray) -> np.ndarray:
    """Indices that group ``(n, 2)`` points by nearest of 32 k-means centres: ``(n,)`` int64.

    The centres are fitted on at most 10,000 points, in ten iterations from a k-means++ start, and the groups keep the
    input's order inside (our choice: much faster than a fit on all points, and as good for grouping).
    """
    sample = points[:: max(1, len(points) // KMEANS_SAMPLE)]
    with warnings.catch_warnings():
        # A cluster that runs empty only makes one group fewer.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centers, _ = kmeans2(sample, min(KMEANS_CLUSTERS, len(sample)), iter=10, minit="++", seed=0)
    return np.argsort(scipy.spatial.cKDTree(centers).query(points)[1], kind="stable")


INPUT_ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x_sorted": x_order,
    "hilbert": hilbert_order,
    "kmeans": kmeans_order,
}
"""Name to function from points to the order in which a rival may be given them."""


# --- convex hull ---------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def monotone_chain(points: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Exact convex hull by Andrew's monotone chain.

    Args:
        points: ``(n, 2)`` float64.
        order: ``(m,)`` indices of the points to use, sorted by x, then y, then index.

    Returns:
        ``(h,)`` int64 indices of the strict hull vertices, counter-clockwise from the lexicographically smallest.
    """
    count = order.shape[0]
    hull = np.empty(2 * count + 1, dtype=np.int64)
    size = 0
    for position in range(count):
        i = order[position]
        x, y = points[i, 0], points[i, 1]
        if size > 0 and points[hull[size - 1], 0] == x and points[hull[size - 1], 1] == y:
            continue
        while size >= 2:
            a, b = hull[size - 2], hull[size - 1]
            if orient2d(points[a, 0], points[a, 1], points[b, 0], points[b, 1], x, y) > 0:
                break
            size -= 1
        hull[size] = i
        size += 1
    # The upper chain starts at the rightmost vertex and may not eat into the lower one.
    floor = size
    for position in range(count - 2, -1, -1):
        i = order[position]
        x, y = points[i, 0], points[i, 1]
        if points[hull[size - 1], 0] == x and points[hull[size - 1], 1] == y:
            # Going down the order, a later duplicate came first: keep the first index instead.
            if size > floor:
                hull[size - 1] = i
            continue
        while size > floor:
            a, b = hull[size - 2], hull[size - 1]
            if orient2d(points[a, 0], points[a, 1], points[b, 0], points[b, 1], x, y) > 0:
                break
            size -= 1
        hull[size] = i
        size += 1
    # The upper chain closes the loop at the first vertex.
    return hull[: max(size - 1, 1)].copy()


@njit(cache=True, nogil=True)
def eight_extremes(points: np.ndarray) -> np.ndarray:
    """One pass over ``(n, 2)`` float64 points: ``(8,)`` int64 indices of extremes in eight compass directions."""
    best = np.zeros(8, dtype=np.int64)
    x, y = points[0, 0], points[0, 1]
    least_x = most_x = x
    least_y = most_y = y
    least_sum = most_sum = x + y
    least_difference = most_difference = x - y
    for i in range(points.shape[0]):
        x, y = points[i, 0], points[i, 1]
        total, difference = x + y, x - y
        if x < least_x:
            least_x, best[0] = x, i
        if x > most_x:
            most_x, best[1] = x, i
        if y < least_y:
            least_y, best[2] = y, i
        if y > most_y:
            most_y, best[3] = y, i
        if total < least_sum:
            least_sum, best[4] = total, i
        if total > most_sum:
            most_sum, best[5] = total, i
        if difference < least_difference:
            least_difference, best[6] = difference, i
        if difference > most_difference:
            most_difference, best[7] = difference, i
    return best


@njit(cache=True, nogil=True)
def _outside(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Indices of the points that are not certainly inside the convex polygon ``corners`` (counter-clockwise)."""
    count = corners.shape[0]
    low_x, high_x = corners[:, 0].min(), corners[:, 0].max()
    low_y, high_y = corners[:, 1].min(), corners[:, 1].max()
    # Rounding error of a 2 x 2 orientation determinant is below 4 ulp of the product of the extents; eight, and the
    # smallest normal number against underflow, leave room. Infinite or NaN determinants keep their point.
    bound = 8.0 * 2.220446049250313e-16 * (high_x - low_x) * (high_y - low_y) + 2.2250738585072014e-308
    kept = np.empty(points.shape[0], dtype=np.int64)
    size = 0
    for i in range(points.shape[0]):
        x, y = points[i, 0], points[i, 1]
        inside = True
        for k in range(count):
            a, b = k, k + 1 if k + 1 < count else 0
            determinant = (corners[b, 0] - corners[a, 0]) * (y - corners[a, 1]) - (corners[b, 1] - corners[a, 1]) * (
                x - corners[a, 0]
            )
            if not determinant > bound:
                inside = False
                break
        if not inside:
            kept[size] = i
            size += 1
    return kept[:size].copy()


def _plain_filter(points: np.ndarray) -> np.ndarray:
    extremes = np.unique(eight_extremes(points))
    corners = extremes[monotone_chain(points[extremes], x_order(points[extremes]))]
    kept = _outside(points, points[corners]) if len(corners) > 2 else np.arange(len(points))
    candidates = points[kept]
    return kept[monotone_chain(candidates, x_order(candidates))]


def _x_sort_chain(points: np.ndarray) -> np.ndarray:
    return monotone_chain(points, x_order(points))


def _timsort_chain(points: np.ndarray) -> np.ndarray:
    x = points[:, 0]
    # numpy's stable sort of floats is Timsort: it merges the runs that the input already has.
    order = np.argsort(x, kind="stable")
    if np.any(x[order[1:]] == x[order[:-1]]):
        order = np.lexsort((points[:, 1], x))
    return monotone_chain(points, order)


@njit(cache=True, nogil=True)
def _outer_points(points: np.ndarray, order: np.ndarray, start: int, stop: int, a: int, b: int) -> int:
    """Move the points strictly left of a -> b to the front of ``order[start:stop]``; returns where they end."""
    ax, ay, bx, by = points[a, 0], points[a, 1], points[b, 0], points[b, 1]
    end = start
    for position in range(start, stop):
        i = order[position]
        if orient2d(ax, ay, bx, by, points[i, 0], points[i, 1]) > 0:
            order[position], order[end] = order[end], i
            end += 1
    return end


@njit(cache=True, nogil=True)
def _quickhull_candidates(points: np.ndarray, first: int, last: int) -> np.ndarray:
    """Indices of the hull's vertices, clockwise, and perhaps a few more where rounding chose the farthest point."""
    n = points.shape[0]
    found = [first]
    for a, b in ((first, last), (last, first)):
        order = np.arange(n)
        stack = [(0, _outer_points(points, order, 0, n, a, b), a, b)]
        while stack:
            start, stop, a, b = stack.pop()
            if start == stop:
                found.append(b)
                continue
            apex, farthest = order[start], -np.inf
            for position in range(start, stop):
                i = order[position]
                height = (points[b, 0] - points[a, 0]) * (points[i, 1] - points[a, 1]) - (
                    points[b, 1] - points[a, 1]
                ) * (points[i, 0] - points[a, 0])
                if height > farthest:
                    apex, farthest = i, height
            # What is outside neither new edge lies in the triangle and is done with.
            middle = _outer_points(points, order, start, stop, a, apex)
            end = _outer_points(points, order, middle, stop, apex, b)
            stack.append((middle, end, apex, b))
            stack.append((start, middle, a, apex))
    return np.array(found)


def _quickhull(points: np.ndarray) -> np.ndarray:
    x, y = points[:, 0], points[:, 1]
    leftmost, rightmost = np.flatnonzero(x == x.min()), np.flatnonzero(x == x.max())
    first, last = leftmost[np.argmin(y[leftmost])], rightmost[np.argmax(y[rightmost])]
    # The chain makes the candidates exact. They come as two sorted runs, so that Timsort takes linear time.
    candidates = _quickhull_candidates(points, first, last)[:-1]
    return candidates[_timsort_chain(points[candidates])]


def _qhull(points: np.ndarray) -> np.ndarray:
    return scipy.spatial.ConvexHull(points).vertices


def _geos_hull(geometry: shapely.LineString) -> np.ndarray:
    # The ring repeats its first vertex and runs clockwise.
    return shapely.get_coordinates(shapely.convex_hull(geometry))[:-1]


def geos_geometry(points: np.ndarray) -> shapely.LineString:
    """The input that GEOS needs."""
    # A line has the same hull as its points and is built several times faster than a collection of point objects.
    return shapely.linestrings(points)


def _geos(points: np.ndarray) -> np.ndarray:
    return _geos_hull(geos_geometry(points))


def _opencv(points: np.ndarray) -> np.ndarray:
    return cv2.convexHull(points, returnPoints=False)[:, 0]


def _qhull_in_order(order: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def run(points: np.ndarray) -> np.ndarray:
        indices = order(points)
        return indices[_qhull(points[indices])]

    return run


def _registry(*rivals: Rival) -> dict[str, Rival]:
    return {rival.name: rival for rival in rivals}


def as_float32(points: np.ndarray) -> np.ndarray:
    """The input that OpenCV needs: ``(n, 2)`` float32, C-contiguous."""
    return np.ascontiguousarray(points, dtype=np.float32)


HULL_RIVALS: dict[str, Rival] = _registry(
    Rival("qhull", _qhull, note="scipy.spatial.ConvexHull"),
    Rival("geos", _geos, note="shapely, building the geometry included"),
    Rival(
        "geos_call_only",
        _geos_hull,
        prepare=geos_geometry,
        note="shapely, the geometry built outside the timer",
    ),
    Rival(
        "opencv",
        _opencv,
        dtype="float32",
        prepare=as_float32,
        note="float32 only: the hull of rounded points, the conversion outside the timer",
    ),
    Rival(
        "plain_filter",
        _plain_filter,
        note="eight extreme directions, one pass, x-sort, monotone chain; exact",
    ),
    Rival("x_sort_chain", _x_sort_chain, note="x-sort and monotone chain; exact"),
    *(
        Rival(
            f"qhull_{name}",
            _qhull_in_order(order),
            note=f"Qhull on input in {name} order, the ordering included",
        )
        for name, order in INPUT_ORDERS.items()
    ),
)
"""Convex-hull rivals. Results are vertex indices ``(h,)`` or coordinates ``(h, 2)``, see :func:`hull_vertices`."""

COMPARISON_HULLS: dict[str, Rival] = _registry(
    Rival("timsort_chain", _timsort_chain, note="Timsort and monotone chain: adaptive to sorted runs; exact"),
    Rival("quickhull", _quickhull, note="quickhull: adaptive to interior and clustered points; exact"),
)
"""Textbook hulls that work by comparisons alone, each adaptive to one kind of low entropy; for the law's figure."""

LIBRARY_HULL_RIVALS = ("qhull", "geos", "opencv")
"""The libraries that "the fastest rival" is chosen from, as a user meets them."""


def hull_vertices(points: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Coordinates ``(h, 2)`` of a hull result on ``points``, whether it holds indices or coordinates."""
    result = np.asarray(result)
    return points[result] if result.ndim == 1 else result


# --- Pareto front --------------------------------------------------------------------------------------------------


def _pareto_numpy(points: np.ndarray) -> np.ndarray:
    # Decreasing x, then decreasing y, then first index: a point is maximal iff its y exceeds all before it.
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    y = points[order, 1]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(y)[:-1]])
    return order[y > best_before][::-1]


def _pareto_filtered(points: np.ndarray) -> np.ndarray:
    x, y = points[np.argmax(points[:, 0] + points[:, 1])]
    kept = np.flatnonzero((points[:, 0] >= x) | (points[:, 1] >= y))
    return kept[_pareto_numpy(points[kept])]


PARETO_RIVALS: dict[str, Rival] = _registry(
    Rival("numpy_lexsort", _pareto_numpy, note="np.lexsort and running maximum; exact"),
    Rival(
        "plain_filter",
        _pareto_filtered,
        note="drop what the point of largest x + y dominates, then np.lexsort and running maximum; exact",
    ),
)
"""Rivals for the two-dimensional maxima. Results are indices ``(m,)`` by increasing x."""


# --- Delaunay triangulation ----------------------------------------------------------------------------------------


def _qhull_delaunay(points: np.ndarray) -> np.ndarray:
    return scipy.spatial.Delaunay(points).simplices


def _shull_delaunay(points: np.ndarray) -> np.ndarray:
    return shull.Delaunay(points).simplices


def _shull_parallel_delaunay(points: np.ndarray) -> np.ndarray:
    return shull.Delaunay(points, parallel=True).simplices


def _triangle_delaunay(points: np.ndarray) -> np.ndarray:
    return triangle.triangulate({"vertices": points})["triangles"]


_DELAUNAY_LIBRARIES = (
    Rival("qhull", _qhull_delaunay, note="scipy.spatial.Delaunay"),
    Rival("shull", _shull_delaunay, note="sweep hull in Rust"),
    Rival("shull_parallel", _shull_parallel_delaunay, note="sweep hull in Rust, parallel=True", threads=0),
    Rival("triangle", _triangle_delaunay, note="Shewchuk's Triangle; computes no neighbours here"),
)


def _delaunay_in_order(library: Rival, order: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def run(points: np.ndarray) -> np.ndarray:
        indices = order(points)
        return indices[library.run(points[indices])]

    return run


DELAUNAY_RIVALS: dict[str, Rival] = _registry(
    *_DELAUNAY_LIBRARIES,
    *(
        Rival(
            f"{library.name}_{name}",
            _delaunay_in_order(library, order),
            note=f"{library.name} on input in {name} order, the ordering included",
            threads=library.threads,
        )
        for library in _DELAUNAY_LIBRARIES
        if library.name != "shull_parallel"
        for name, order in INPUT_ORDERS.items()
    ),
)
"""Delaunay rivals. Results are triangles ``(m, 3)`` of point indices, in any order and orientation."""

LIBRARY_DELAUNAY_RIVALS = ("shull", "shull_parallel", "triangle")
"""The libraries that "the fastest rival" is chosen from; Qhull has a column of its own."""
