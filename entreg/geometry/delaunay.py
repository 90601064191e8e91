"""Exact two-dimensional Delaunay triangulation by parallel divide and conquer along a space-filling order."""

import heapq
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from entreg.errors import InputError
from entreg.geometry.delaunay_faces import (
    mark_outside,
    number_triangles,
    write_faces,
    write_hull,
    write_neighbors,
)
from entreg.geometry.delaunay_merge import WORDS_PER_POINT, merge
from entreg.geometry.delaunay_order import (
    BUCKET_BITS,
    arrange,
    bounds,
    gather,
    resolve_ties,
    scatter,
    sort_packed,
    write_keys,
    write_levels,
)
from entreg.geometry.delaunay_predicates import LARGEST_SCALED
from entreg.geometry.predicates import orient2d
from entreg.geometry.validation import as_points, require_finite
from entreg.kernels import kernel
from entreg.parallel import chunk_ranges, resolve_threads, run_chunks

_ORDERS = ("auto", "sort")
# Below this many points the threads cost more than they bring.
_PARALLEL_POINTS = 16384
# Points per independently triangulated block, and most blocks. They depend on nothing but the points, so that the
# result does not depend on the number of threads.
_BLOCK_POINTS = 4096
_BLOCKS = 32
_CHUNKS_PER_THREAD = 4
_COLUMN_LIMIT = 12
_MOST_POINTS = (2**31 - 1) // 2


@dataclass(frozen=True, eq=False)
class Triangulation:
    """A Delaunay triangulation, with the field names and meanings of ``scipy.spatial.Delaunay``.

    Attributes:
        points: ``(n, 2)`` float64, the points triangulated.
        simplices: ``(m, 3)`` int32, vertices of each triangle, counter-clockwise.
        neighbors: ``(m, 3)`` int32; ``neighbors[i, k]`` is the triangle across the edge opposite vertex ``k`` of
            triangle ``i``, or -1 where there is none.
        convex_hull: ``(h, 2)`` int32, the edges of the boundary in counter-clockwise sequence. Points in the interior
            of a side of the hull are vertices of the triangulation, so collinear edges occur.
        coplanar: ``(c, 3)`` int32, one row per point that equals an earlier one and was left out: its index, a
            triangle at the equal point, and the index of the equal point (the first).
    """

    points: np.ndarray
    simplices: np.ndarray
    neighbors: np.ndarray
    convex_hull: np.ndarray
    coplanar: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """``(e, 2)`` int32, every edge once, smaller index first, in lexicographic order."""
        corners = self.simplices
        pairs = np.concatenate((corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]))
        # Inside, an edge is met once in each direction; on the boundary only in the direction of the hull.
        once = np.concatenate((pairs[pairs[:, 0] < pairs[:, 1]], self.convex_hull[:, ::-1]))
        once = once[once[:, 0] < once[:, 1]]
        return once[np.lexsort((once[:, 1], once[:, 0]))]


def delaunay(points: Any, *, threads: int | None = None, order: str = "auto") -> Triangulation:
    """Delaunay triangulation of points in the plane, exact for every finite input.

    No tolerance is used anywhere. Among cocircular points any valid triangulation is returned, always the same one for
    the same input whatever the number of threads. Points already in Morton (Z) order are not sorted again, and of any
    other order the sort keeps what is coherent: neighbours move together, which caches reward.

    Args:
        points: ``(n, 2)`` finite numbers that float64 holds exactly.
        threads: Number of threads; None for as many as the process has cores.
        order: ``"auto"`` uses the given order as it is where it already follows the Morton curve; ``"sort"``
            always sorts. The triangulation is the same.

    Returns:
        The :class:`Triangulation`.

    Raises:
        InputError: Wrong shape or type, a NaN or infinite coordinate, fewer than three distinct points, or all
            points on one line.
    """
    if order not in _ORDERS:
        raise InputError(f"order must be one of {', '.join(map(repr, _ORDERS))}, but is {order!r}.")
    threads = resolve_threads(threads)
    array = as_points(points, 3)
    if array.shape[0] > _MOST_POINTS:
        raise InputError(f"At most {_MOST_POINTS} points can be triangulated, but there are {array.shape[0]}.")
    if array.shape[0] < _PARALLEL_POINTS:
        parts = _triangulate_serially(array, order == "auto")
    else:
        parts = _triangulate_in_blocks(array, threads, order == "auto")
    simplices, neighbors, hull, duplicates = parts
    return Triangulation(array, simplices, neighbors, hull, _coplanar(simplices, duplicates))


_OK, _NOT_FINITE, _TOO_FEW, _COLLINEAR = range(4)
_NO_DUPLICATES = np.empty((0, 2), np.int64)
_NO_BLOCKS = np.empty((0, 3), np.int64)


def _raise_for(status: int, array: np.ndarray) -> None:
    if status == _NOT_FINITE:
        require_finite(array)
    if status == _TOO_FEW:
        raise InputError("A triangulation needs at least three distinct points, but there are fewer.")
    if status == _COLLINEAR:
        raise InputError("A triangulation needs three points that are not on one line, but all points are collinear.")


