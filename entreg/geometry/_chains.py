"""Convex chains: the hull as a chain below and a chain above the line from its first to its last point.

The *first* and *last* point are the lexicographically smallest and largest. All other hull vertices lie strictly on
one side of the line through them, which splits the problem in two. The upper side is handled as a lower side with y
negated (an exact operation), so one set of kernels serves both. Chains are arrays of records ``(x, y, index)``, see
:mod:`entreg.geometry._sorting`, convex from below, with strictly increasing x.
"""

import numpy as np
from numba import njit

from entreg.geometry._sorting import copy_record, sort_by_x
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

    The extreme points in eight directions span an octagon; what lies in it is dropped, at first by comparisons with
    a rectangle inside the octagon, then by exact tests against its edges. The rest is sorted and scanned.

    Args:
        points: ``(n, 2)`` floats.
        candidates: Indices into ``points``; not read when ``everything`` is true, then all points are meant.
        everything: See above.

    Returns:
        Indices of the strict hull vertices, counter-clockwise from the first; fewer than three when the points are
        collinear (one when all are equal), or none when a coordinate is not finite.
    """
    count = points.shape[0] if everything else candidates.shape[0]
    # Rows for both sides' points (lower from the front, upper from the back), their two ends, and two polylines.
    records = np.empty((count + 14, 3))
    lower_line = records[count + 4 : count + 9]
    upper_line = records[count + 9 : count + 14]
    low_x, high_x, low_y, high_y = _octagon(points, candidates, everything, count, lower_line, upper_line)
    if not (abs(low_x) < np.inf):
        return np.empty(0, np.int64)
    first_x, first_y, first = lower_line[0]
    last_x, last_y, last = lower_line[4]
    lower_knots = _close_polyline(lower_line)
    upper_knots = _close_polyline(upper_line)
    lower = 0
    upper = count
    for k in range(count):
        index = k if everything else candidates[k]
        x = np.float64(points[index, 0])
        y = np.float64(points[index, 1])
        if (low_x < x) & (x < high_x) & (low_y < y) & (y < high_y):
            continue
        if _side_of_polyline(lower_line, lower_knots, x, y) <= 0:
            if not ((x == first_x and y == first_y) or (x == last_x and y == last_y)):
                records[lower, 0] = x
                records[lower, 1] = y
                records[lower, 2] = index
                lower += 1
        elif _side_of_polyline(upper_line, upper_knots, x, -y) <= 0:
            upper -= 1
            records[upper, 0] = x
            records[upper, 1] = -y
            records[upper, 2] = index
    sort_by_x(records[:lower])
    sort_by_x(records[upper:count])
    bounds = np.empty((4, 3), np.int64)
    for side in range(2):
        row = count + 2 * side
        records[row, 0] = first_x
        records[row, 1] = -first_y if side else first_y
        records[row, 2] = first
        records[row + 1, 0] = last_x
        records[row + 1, 1] = -last_y if side else last_y
        records[row + 1, 2] = last
        begins = bounds[2 * side]
        ends = bounds[2 * side + 1]
        begins[0] = row
        begins[1] = upper if side else 0
        begins[2] = row + 1
        ends[0] = row + 1
        ends[1] = begins[1] + chain_in_place(records[begins[1] : count if side else lower])
        ends[2] = row + 2
        join_chains(records, begins, ends)
    if first == last:
        return np.empty(1, np.int64)
    return hull_from_chains(records, bounds[0], bounds[1], bounds[2], bounds[3])


@njit(cache=True, nogil=True)
def _octagon(points, candidates, everything, count, lower_line, upper_line):
    """Extreme points in the directions of the axes and diagonals.

    They are written as records, from the first point to the last, to ``lower_line`` (first, least x + y, least y,
    greatest x - y, last) and, with y negated, to ``upper_line``. The sums may be rounded: what matters is only that
    the records are points of the input.

    Returns:
        An open rectangle ``(low x, high x, low y, high y)``, possibly empty, of points that are no hull vertices: at
        every x in it the segment between the two lower corner points is not above it, and that between the two upper
        ones not below it. The first is NaN when a coordinate is not finite.
    """
    first = candidates[0] if not everything else 0
    last = bottom = top = south_west = south_east = north_west = north_east = first
    first_x = last_x = np.float64(points[first, 0])
    first_y = last_y = low = high = np.float64(points[first, 1])
    least_sum = greatest_sum = first_x + first_y
    least_difference = greatest_difference = first_x - first_y
    undefined = False
    for k in range(count):
        index = k if everything else candidates[k]
        x = np.float64(points[index, 0])
        y = np.float64(points[index, 1])
        total = x + y
        difference = x - y
        # Infinite coordinates show in the extremes, NaN only here; two finite numbers never add up to NaN.
        undefined |= total != total
        if x <= first_x and (x < first_x or y < first_y or (y == first_y and index < first)):
            first, first_x, first_y = index, x, y
        if x >= last_x and (x > last_x or y > last_y or (y == last_y and index < last)):
            last, last_x, last_y = index, x, y
        if y < low:
            bottom, low = index, y
        if y > high:
            top, high = index, y
        if total < least_sum:
            south_west, least_sum = index, total
        if total > greatest_sum:
            north_east, greatest_sum = index, total
        if difference < least_difference:
            north_west, least_difference = index, difference
        if difference > greatest_difference:
            south_east, greatest_difference = index, difference
    if undefined or not (max(max(-first_x, last_x), max(-low, high)) < np.inf):
        return np.nan, np.nan, np.nan, np.nan
    _write_record(lower_line[0], points, first, 1.0)
    _write_record(lower_line[1], points, south_west, 1.0)
    _write_record(lower_line[2], points, bottom, 1.0)
    _write_record(lower_line[3], points, south_east, 1.0)
    _write_record(lower_line[4], points, last, 1.0)
    _write_record(upper_line[0], points, first, -1.0)
    _write_record(upper_line[1], points, north_west, -1.0)
    _write_record(upper_line[2], points, top, -1.0)
    _write_record(upper_line[3], points, north_east, -1.0)
    _write_record(upper_line[4], points, last, -1.0)
    return (
        max(lower_line[1, 0], upper_line[1, 0]),
        min(lower_line[3, 0], upper_line[3, 0]),
        max(lower_line[1, 1], lower_line[3, 1]),
        -max(upper_line[1, 1], upper_line[3, 1]),
    )


@njit(cache=True, nogil=True)
def _write_record(row, points, index, y_sign):
    row[0] = points[index, 0]
    row[1] = y_sign * points[index, 1]
    row[2] = index


@njit(cache=True, nogil=True)
def _close_polyline(line):
    """Keep of the five records those that make the polyline from first to last convex from below.

    Every point of the polyline is then on or below the line through its ends, so what is strictly above that line is
    strictly above the polyline.

    Returns:
        The x of its up to three inner points, in order, filled up with infinity.
    """
    size = 1
    for k in range(1, 4):
        if line[size - 1, 0] < line[k, 0] < line[4, 0]:
            while size > 1 and _turn(line, size - 2, size - 1, k) <= 0:
                size -= 1
            copy_record(line, k, line, size)
            size += 1
    while size > 1 and _turn(line, size - 2, size - 1, 4) <= 0:
        size -= 1
    copy_record(line, 4, line, size)
    return (
        line[1, 0] if size > 1 else np.inf,
        line[2, 0] if size > 2 else np.inf,
        line[3, 0] if size > 3 else np.inf,
    )


@njit(cache=True, nogil=True)
def _side_of_polyline(line, knots, x, y):
    """Sign of the height of (x, y) above the polyline's edge at x (exact)."""
    k = 1 + (knots[0] <= x) + (knots[1] <= x) + (knots[2] <= x)
    return orient2d(line[k - 1, 0], line[k - 1, 1], line[k, 0], line[k, 1], x, y)


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
