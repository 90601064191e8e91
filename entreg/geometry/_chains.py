"""Convex chains: the hull as a chain below and a chain above the line from its first to its last point.

The *first* and *last* point are the lexicographically smallest and largest. All other hull vertices lie strictly on
one side of the line through them, which splits the problem in two. The upper side is handled as a lower side with y
negated (an exact operation), so one set of kernels serves both. Chains are arrays of records ``(x, y, index)``, see
:mod:`entreg.geometry._sorting`, convex from below, with strictly increasing x.
"""

import numpy as np

from entreg.geometry._sorting import copy_record, sort_by_x
from entreg.geometry.predicates import orient2d
from entreg.kernels import kernel, part


@kernel
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


@part
def extend_chain(records, begin, end, x, y, index):
    """Append a point whose x is not smaller than that of the chain's end, keep the chain convex from below.

    Of points with equal x the lowest stays, of equal points the smallest index (a float). Orientation is exact.

    Returns:
        The new end of the chain, which occupies the rows ``begin .. end - 1``.
    """
    if end > begin and records[end - 1, 0] == x:
        if records[end - 1, 1] < y:
            return end
        if records[end - 1, 1] == y:
            records[end - 1, 2] = min(records[end - 1, 2], index)
            return end
        end -= 1
    while end - begin >= 2 and (
        orient2d(records[end - 2, 0], records[end - 2, 1], records[end - 1, 0], records[end - 1, 1], x, y) <= 0
    ):
        end -= 1
    records[end, 0] = x
    records[end, 1] = y
    records[end, 2] = index
    return end + 1


@part
def chain_in_place(records, begin, stop):
    """Replace the rows ``begin .. stop - 1``, sorted by x, by their chain, from ``begin`` on; returns its end."""
    end = begin
    for k in range(begin, stop):
        end = extend_chain(records, begin, end, records[k, 0], records[k, 1], records[k, 2])
    return end


@kernel
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


@part
def _turn(records, a, b, c):
    return orient2d(records[a, 0], records[a, 1], records[b, 0], records[b, 1], records[c, 0], records[c, 1])


@kernel
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
    records = np.empty((count + 14, 3), np.float64)
    lower_line = count + 4
    upper_line = count + 9
    low_x, high_x, low_y, high_y = _octagon(points, candidates, everything, records, lower_line, upper_line)
    if not (abs(low_x) < np.inf):
        return np.empty(0, np.int64)
    first_x = records[lower_line, 0]
    first_y = records[lower_line, 1]
    last_x = records[lower_line + 4, 0]
    last_y = records[lower_line + 4, 1]
    # The lines are shortened; what joins the chains are copies of their ends.
    for k in range(2):
        copy_record(records, lower_line + 4 * k, records, count + k)
        copy_record(records, upper_line + 4 * k, records, count + 2 + k)
    lower_knots = _close_polyline(records, lower_line)
    upper_knots = _close_polyline(records, upper_line)
    lower = np.int64(0)
    upper = count
    for k in range(count):
        index = k if everything else candidates[k]
        x = points[index, 0]
        y = points[index, 1]
        if (low_x < x) & (x < high_x) & (low_y < y) & (y < high_y):
            continue
        if _side_of_polyline(records, lower_line, lower_knots, x, y) <= 0:
            if not ((x == first_x and y == first_y) or (x == last_x and y == last_y)):
                records[lower, 0] = x
                records[lower, 1] = y
                records[lower, 2] = index
                lower += 1
        elif _side_of_polyline(records, upper_line, upper_knots, x, -y) <= 0:
            upper -= 1
            records[upper, 0] = x
            records[upper, 1] = -y
            records[upper, 2] = index
    if first_x == last_x and first_y == last_y:
        return np.empty(1, np.int64)
    bounds = np.empty((4, 3), np.int64)
    for side in range(2):
        row = count + 2 * side
        begin = upper if side else np.int64(0)
        stop = count if side else lower
        sort_by_x(records, begin, stop)
        bounds[2 * side, 0] = row
        bounds[2 * side, 1] = begin
        bounds[2 * side, 2] = row + 1
        bounds[2 * side + 1, 0] = row + 1
        bounds[2 * side + 1, 1] = chain_in_place(records, begin, stop)
        bounds[2 * side + 1, 2] = row + 2
        join_chains(records, bounds[2 * side], bounds[2 * side + 1])
    return hull_from_chains(records, bounds[0], bounds[1], bounds[2], bounds[3])