def _coplanar(simplices: np.ndarray, duplicates: np.ndarray) -> np.ndarray:
    rows = np.empty((len(duplicates), 3), np.int32)
    if len(duplicates):
        duplicates = duplicates[np.argsort(duplicates[:, 0])]
        triangle_at = np.empty(int(simplices.max()) + 1, np.int32)
        triangle_at[simplices] = np.arange(len(simplices), dtype=np.int32)[:, None]
        rows[:, 0] = duplicates[:, 0]
        rows[:, 1] = triangle_at[duplicates[:, 1]]
        rows[:, 2] = duplicates[:, 1]
    return rows


@kernel
def _degeneracy(points):
    """Status of finite points: too few distinct, all on one line, or neither."""
    count = points.shape[0]
    ax = points[0, 0]
    ay = points[0, 1]
    second = 1
    while second < count and points[second, 0] == ax and points[second, 1] == ay:
        second += 1
    if second == count:
        return _TOO_FEW
    bx = points[second, 0]
    by = points[second, 1]
    distinct = 2
    for i in range(second + 1, count):
        x = points[i, 0]
        y = points[i, 1]
        if orient2d(ax, ay, bx, by, x, y) != 0:
            return _OK
        if (x != ax or y != ay) and (x != bx or y != by):
            distinct = 3
    return _COLLINEAR if distinct == 3 else _TOO_FEW


@kernel
def _survey(points):
    """Status of the points, and their extremes as :func:`entreg.geometry.delaunay_order.bounds` gives them."""
    extremes = bounds(points, np.int64(0), points.shape[0])
    return (_NOT_FINITE if extremes[0] != extremes[0] else _degeneracy(points)), extremes


def _scale_factors(largest: float) -> tuple[float, float]:
    """Two powers of two that together bring magnitudes up to ``largest`` into the range of the floating-point filters.

    They are two because their product may not be a normal number.
    """
    if 1.0 / LARGEST_SCALED <= largest <= LARGEST_SCALED:
        return 1.0, 1.0
    exponent = min(-math.frexp(largest)[1], 1000)
    half = exponent // 2
    return 2.0**half, 2.0 ** (exponent - half)


