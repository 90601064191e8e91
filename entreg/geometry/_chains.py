"""Convex chains: the hull as a chain below and a chain above the line from its first to its last point.

The *first* and *last* point are the lexicographically smallest and largest. All other hull vertices lie strictly on
one side of the line through them, which splits the problem in two. The upper side is handled as a lower side with y
negated (an exact operation), so one set of kernels serves both. Chains are arrays of records ``(x, y, index)``, see
:mod:`entreg.geometry._sorting`, convex from below, with strictly increasing x.
"""

import numpy as np
from numba import njit

from entreg.geometry._sorting import sort_by_x
from entreg.geometry.predicates import orient2d


@njit(cache=True, nogil=True)
def find_ends(points, candidates, everything, start, stop):
    """Indices of the first and last point among candidates ``start..stop``, smallest index among duplicates.

    Args:
        points: ``(n, 2)`` floats.
        candidates: Indices into ``points``; not read when ``everything`` is true, then the indices are all of
            ``start..stop`` themselves.
        everything: See above.
        start, stop: Non-empty range of positions in ``candidates``.

    Returns:
        The two indices; (-1, -1) when a coordinate is NaN or infinite.
    """
    first = start if everything else candidates[start]
    last = first
    first_x = last_x = points[first, 0]
    first_y = last_y = points[first, 1]
    finite = True
    for k in range(start, stop):
        index = k if everything else candidates[k]
        x = points[index, 0]
        y = points[index, 1]
        finite &= (abs(x) < np.inf) & (abs(y) < np.inf)
        if x <= first_x and (x < first_x or y < first_y or (y == first_y and index < first)):
            first, first_x, first_y = index, x, y
        if x >= last_x and (x > last_x or y > last_y or (y == last_y and index < last)):
            last, last_x, last_y = index, x, y
    if not finite:
        return -1, -1
    return first, last


@njit(cache=True, nogil=True)
def extend_chain(records, size, x, y, index):
    """Append a point whose x is not smaller than that of the chain's end, keep the chain convex from below.

    Of points with equal x the lowest stays, of equal points the smallest index. Orientation is exact.

    Returns:
        The new size of the chain, which occupies ``records[:size]``.
    """
    if size > 0 and records[size - 1, 0] == x:
        if records[size - 1, 1] < y:
            return size
        if records[size - 1, 1] == y:
            records[size - 1, 2] = min(records[size - 1, 2], index)
            return size
        size -= 1
    while size >= 2 and (
        orient2d(records[size - 2, 0], records[size - 2, 1], records[size - 1, 0], records[size - 1, 1], x, y) <= 0
    ):
        size -= 1
    records[size, 0] = x
    records[size, 1] = y
    records[size, 2] = index
    return size + 1


@njit(cache=True, nogil=True)
def chain_in_place(records):
    """Replace records sorted by x by their chain, at the front; returns its size."""
    size = 0
    for k in range(records.shape[0]):
        size = extend_chain(records, size, records[k, 0], records[k, 1], records[k, 2])
    return size


@njit(cache=True, nogil=True)
def join_chains(records, begins, ends):
    """Shorten consecutive chains to what remains of them in the chain of their union.

    The joint of two neighbouring chains is their common tangent. Everything dropped lies on or above a segment
    between two other points, so it is no vertex; when nothing more can be dropped the concatenation is convex.

    Args:
        records: Array that holds all chains.
        begins, ends: int64 arrays; chain s is ``records[begins[s]:ends[s]]``. No x of a chain exceeds an x of a later
            one, and equal points never lie in different chains. Changed in place.
    """
    count = begins.shape[0]
    for s in range(1, count):
        if begins[s] == ends[s]:
            continue
        t = s - 1
        while t >= 0 and begins[t] == ends[t]:
            t -= 1
        while t >= 0:
            # Position of the last point before chain s, and of the one before that (-1 if there is none).
            top = ends[t] - 1
            u = t
            second = top - 1
            if second < begins[t]:
                u = t - 1
                while u >= 0 and begins[u] == ends[u]:
                    u -= 1
                second = ends[u] - 1 if u >= 0 else -1
            head = begins[s]
            if second >= 0 and _turn(records, second, top, head) <= 0:
                ends[t] = top
                t = u
            elif head + 1 < ends[s] and _turn(records, top, head, head + 1) <= 0:
                begins[s] = head + 1
            else:
                break