@part
def _octagon(points, candidates, everything, records, lower_line, upper_line):
    """Extreme points in the directions of the axes and diagonals.

    They are written as records, from the first point to the last, to the rows from ``lower_line`` on (first, least
    x + y, least y, greatest x - y, last) and, with y negated, to those from ``upper_line`` on. The sums may be rounded:
    what matters is only that the records are points of the input.

    Returns:
        An open rectangle ``(low x, high x, low y, high y)``, possibly empty, of points that are no hull vertices: at
        every x in it the segment between the two lower corner points is not above it, and that between the two upper
        ones not below it. The first is NaN when a coordinate is not finite.
    """
    count = points.shape[0] if everything else candidates.shape[0]
    first = candidates[0] if not everything else 0
    last = bottom = top = south_west = south_east = north_west = north_east = first
    first_x = last_x = points[first, 0]
    first_y = last_y = low = high = points[first, 1]
    least_sum = greatest_sum = first_x + first_y
    least_difference = greatest_difference = first_x - first_y
    undefined = False
    for k in range(count):
        index = k if everything else candidates[k]
        x = points[index, 0]
        y = points[index, 1]
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
    if undefined or not (abs(first_x) < np.inf and abs(last_x) < np.inf and abs(low) < np.inf and abs(high) < np.inf):
        return np.nan, np.nan, np.nan, np.nan
    lower_corners = (first, south_west, bottom, south_east, last)
    upper_corners = (first, north_west, top, north_east, last)
    for k in range(5):
        records[lower_line + k, 0] = points[lower_corners[k], 0]
        records[lower_line + k, 1] = points[lower_corners[k], 1]
        records[lower_line + k, 2] = lower_corners[k]
        records[upper_line + k, 0] = points[upper_corners[k], 0]
        records[upper_line + k, 1] = -points[upper_corners[k], 1]
        records[upper_line + k, 2] = upper_corners[k]
    return (
        max(records[lower_line + 1, 0], records[upper_line + 1, 0]),
        min(records[lower_line + 3, 0], records[upper_line + 3, 0]),
        max(records[lower_line + 1, 1], records[lower_line + 3, 1]),
        -max(records[upper_line + 1, 1], records[upper_line + 3, 1]),
    )


@part
def _close_polyline(records, line):
    """Keep of the five records from row ``line`` on those that make the polyline from first to last convex from below.

    Every point of the polyline is then on or below the line through its ends, so what is strictly above that line is
    strictly above the polyline.

    Returns:
        The x of its up to three inner points, in order, filled up with infinity.
    """
    end = line + 1
    for k in range(line + 1, line + 5):
        if k == line + 4 or records[end - 1, 0] < records[k, 0] < records[line + 4, 0]:
            while end > line + 1 and _turn(records, end - 2, end - 1, k) <= 0:
                end -= 1
            copy_record(records, k, records, end)
            end += 1
    inner = end - line - 2
    return (
        records[line + 1, 0] if inner > 0 else np.inf,
        records[line + 2, 0] if inner > 1 else np.inf,
        records[line + 3, 0] if inner > 2 else np.inf,
    )


@part
def _side_of_polyline(records, line, knots, x, y):
    """Sign of the height of (x, y) above the polyline's edge at x (exact)."""
    k = line + (knots[0] <= x) + (knots[1] <= x) + (knots[2] <= x)
    return orient2d(records[k, 0], records[k, 1], records[k + 1, 0], records[k + 1, 1], x, y)


@kernel
def hull_from_chains(records, lower_begins, lower_ends, upper_begins, upper_ends):
    """Indices along the joined lower chains, then back along the joined upper chains without their two ends."""
    size = -2
    for s in range(lower_begins.shape[0]):
        size += lower_ends[s] - lower_begins[s]
    for s in range(upper_begins.shape[0]):
        size += upper_ends[s] - upper_begins[s]
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