def _triangulate_serially(points: np.ndarray, adaptive: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Simplices, neighbors, hull edges and duplicates."""
    count = len(points)
    status, extremes = _survey(points)
    _raise_for(status, points)
    x_low, x_high, y_low, y_high = extremes
    scaled = exact = points.reshape(-1)
    factor, rest = _scale_factors(max(-x_low, x_high, -y_low, y_high))
    in_range = factor == rest == 1.0
    if not in_range:
        scaled = exact * factor * rest
        x_low, x_high, y_low, y_high = (value * factor * rest for value in extremes)
    extent = max(x_high - x_low, y_high - y_low)
    packed = np.empty(count, np.uint64)
    levels = np.empty(count, np.int16)
    scratch = np.empty(count, np.uint64)
    duplicates = _NO_DUPLICATES
    if arrange(scaled, x_low, y_low, extent, adaptive, packed, scratch, np.zeros(2, np.int64), levels):
        count, duplicates = resolve_ties(exact, packed, scratch, levels, _COLUMN_LIMIT)
    original = np.empty(count, np.int32)
    ordered = np.empty(2 * count, np.float64)
    gather(scaled, packed, ordered, original, 0, count)
    ordered_exact = ordered
    if not in_range:
        ordered_exact = np.empty(2 * count, np.float64)
        gather(exact, packed, ordered_exact, original, 0, count)
    links = np.empty(WORDS_PER_POINT * count, np.uint32)
    handle, _, _ = merge(ordered, ordered_exact, links, _NO_BLOCKS, levels, 0, count)
    boundary = mark_outside(links, handle)
    simplices = np.empty((2 * count - 2 - boundary, 3), np.int32)
    neighbors = np.empty_like(simplices)
    hull = np.empty((boundary, 2), np.int32)
    write_faces(links, original, handle, simplices, neighbors.reshape(-1), hull)
    return simplices, neighbors, hull, duplicates


def _triangulate_in_blocks(
    points: np.ndarray, threads: int, adaptive: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Simplices, neighbors, hull edges and duplicates; the steps of the serial kernel, each in threads."""
    count = len(points)
    # More chunks than threads: on a busy machine a late thread then takes fewer of them.
    chunks = chunk_ranges(count, _CHUNKS_PER_THREAD * threads)

    def in_threads(function, ranges):
        return run_chunks(function, ranges, threads)

    extremes = np.array(in_threads(lambda start, stop: bounds(points, start, stop), chunks))
    finite = not np.isnan(extremes[:, 0]).any()
    _raise_for(_degeneracy(points) if finite else _NOT_FINITE, points)
    factor, rest = _scale_factors(np.abs(extremes).max())
    exact = points.reshape(-1)
    in_range = factor == 1.0 and rest == 1.0
    scaled = exact if in_range else exact * factor * rest
    extremes *= factor
    extremes *= rest
    x_low, y_low = extremes[:, 0].min(), extremes[:, 2].min()
    extent = max(extremes[:, 1].max() - x_low, extremes[:, 3].max() - y_low)

    packed = np.empty(count, np.uint64)
    counts = np.zeros((len(chunks), 2**BUCKET_BITS), np.int64)
    ascending = in_threads(
        lambda part, start, stop: write_keys(scaled, x_low, y_low, extent, packed, counts[part], start, stop),
        [(part, *chunk) for part, chunk in enumerate(chunks)],
    )
    seams = np.array([start for start, _ in chunks[1:]], np.int64)
    if not (adaptive and all(ascending) and np.all(packed[seams - 1] <= packed[seams])):
        packed = _sort(packed, counts, chunks, threads)
    levels = np.empty(count, np.int16)
    tied = in_threads(
        lambda start, stop: write_levels(packed, levels, start, min(stop, count - 1)),
        chunks,
    )
    duplicates = _NO_DUPLICATES
    if any(tied):
        count, duplicates = resolve_ties(exact, packed, np.empty(count, np.uint64), levels, _COLUMN_LIMIT)
        chunks = chunk_ranges(count, _CHUNKS_PER_THREAD * threads)
    original = np.empty(count, np.int32)
    ordered = np.empty(2 * count, np.float64)
    in_threads(lambda start, stop: gather(scaled, packed, ordered, original, start, stop), chunks)
    ordered_exact = ordered
    if not in_range:
        ordered_exact = np.empty(2 * count, np.float64)
        in_threads(lambda start, stop: gather(exact, packed, ordered_exact, original, start, stop), chunks)

    links = np.empty(WORDS_PER_POINT * count, np.uint32)
    starts = _block_starts(levels[:count])
    blocks = list(itertools.pairwise([*starts, count]))
    done = in_threads(
        lambda start, stop: merge(ordered, ordered_exact, links, _NO_BLOCKS, levels, start, stop),
        blocks,
    )
    block_levels = levels[np.array([*starts[1:], count], np.int64) - 1]
    handle, _, _ = merge(ordered, ordered_exact, links, np.array(done, np.int64), block_levels, 0, len(blocks))

    boundary = mark_outside(links, handle)
    triangles = 2 * count - 2 - boundary
    simplices = np.empty((triangles, 3), np.int32)
    neighbors = np.empty((triangles, 3), np.int32)
    hull = np.empty((boundary, 2), np.int32)
    # How many triangles a range of edges has shows only at its end, so two ranges are numbered from both ends.
    middle = 3 * count
    in_threads(
        lambda *numbering: number_triangles(links, original, simplices, *numbering),
        [(0, middle, 0, 1), (middle, 6 * count, triangles - 1, -1)],
    )
    flat = neighbors.reshape(-1)
    in_threads(
        lambda start, stop: write_neighbors(links, flat, start, stop),
        chunk_ranges(3 * count, _CHUNKS_PER_THREAD * threads),
    )
    write_hull(links, original, handle, hull)
    return simplices, neighbors, hull, duplicates


def _sort(packed: np.ndarray, counts: np.ndarray, chunks: list[tuple[int, int]], threads: int) -> np.ndarray:
    """Sorted copy of ``packed``, given for each chunk the counts of the highest bits; ``packed`` becomes scratch."""
    totals = counts.sum(axis=0)
    bucket_starts = np.concatenate(([0], np.cumsum(totals)))
    offsets = bucket_starts[:-1] + np.cumsum(counts, axis=0) - counts
    out = np.empty_like(packed)
    run_chunks(
        lambda part, start, stop: scatter(packed, out, offsets[part], start, stop),
        [(part, *chunk) for part, chunk in enumerate(chunks)],
        threads,
    )
    # A few groups of buckets per thread, so that an uneven one does not keep the others waiting.
    wanted = np.linspace(0, len(packed), 8 * threads + 1)
    ends = np.unique(bucket_starts[np.searchsorted(bucket_starts, wanted)])
    run_chunks(
        lambda start, stop: sort_packed(out, packed, start, stop),
        [(int(start), int(stop)) for start, stop in itertools.pairwise(ends)],
        threads,
    )
    return out


def _block_starts(levels: np.ndarray) -> list[int]:
    """First points of the blocks: the trie is opened at its largest cell until all are small or there are enough."""
    count = len(levels)
    most = min(_BLOCKS, -(-count // _BLOCK_POINTS))
    small = count // most
    cells = [(-count, 0, count)]
    while len(cells) < 2 * most and -cells[0][0] > small:
        _, start, stop = heapq.heappop(cells)
        middle = start + 1 + int(np.argmax(levels[start : stop - 1]))
        heapq.heappush(cells, (start - middle, start, middle))
        heapq.heappush(cells, (middle - stop, middle, stop))
    return sorted(start for _, start, _ in cells)
