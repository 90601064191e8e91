"""Discarding points that are certainly inside the hull, in one pass.

The hull of a small sample of the input is a polygon with input points as corners, so no point in its interior is a
hull vertex. For a fast test the polygon is turned into a table: the x-axis is cut into bins, and each bin gets an
interval of y that lies inside the polygon for every x of the bin. All rounding goes to the safe side, so a point is
only discarded when it is provably not a vertex; NaN and infinite coordinates fail every comparison and are kept.
"""

import numpy as np

from entreg.kernels import kernel, part
from entreg.parallel import chunk_ranges, run_chunks

# Outside these magnitudes the table could overflow or lose its margins to underflow; such input is not filtered.
_LARGEST = 2.0**1000
_SMALLEST = 2.0**-900
# Interpolating between two corners is off by less than 16 units of roundoff of the largest |y| (a ratio, a product, a
# difference and a sum); the margin is far wider and still negligible.
_MARGIN = 2.0**-46
# Multiplier of a linear congruential generator (Knuth's MMIX), for jittered sampling positions.
_MULTIPLIER = np.uint64(6364136223846793005)
_INCREMENT = np.uint64(1442695040888963407)


def keep_in_chunks(points: np.ndarray, table: np.ndarray, origin: float, scale: float, threads: int, tasks: int):
    """Indices of all points that the filter keeps, in ascending order; :func:`keep_outside` on several threads."""
    kept = np.empty(points.shape[0], np.int64)

    def keep(start: int, stop: int) -> np.ndarray:
        out = kept[start:stop]
        return out[: keep_outside(points, start, stop, table, origin, scale, out)]

    parts = run_chunks(keep, chunk_ranges(points.shape[0], tasks), threads)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def filter_size(n: int) -> tuple[int, int]:
    """Sample size and number of bins that balance the cost of building the filter with what it lets through."""
    size = int(4.0 * n**0.5)
    return size, min(max(size // 4, 32), 2048)


@kernel
def sample_positions(n, size):
    """One pseudo-random index from each of ``size`` equal blocks of ``range(n)``; the same for equal arguments."""
    positions = np.empty(size, np.int64)
    state = np.uint64(n)
    for k in range(size):
        state = state * _MULTIPLIER + _INCREMENT
        block_start = n * k // size
        length = n * (k + 1) // size - block_start
        positions[k] = block_start + np.int64(state >> np.uint64(33)) % length
    return positions


@part
def bin_of(x, origin, scale, bins):
    """Bin 1..bins of x, a non-decreasing function even after rounding; 0 below the range and for NaN, bins + 1 above.

    ``origin`` and ``scale`` place bin b at ``origin + [b, b + 1) / scale`` up to rounding.
    """
    t = (x - origin) * scale
    t = t if t > 0.0 else 0.0
    t = t if t < bins + 1.0 else bins + 1.0
    return np.int64(t)


@kernel
def bin_placement(low, high, bins):
    """Origin and scale that spread bins 1..bins over [low, high]; scale 0 when float64 cannot do so safely."""
    width = high - low
    if not (max(abs(low), abs(high)) < _LARGEST and width > _SMALLEST):
        return 0.0, 0.0
    scale = bins / width
    origin = low - width / bins
    if not (np.isfinite(scale) and origin < low):
        return 0.0, 0.0
    return origin, scale


@kernel
def bin_edges(origin, scale, bins):
    """For every bin b, numbers ``lower[b]`` below and ``upper[b]`` above every float64 that :func:`bin_of` puts there.

    The rounded edge is moved outwards until ``bin_of`` itself confirms it.
    """
    lower = np.empty(bins + 2, np.float64)
    upper = np.empty(bins + 2, np.float64)
    lower[0] = -np.inf
    upper[bins + 1] = np.inf
    for b in range(1, bins + 2):
        edge = origin + b / scale
        step = max(abs(edge) * 2.0**-52, 2.0**-1000)
        below = edge
        while bin_of(below, origin, scale, bins) >= b:
            below -= step
            step *= 2.0
        step = max(abs(edge) * 2.0**-52, 2.0**-1000)
        above = edge
        while bin_of(above, origin, scale, bins) < b:
            above += step
            step *= 2.0
        lower[b] = below
        upper[b - 1] = above
    return lower, upper


@kernel
def interior_table(points, sample, hull, bins):
    """The filter built from the hull of a sample of the points.

    Args:
        points: ``(n, 2)`` floats.
        sample: Indices of the sampled points.
        hull: Indices of the vertices of their hull, counter-clockwise from the lexicographically smallest; fewer than
            three when there is no hull.
        bins: Number of x-bins.

    Returns:
        ``table`` of shape (bins + 2, 2): the open y-interval of each bin in which points may be discarded, empty where
        there is none; ``origin`` and ``scale`` for :func:`bin_of`; and the share of the sample that the filter keeps.
        The share is 1 when no filter could be built.
    """
    table = np.empty((bins + 2, 2), np.float64)
    for b in range(bins + 2):
        table[b, 0] = np.inf
        table[b, 1] = -np.inf
    h = hull.shape[0]
    if h < 3:
        return table, 0.0, 0.0, 1.0
    x = np.empty(h + 1, np.float64)
    y = np.empty(h + 1, np.float64)
    last = 0
    largest = 0.0
    for k in range(h):
        x[k] = points[hull[k], 0]
        y[k] = points[hull[k], 1]
        largest = max(largest, abs(y[k]))
        if x[k] > x[last]:
            last = k
    x[h] = x[0]
    y[h] = y[0]
    origin, scale = bin_placement(x[0], x[last], bins)
    if scale == 0.0 or not (_SMALLEST < largest < _LARGEST):
        return table, 0.0, 0.0, 1.0
    lower_edge, upper_edge = bin_edges(origin, scale, bins)
    margin = _MARGIN * largest
    # Both walks go left to right: the lower chain forwards from vertex 0, the upper chain backwards from vertex h.
    below = 0
    above = h
    for b in range(1, bins + 1):
        left = lower_edge[b]
        right = upper_edge[b]
        if left < x[0]:
            continue
        if right > x[last]:
            break
        # The lower chain is convex and the upper one concave, so over the bin they are extreme at its edges.
        while x[below + 1] <= left:
            below += 1
        bottom = _height(x, y, below, below + 1, left)
        while x[below + 1] < right:
            below += 1
        table[b, 0] = max(bottom, _height(x, y, below, below + 1, right)) + margin
        while x[above - 1] <= left:
            above -= 1
        top = _height(x, y, above, above - 1, left)
        while x[above - 1] < right:
            above -= 1
        table[b, 1] = min(top, _height(x, y, above, above - 1, right)) - margin
    return table, origin, scale, share_kept(points, sample, table, origin, scale)


@kernel
def share_kept(points, sample, table, origin, scale):
    """Share of the sampled points that the filter keeps: an estimate of the share of all points."""
    bins = table.shape[0] - 2
    kept = 0
    for index in sample:
        y = points[index, 1]
        b = bin_of(points[index, 0], origin, scale, bins)
        kept += not (table[b, 0] < y < table[b, 1])
    return kept / sample.shape[0]


@part
def _height(x, y, i, j, at):
    return y[i] + (y[j] - y[i]) * ((at - x[i]) / (x[j] - x[i]))


@kernel
def keep_outside(points, start, stop, table, origin, scale, out):
    """Write the indices of the points ``start..stop`` that the filter keeps to the front of ``out``.

    Returns:
        Their number.
    """
    bins = table.shape[0] - 2
    kept = 0
    for i in range(start, stop):
        x = points[i, 0]
        y = points[i, 1]
        b = bin_of(x, origin, scale, bins)
        out[kept] = i
        kept += not ((table[b, 0] < y) & (y < table[b, 1]))
    return kept
