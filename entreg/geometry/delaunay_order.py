"""Putting points into the order of a binary trie over Morton keys.

Each coordinate is mapped to 16 bits over the extent of the points and the bits of x and y are interleaved, y above x.
Points whose keys first differ in an odd bit are separated by a horizontal line, in an even bit by a vertical one: this
bit is the *level* at which they part, and the sorted keys with these levels are the tree of cells that
:mod:`entreg.geometry.delaunay_merge` works through. Points that share a key are told apart by new keys over their own
extent, with levels below those of the keys above; a few are ordered by x and then y. Equal points are dropped, all but
the one given first.

A key and the position of its point are packed in one uint64, so that sorting is stable and moves 8 bytes per point.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from entreg.kernels import kernel, part

KEY_BITS = 32
BUCKET_BITS = 11
_CELLS = 65535.99
_POSITION_MASK = np.uint64(0xFFFFFFFF)
_KEY_SHIFT = np.uint64(32)
# Levels of points ordered by x and then y (even, as for a vertical line), and of equal points.
_COLUMN_LEVEL = -32766
_EQUAL_LEVEL = -32768
_INSERTION_LIMIT = 24


@intrinsic
def _leading_zeros(typing_context, value):
    """Leading zero bits of a uint64."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@part
def highest_bit(value):
    """Position of the highest set bit of a non-zero uint64."""
    return np.int64(63) - np.int64(_leading_zeros(np.uint64(value)))


@kernel
def bounds(points, start, stop):
    """``(least x, greatest x, least y, greatest y)`` of some rows; the first is NaN if a coordinate is not finite."""
    x_low = x_high = points[start, 0]
    y_low = y_high = points[start, 1]
    finite = True
    for i in range(start, stop):
        x = points[i, 0]
        y = points[i, 1]
        x_low = x if x < x_low else x_low
        x_high = x if x > x_high else x_high
        y_low = y if y < y_low else y_low
        y_high = y if y > y_high else y_high
        finite &= (abs(x) < np.inf) & (abs(y) < np.inf)
    return (x_low if finite else np.nan), x_high, y_low, y_high


@part
def _spread_bits(value):
    """Move the 16 low bits of a uint64 to its even bits."""
    value = (value | (value << np.uint64(8))) & np.uint64(0x00FF00FF)
    value = (value | (value << np.uint64(4))) & np.uint64(0x0F0F0F0F)
    value = (value | (value << np.uint64(2))) & np.uint64(0x33333333)
    return (value | (value << np.uint64(1))) & np.uint64(0x55555555)


@part
def _morton_key(x, y):
    return _spread_bits(np.uint64(np.int64(x))) | (_spread_bits(np.uint64(np.int64(y))) << np.uint64(1))


@kernel
def write_keys(scaled, x_low, y_low, extent, packed, counts, start, stop):
    """Write packed keys of the points ``start .. stop - 1`` and add to the counts of their highest bits.

    Args:
        scaled: Flat coordinates.
        x_low, y_low, extent: Corner and side of a square that holds all points.
        packed: Out: one entry per point.
        counts: int64, one for each value of the highest bits; their number is a power of two, at least 2.

    Returns:
        Whether these keys are in order.
    """
    # Without an extent, all points lie in one cell.
    scale = _CELLS / extent if extent > 0.0 else 0.0
    shift = np.uint64(64 - highest_bit(np.uint64(counts.shape[0])))
    ascending = True
    last = np.uint64(0)
    for i in range(start, stop):
        key = _morton_key((scaled[2 * i] - x_low) * scale, (scaled[2 * i + 1] - y_low) * scale)
        entry = (key << _KEY_SHIFT) | np.uint64(i)
        packed[i] = entry
        counts[entry >> shift] += 1
        ascending &= entry >= last
        last = entry
    return ascending


@kernel
def scatter(packed, out, offsets, start, stop):
    """Move ``packed[start:stop]`` to ``out``, each bucket of equal highest bits from its offset on (changed)."""
    shift = np.uint64(64 - BUCKET_BITS)
    for i in range(start, stop):
        entry = packed[i]
        bucket = entry >> shift
        out[offsets[bucket]] = entry
        offsets[bucket] += 1


