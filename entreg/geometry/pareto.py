"""Exact Pareto front (maxima) of points in the plane, in time that falls with the entropy of the input."""

from typing import Any

import numpy as np

from entreg.geometry._filtering import (
    bin_edges,
    bin_placement,
    filter_size,
    keep_in_chunks,
    sample_positions,
    share_kept,
)
from entreg.geometry._sorting import sort_by_x
from entreg.geometry.validation import as_points, first_nonfinite_row, nonfinite_error
from entreg.kernels import kernel
from entreg.parallel import chunk_ranges, resolve_threads, run_chunks

_ALL = np.empty(0, np.int64)
# Sizes at which each stage begins to pay, measured on uniform, Gaussian and disk input.
_FILTER_FROM = 1_500
_THREADS_FROM = 400_000
# A filter that keeps more than this share of a sample costs more than it saves.
_WORTHWHILE = 0.85
_TASKS_PER_THREAD = 4


def pareto_front(points: Any, *, threads: int | None = None) -> np.ndarray:
    """Points that no other point dominates, larger being better in both coordinates.

    A point dominates another when it is at least as large in both coordinates and larger in one. To minimise a
    coordinate, negate it.

    Dominated points are discarded in one pass where the front of a sample proves them dominated; what remains is
    sorted, unless it is sorted already, and scanned.

    Args:
        points: ``(n, 2)`` array-like of finite numbers, n >= 1, see :func:`entreg.geometry.validation.as_points`.
        threads: Largest number of threads to use; None for all cores available to the process. The result does not
            depend on it.

    Returns:
        ``(m,)`` int64, m >= 1: indices of the front by increasing x (hence decreasing y); of equal points the first.

    Raises:
        InputError: Wrong shape or dtype, no points, or NaN or infinite coordinates.

    Source: the maxima scan of Kung, Luccio and Preparata (1975); the filter is our choice.
    """
    points = as_points(points, 1)
    n = len(points)
    if threads is not None or n >= _FILTER_FROM:
        threads = resolve_threads(threads)
    if n < _FILTER_FROM:
        front = _front_records(points, _ALL, True, 0, n)[:, 2].astype(np.int64)
    else:
        tasks = 1 if n < _THREADS_FROM else _TASKS_PER_THREAD * threads
        front = front_by_filter(points, threads, *filter_size(n), _WORTHWHILE, tasks)
    if front.shape[0] == 0:
        raise nonfinite_error(points, first_nonfinite_row(points))
    return front


def front_by_filter(
    points: np.ndarray, threads: int, sample_size: int, bins: int, worthwhile: float, tasks: int
) -> np.ndarray:
    """Front of what a filter keeps; without the filter when it would keep more than the share ``worthwhile``.

    Empty when a coordinate is not finite. ``tasks`` is the number of chunks for the ``threads`` threads.
    """
    n = points.shape[0]
    sample = sample_positions(n, sample_size)
    table, origin, scale, share = _dominated_table(
        points, sample, _front_records(points, sample, False, 0, sample_size), bins
    )
    if share <= worthwhile:
        candidates = keep_in_chunks(points, table, origin, scale, threads, tasks)
        fronts = [_front_records(points, candidates, False, 0, candidates.shape[0])]
    else:
        fronts = run_chunks(
            lambda start, stop: _front_records(points, _ALL, True, start, stop), chunk_ranges(n, tasks), threads
        )
    if any(front.shape[0] == 0 for front in fronts):
        return _ALL
    while len(fronts) > 1:
        odd = [fronts.pop()] if len(fronts) % 2 else []
        fronts = run_chunks(_merge_fronts, list(zip(fronts[::2], fronts[1::2], strict=True)), threads) + odd
    return fronts[0][:, 2].astype(np.int64)


@kernel
def _dominated_table(points, sample, front, bins):
    """As :func:`entreg.geometry._filtering.interior_table`, for dominated instead of interior points.

    The point of greatest y among the sampled points right of a bin dominates all points of the bin that are not above
    it. The outermost bins stay empty, so that infinite coordinates are kept. ``front`` holds the records of the
    sample's front.
    """
    table = np.empty((bins + 2, 2), np.float64)
    for b in range(bins + 2):
        table[b, 0] = np.inf
        table[b, 1] = -np.inf
    if front.shape[0] == 0:
        return table, 0.0, 0.0, 1.0
    low = points[sample[0], 0]
    for index in sample:
        low = min(low, points[index, 0])
    origin, scale = bin_placement(low, front[-1, 0], bins)
    if scale == 0.0:
        return table, 0.0, 0.0, 1.0
    _, upper_edge = bin_edges(origin, scale, bins)
    k = front.shape[0] - 1
    best = -np.inf
    for b in range(bins, 0, -1):
        while k >= 0 and front[k, 0] >= upper_edge[b]:
            best = front[k, 1]
            k -= 1
        table[b, 0] = -np.inf
        table[b, 1] = best
    return table, origin, scale, share_kept(points, sample, table, origin, scale)


@kernel
def _front_records(points, candidates, everything, start, stop):
    """Front of candidates ``start..stop`` as records by increasing x; empty when a coordinate is not finite."""
    records = np.empty((stop - start, 3), np.float64)
    finite = True
    for k in range(start, stop):
        index = k if everything else candidates[k]
        x = points[index, 0]
        y = points[index, 1]
        finite &= (abs(x) < np.inf) & (abs(y) < np.inf)
        records[k - start, 0] = x
        records[k - start, 1] = y
        records[k - start, 2] = index
    if not finite:
        return records[:0]
    sort_by_x(records, np.int64(0), stop - start)
    # From the left, the records above everything that follows them form a stack with decreasing y.
    size = 0
    for k in range(stop - start):
        x = records[k, 0]
        y = records[k, 1]
        index = records[k, 2]
        if size > 0 and records[size - 1, 0] == x:
            if records[size - 1, 1] > y:
                continue
            if records[size - 1, 1] == y:
                records[size - 1, 2] = min(records[size - 1, 2], index)
                continue
        while size > 0 and records[size - 1, 1] <= y:
            size -= 1
        records[size, 0] = x
        records[size, 1] = y
        records[size, 2] = index
        size += 1
    return records[:size]


@kernel
def _merge_fronts(a, b):
    """Front of the union of two non-empty fronts; the indices of ``a`` are smaller than those of ``b``."""
    merged = np.empty((a.shape[0] + b.shape[0], 3), np.float64)
    i = a.shape[0] - 1
    j = b.shape[0] - 1
    k = merged.shape[0]
    best = -np.inf
    while i >= 0 or j >= 0:
        # From the right; of equal x the higher one first, of equal points that of a.
        take_a = j < 0 or (i >= 0 and (a[i, 0] > b[j, 0] or (a[i, 0] == b[j, 0] and a[i, 1] >= b[j, 1])))
        record = a[i] if take_a else b[j]
        if take_a:
            i -= 1
        else:
            j -= 1
        if record[1] > best:
            best = record[1]
            k -= 1
            merged[k, 0] = record[0]
            merged[k, 1] = record[1]
            merged[k, 2] = record[2]
    return merged[k:]
