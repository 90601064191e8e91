"""Sorting point records by x.

A record is a row ``(x, y, index)`` of a float64 array (an index below 2**53 is exact). Records with equal x come out
in any order: the callers resolve such ties themselves.
"""

import numpy as np
from numba import njit

_SMALL = 24
# Mean squared bin occupancy above which insertion sort inside the bins would no longer be linear.
_CROWDED = 24
_SMALLEST_NORMAL = 2.0**-1000


@njit(cache=True, nogil=True)
def copy_record(source, i, target, j):
    """Copy row i of ``source`` to row j of ``target``; slice assignment would compile to far more code."""
    target[j, 0] = source[i, 0]
    target[j, 1] = source[i, 1]
    target[j, 2] = source[i, 2]


@njit(cache=True, nogil=True)
def sort_by_x(records):
    """Sort ``records`` by x in place, in linear time when x is already monotone or spread without heavy clustering.

    Args:
        records: ``(m, 3)`` float64 with finite x.
    """
    m = records.shape[0]
    if m <= _SMALL:
        _insertion_sort(records)
        return
    low = records[0, 0]
    high = low
    ascents = 0
    descents = 0
    for k in range(1, m):
        x = records[k, 0]
        previous = records[k - 1, 0]
        ascents += x > previous
        descents += x < previous
        low = min(low, x)
        high = max(high, x)
    if descents == 0:
        return
    if ascents == 0:
        _reverse(records)
        return
    scratch = np.empty((m, 3))
    scale = m / (high - low)
    if not (_SMALLEST_NORMAL < scale < 1.0 / _SMALLEST_NORMAL):
        _merge_sort(records, scratch)
        return
    # The bin is a non-decreasing function of x even after rounding, so the bins are in order.
    ends = np.zeros(m + 2, np.int64)
    for k in range(m):
        ends[np.int64((records[k, 0] - low) * scale) + 1] += 1
    crowding = 0
    for b in range(1, m + 2):
        crowding += ends[b] * ends[b]
        ends[b] += ends[b - 1]
    for k in range(m):
        b = np.int64((records[k, 0] - low) * scale)
        position = ends[b]
        ends[b] = position + 1
        copy_record(records, k, scratch, position)
    if crowding <= _CROWDED * m:
        _insertion_sort_from(scratch, records)
    else:
        for k in range(m):
            copy_record(scratch, k, records, k)
        start = 0
        for b in range(m + 1):
            stop = ends[b]
            if stop - start > _SMALL:
                _merge_sort(records[start:stop], scratch)
            else:
                _insertion_sort(records[start:stop])
            start = stop


@njit(cache=True, nogil=True)
def _insertion_sort(records):
    _insertion_sort_from(records, records)


@njit(cache=True, nogil=True)
def _insertion_sort_from(source, target):
    """Insert the rows of ``source`` one by one into the sorted front of ``target`` (which may be ``source``)."""
    for k in range(target.shape[0]):
        x = source[k, 0]
        y = source[k, 1]
        index = source[k, 2]
        j = k
        while j > 0 and target[j - 1, 0] > x:
            copy_record(target, j - 1, target, j)
            j -= 1
        target[j, 0] = x
        target[j, 1] = y
        target[j, 2] = index


@njit(cache=True, nogil=True)
def _reverse(records):
    i = 0
    j = records.shape[0] - 1
    while i < j:
        for column in range(3):
            value = records[i, column]
            records[i, column] = records[j, column]
            records[j, column] = value
        i += 1
        j -= 1


@njit(cache=True, nogil=True)
def _merge_sort(records, scratch):
    """Bottom-up merge sort: the choice for x that spread over many orders of magnitude."""
    m = records.shape[0]
    for start in range(0, m, _SMALL):
        _insertion_sort(records[start : start + _SMALL])
    width = _SMALL
    while width < m:
        for start in range(0, m - width, 2 * width):
            middle = start + width
            stop = min(start + 2 * width, m)
            if records[middle - 1, 0] <= records[middle, 0]:
                continue
            for k in range(width):
                copy_record(records, start + k, scratch, k)
            i = 0
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