@njit(cache=True, nogil=True)
def _turn(records, a, b, c):
    return orient2d(records[a, 0], records[a, 1], records[b, 0], records[b, 1], records[c, 0], records[c, 1])


@njit(cache=True, nogil=True)
def hull_of_candidates(points, candidates, everything):
    """Hull of a set small enough for one thread.

    Args:
        points: ``(n, 2)`` floats.
        candidates: Indices into ``points``; not read when ``everything`` is true, then all points are meant.
        everything: See above.

    Returns:
        Indices of the strict hull vertices, counter-clockwise from the first; fewer than three when the points are
        collinear, or none when a coordinate is not finite.
    """
    count = points.shape[0] if everything else candidates.shape[0]
    first, last = find_ends(points, candidates, everything, 0, count)
    if first < 0:
        return np.empty(0, np.int64)
    first_x = np.float64(points[first, 0])
    first_y = np.float64(points[first, 1])
    last_x = np.float64(points[last, 0])
    last_y = np.float64(points[last, 1])
    # Lower side from the front, upper side from the back; the last four rows hold the ends for both sides.
    records = np.empty((count + 4, 3))
    lower = 0
    upper = count
    for k in range(count):
        index = k if everything else candidates[k]
        x = np.float64(points[index, 0])
        y = np.float64(points[index, 1])
        side = orient2d(first_x, first_y, last_x, last_y, x, y)
        if side < 0:
            records[lower, 0] = x
            records[lower, 1] = y
            records[lower, 2] = index
            lower += 1
        elif side > 0:
            upper -= 1
            records[upper, 0] = x
            records[upper, 1] = -y
            records[upper, 2] = index
    if lower == 0 and upper == count:
        return np.empty(1 if first == last else 2, np.int64)
    for side in range(2):
        y_sign = 1.0 - 2.0 * side
        records[count + 2 * side, 0] = first_x
        records[count + 2 * side, 1] = y_sign * first_y
        records[count + 2 * side, 2] = first
        records[count + 2 * side + 1, 0] = last_x
        records[count + 2 * side + 1, 1] = y_sign * last_y
        records[count + 2 * side + 1, 2] = last
    scratch = np.empty((max(lower, count - upper), 3))
    sort_by_x(records[:lower], scratch)
    sort_by_x(records[upper:count], scratch)
    begins = np.empty((2, 3), np.int64)
    ends = np.empty((2, 3), np.int64)
    for side in range(2):
        begin = upper if side else 0
        begins[side, 0] = count + 2 * side
        begins[side, 1] = begin
        ends[side, 1] = begin + chain_in_place(records[begin : count if side else lower])
        begins[side, 2] = count + 2 * side + 1
        ends[side, 0] = begins[side, 0] + 1
        ends[side, 2] = begins[side, 2] + 1
        join_chains(records, begins[side], ends[side])
    return hull_from_chains(records, begins[0], ends[0], begins[1], ends[1])


@njit(cache=True, nogil=True)
def hull_from_chains(records, lower_begins, lower_ends, upper_begins, upper_ends):
    """Indices along the joined lower chains, then back along the joined upper chains without their two ends."""
    size = (lower_ends - lower_begins).sum() + (upper_ends - upper_begins).sum() - 2
    hull = np.empty(size, np.int64)
    h = 0
    for s in range(lower_begins.shape[0]):
        for k in range(lower_begins[s], lower_ends[s]):
            hull[h] = np.int64(records[k, 2])
            h += 1
    for s in range(upper_begins.shape[0] - 2, 0, -1):
        for k in range(upper_ends[s] - 1, upper_begins[s] - 1, -1):
            hull[h] = np.int64(records[k, 2])
            h += 1
    return hull
