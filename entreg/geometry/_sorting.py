"""Sorting point records by x.

A record is a row ``(x, y, index)`` of a float64 array (an index below 2**53 is exact). Records with equal x come out
in any order: the callers resolve such ties themselves.
"""

import numpy as np

from entreg.kernels import part

_SMALL = 24
# Mean squared bin occupancy above which insertion sort inside the bins would no longer be linear.
_CROWDED = 24
_SMALLEST_NORMAL = 2.0**-1000


@part
def copy_record(source, i, target, j):
    """Copy row i of ``source`` to row j of ``target``; slice assignment would compile to far more code."""
    target[j, 0] = source[i, 0]
    target[j, 1] = source[i, 1]
    target[j, 2] = source[i, 2]


@part
def sort_by_x(records, start, stop):
    """Sort the rows ``start .. stop - 1`` by x in place, in linear time when x is monotone or spread without clusters.

    Args:
        records: ``(m, 3)`` float64 with finite x.
        start, stop: int64, no literals; ranges instead of slices, because every slice compiles to much code.
    """
    count = stop - start
    if count <= _SMALL:
        _insertion_sort(records, np.int64(0), records, start, stop)
        return
    low = records[start, 0]
    high = low
    ascents = 0
    descents = 0
    for k in range(start + 1, stop):
        x = records[k, 0]
        previous = records[k - 1, 0]
        ascents += x > previous
        descents += x < previous
        low = x if x < low else low
        high = x if x > high else high
    if descents == 0:
        return
    if ascents == 0:
        i = start
        j = stop - 1
        while i < j:
            for column in range(3):
                value = records[i, column]
                records[i, column] = records[j, column]
                records[j, column] = value
            i += 1
            j -= 1
        return
    scratch = np.empty((count, 3), np.float64)
    scale = count / (high - low)
    if not (_SMALLEST_NORMAL < scale < 1.0 / _SMALLEST_NORMAL):
        _merge_sort(records, start, stop, scratch)
        return
    # The bin is a non-decreasing function of x even after rounding, so the bins are in order.
    ends = np.zeros(count + 2, np.int64)
    for k in range(start, stop):
        ends[np.int64((records[k, 0] - low) * scale) + 1] += 1
    crowding = 0
    for b in range(1, count + 2):
        crowding += ends[b] * ends[b]
        ends[b] += ends[b - 1]
    for k in range(start, stop):
        b = np.int64((records[k, 0] - low) * scale)
        position = ends[b]
        ends[b] = position + 1
        copy_record(records, k, scratch, position)
    if crowding <= _CROWDED * count:
        _insertion_sort(scratch, start, records, start, stop)
    else:
        for k in range(count):
            copy_record(scratch, k, records, start + k)
        begin = start
        for b in range(count + 1):
            end = start + ends[b]
            if end - begin > _SMALL:
                _merge_sort(records, begin, end, scratch)
            else:
                _insertion_sort(records, np.int64(0), records, begin, end)
            begin = end


@part
def _insertion_sort(source, offset, target, start, stop):
    """Insert the rows from ``start - offset`` of ``source`` on one by one into the sorted rows of ``target``.

    ``source`` may be ``target``, with offset 0.
    """
    for k in range(start, stop):
        x = source[k - offset, 0]
        y = source[k - offset, 1]
        index = source[k - offset, 2]
        j = k
        while j > start and target[j - 1, 0] > x:
            copy_record(target, j - 1, target, j)
            j -= 1
        target[j, 0] = x
        target[j, 1] = y
        target[j, 2] = index


@part
def _merge_sort(records, begin, end, scratch):
    """Bottom-up merge sort: the choice for x that spread over many orders of magnitude."""
    for start in range(begin, end, _SMALL):
        _insertion_sort(records, np.int64(0), records, start, min(start + _SMALL, end))
    width = _SMALL
    while width < end - begin:
        for start in range(begin, end - width, 2 * width):
            middle = start + width
            stop = min(start + 2 * width, end)
            if records[middle - 1, 0] <= records[middle, 0]:
                continue
            for k in range(width):
                copy_record(records, start + k, scratch, k)
            i = np.int64(0)
            j = middle
            k = start
            while i < width:
                if j < stop and records[j, 0] < scratch[i, 0]:
                    copy_record(records, j, records, k)
                    j += 1
                else:
                    copy_record(scratch, i, records, k)
                    i += 1
                k += 1
        width *= 2