@kernel
def sort_packed(packed, scratch, start, stop):
    """Sort ``packed[start:stop]`` in place by eight bits at a time, highest first; prefixes in common are skipped."""
    counts = np.empty(257, np.int64)
    # Pending ranges are disjoint, and only those above the limit wait.
    pending = np.empty(((stop - start) // _INSERTION_LIMIT + 1, 2), np.int64)
    pending[0, 0] = start
    pending[0, 1] = stop
    depth = 1
    while depth > 0:
        depth -= 1
        low, high = pending[depth, 0], pending[depth, 1]
        if high - low <= _INSERTION_LIMIT:
            _insertion_sort(packed, low, high)
            continue
        ascending = True
        differing = np.uint64(0)
        for i in range(low + 1, high):
            ascending &= packed[i] >= packed[i - 1]
            differing |= packed[i] ^ packed[low]
        if ascending:
            continue
        shift = np.uint64(max(highest_bit(differing) - 7, 0))
        for digit in range(257):
            counts[digit] = 0
        for i in range(low, high):
            counts[((packed[i] >> shift) & np.uint64(255)) + np.uint64(1)] += 1
        position = low
        for digit in range(257):
            position += counts[digit]
            counts[digit] = position
        for i in range(low, high):
            digit = (packed[i] >> shift) & np.uint64(255)
            scratch[counts[digit]] = packed[i]
            counts[digit] += 1
        for i in range(low, high):
            packed[i] = scratch[i]
        position = low
        for digit in range(256):
            end = counts[digit]
            if end - position > _INSERTION_LIMIT:
                pending[depth, 0] = position
                pending[depth, 1] = end
                depth += 1
            elif end - position > 1:
                _insertion_sort(packed, position, end)
            position = end


@part
def _insertion_sort(packed, start, stop):
    for i in range(start + 1, stop):
        entry = packed[i]
        k = i
        while k > start and packed[k - 1] > entry:
            packed[k] = packed[k - 1]
            k -= 1
        packed[k] = entry


@kernel
def write_levels(packed, levels, start, stop):
    """Write the levels after the entries ``start .. stop - 1``, entry ``stop`` being there as well.

    Returns:
        Whether any two neighbours share a key.
    """
    tied = False
    for i in range(start, stop):
        differing = (packed[i] ^ packed[i + 1]) >> _KEY_SHIFT
        if differing == np.uint64(0):
            tied = True
            levels[i] = _EQUAL_LEVEL
        else:
            levels[i] = highest_bit(differing)
    return tied


@kernel
def arrange(scaled, x_low, y_low, extent, adaptive, packed, scratch, counts, levels):
    """Write the keys of all points, sorted, and their levels: :func:`write_keys` to :func:`write_levels` in one call.

    Args:
        scaled, x_low, y_low, extent: As for :func:`write_keys`.
        adaptive: Whether keys that are in order are not sorted.
        packed, levels: Out: one entry per point.
        scratch: Room for as many keys.
        counts: Room for the counts of :func:`write_keys`, two int64.

    Returns:
        Whether any two neighbours share a key.
    """
    zero = np.int64(0)
    count = packed.shape[0]
    in_order = write_keys(scaled, x_low, y_low, extent, packed, counts, zero, count)
    if not (adaptive and in_order):
        sort_packed(packed, scratch, zero, count)
    return write_levels(packed, levels, zero, count - 1)


@kernel
def resolve_ties(exact, packed, scratch, levels, column_limit):
    """Order the points that share a key, set their levels, and drop equal points.

    Args:
        exact: Flat coordinates in the order given.
        packed, levels: Sorted entries and their levels, changed.
        scratch: Room for as many entries.
        column_limit: Up to so many points are ordered by x and then y.

    Returns:
        Number of distinct points, at the front of ``packed`` and ``levels``; and ``(k, 2)`` int64 pairs of positions: a
        point that was dropped, and the equal one that was kept.
    """
    count = packed.shape[0]
    # Pending ranges are disjoint and hold at least two entries.
    pending = np.empty((count // 2 + 1, 3), np.int64)
    start = 0
    while start < count:
        stop = start + 1
        while stop < count and levels[stop - 1] == _EQUAL_LEVEL:
            stop += 1
        if stop - start > 1:
            pending[0, 0], pending[0, 1], pending[0, 2] = start, stop, 1
            depth = 1
            while depth > 0:
                depth -= 1
                low, high, zoom = pending[depth, 0], pending[depth, 1], pending[depth, 2]
                if high - low <= column_limit:
                    _sort_column(exact, packed, levels, low, high)
                elif _write_local_keys(exact, packed, low, high):
                    sort_packed(packed, scratch, low, high)
                    write_levels(packed, levels, low, high - 1)
                    first = low
                    for i in range(low, high):
                        if i == high - 1 or levels[i] != _EQUAL_LEVEL:
                            if i < high - 1:
                                levels[i] -= KEY_BITS * zoom
                            if i > first:
                                pending[depth, 0], pending[depth, 1], pending[depth, 2] = first, i + 1, zoom + 1
                                depth += 1
                            first = i + 1
        start = stop
    return _drop_equal(packed, levels)


@part
def _write_local_keys(exact, packed, start, stop):
    """Replace the keys of some entries by ones over the extent of their points; False if all these are equal."""
    position = packed[start] & _POSITION_MASK
    x_low = x_high = exact[2 * position]
    y_low = y_high = exact[2 * position + 1]
    for i in range(start + 1, stop):
        position = packed[i] & _POSITION_MASK
        x, y = exact[2 * position], exact[2 * position + 1]
        x_low, x_high = min(x_low, x), max(x_high, x)
        y_low, y_high = min(y_low, y), max(y_high, y)
    extent = max(x_high - x_low, y_high - y_low)
    if extent == 0.0:
        return False
    # The reciprocal of a subnormal extent would overflow.
    magnification = 2.0**100 if extent < 2.0**-900 else 1.0
    scale = _CELLS / (extent * magnification)
    for i in range(start, stop):
        position = packed[i] & _POSITION_MASK
        key = _morton_key(
            ((exact[2 * position] - x_low) * magnification) * scale,
            ((exact[2 * position + 1] - y_low) * magnification) * scale,
        )
        packed[i] = (key << _KEY_SHIFT) | position
    return True


@part
def _sort_column(exact, packed, levels, start, stop):
    """Sort entries by x, then y, then position, and set their levels."""
    for i in range(start + 1, stop):
        entry = packed[i]
        position = entry & _POSITION_MASK
        x, y = exact[2 * position], exact[2 * position + 1]
        k = i
        while k > start:
            other = packed[k - 1] & _POSITION_MASK
            other_x, other_y = exact[2 * other], exact[2 * other + 1]
            if other_x < x or (other_x == x and (other_y < y or (other_y == y and other < position))):
                break
            packed[k] = packed[k - 1]
            k -= 1
        packed[k] = entry
    for i in range(start, stop - 1):
        a = packed[i] & _POSITION_MASK
        b = packed[i + 1] & _POSITION_MASK
        equal = exact[2 * a] == exact[2 * b] and exact[2 * a + 1] == exact[2 * b + 1]
        levels[i] = _EQUAL_LEVEL if equal else _COLUMN_LEVEL


@part
def _drop_equal(packed, levels):
    count = packed.shape[0]
    dropped = 0
    for i in range(count - 1):
        dropped += levels[i] == _EQUAL_LEVEL
    duplicates = np.empty((dropped, 2), np.int64)
    dropped = 0
    kept = 0
    for i in range(1, count):
        if levels[i - 1] == _EQUAL_LEVEL:
            duplicates[dropped, 0] = packed[i] & _POSITION_MASK
            duplicates[dropped, 1] = packed[kept] & _POSITION_MASK
            dropped += 1
        else:
            # Between kept points lies one level that is not of equal points: the last one.
            levels[kept] = levels[i - 1]
            kept += 1
            packed[kept] = packed[i]
    return kept + 1, duplicates


@kernel
def gather(scaled, packed, ordered, original, start, stop):
    """Copy the coordinates of sorted entries to ``ordered`` and their positions to ``original``."""
    for i in range(start, stop):
        position = packed[i] & _POSITION_MASK
        ordered[2 * i] = scaled[2 * position]
        ordered[2 * i + 1] = scaled[2 * position + 1]
        original[i] = position
