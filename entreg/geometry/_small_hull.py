"""Hull of a handful of points, where every allocation and every slice would show."""

import numpy as np

from entreg.geometry.predicates import orient2d
from entreg.kernels import kernel, part

# Longest list that is sorted by insertion.
_MOST_SORTED = 48


@kernel
def small_hull(points, workspace):
    """Hull by Andrew's monotone chain on a list sorted by insertion.

    Args:
        points: ``(n, 2)`` float64, n >= 1.
        workspace: int64 of length 3 n; its front receives the hull: indices of the strict vertices, counter-clockwise
            from the lexicographically smallest.

    Returns:
        The number of vertices; fewer than three when the points are collinear (one when all are equal), 0 when a
        coordinate is not finite, -1 when too many points would have to be sorted.
    """
    n = points.shape[0]
    # The extreme points along the diagonals span a rectangle whose interior holds no vertex: at every x in it the
    # segment between the two lower ones is not above it, and that between the two upper ones not below it.
    south_west = south_east = north_west = north_east = 0
    least_sum = greatest_sum = points[0, 0] + points[0, 1]
    least_difference = greatest_difference = points[0, 0] - points[0, 1]
    finite = True
    for i in range(n):
        x = points[i, 0]
        y = points[i, 1]
        finite &= (abs(x) < np.inf) & (abs(y) < np.inf)
        total = x + y
        difference = x - y
        if total < least_sum:
            south_west, least_sum = i, total
        if total > greatest_sum:
            north_east, greatest_sum = i, total
        if difference < least_difference:
            north_west, least_difference = i, difference
        if difference > greatest_difference:
            south_east, greatest_difference = i, difference
    if not finite:
        return 0
    low_x = max(points[south_west, 0], points[north_west, 0])
    high_x = min(points[south_east, 0], points[north_east, 0])
    low_y = max(points[south_west, 1], points[south_east, 1])
    high_y = min(points[north_west, 1], points[north_east, 1])
    # The sorted list stands in the last third; of equal points it keeps the first.
    begin = 2 * n
    end = begin
    for i in range(n):
        x = points[i, 0]
        y = points[i, 1]
        if (low_x < x) & (x < high_x) & (low_y < y) & (y < high_y):
            continue
        if end - begin == _MOST_SORTED:
            return -1
        j = end
        while j > begin:
            other = workspace[j - 1]
            if points[other, 0] < x or (points[other, 0] == x and points[other, 1] <= y):
                break
            workspace[j] = other
            j -= 1
        if j > begin and points[workspace[j - 1], 0] == x and points[workspace[j - 1], 1] == y:
            # An equal point of smaller index is there already: close the gap again.
            while j < end:
                workspace[j] = workspace[j + 1]
                j += 1
            continue
        workspace[j] = i
        end += 1
    if end - begin == 1:
        return 1
    # Lower chain from left to right, then upper chain from right to left, on one stack.
    size = bottom = np.int64(0)
    for k in range(begin, end):
        size = _push(points, workspace, size, bottom, workspace[k])
    bottom = size - 1
    for k in range(end - 2, begin - 1, -1):
        size = _push(points, workspace, size, bottom, workspace[k])
    return size - 1


@part
def _push(points, stack, size, bottom, index):
    """Push a point after popping, above position ``bottom``, those that are no left turn; returns the new size."""
    x = points[index, 0]
    y = points[index, 1]
    while size - bottom >= 2 and (
        orient2d(
            points[stack[size - 2], 0],
            points[stack[size - 2], 1],
            points[stack[size - 1], 0],
            points[stack[size - 1], 1],
            x,
            y,
        )
        <= 0
    ):
        size -= 1
    stack[size] = index
    return size + 1
