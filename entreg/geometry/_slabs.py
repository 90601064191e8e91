"""Kernels of the parallel hull: points split by side and by slabs of x, or taken in the runs they already form.

The results of the kernels are chains in disjoint ranges of x, for :func:`entreg.geometry._chains.join_chains`. Here
``ends`` is the pair of indices of the first and last point.
"""

import numpy as np

from entreg.geometry._chains import extend_chain
from entreg.geometry._filtering import bin_of
from entreg.geometry._sorting import sort_by_x
from entreg.geometry.predicates import orient2d
from entreg.kernels import kernel


@kernel
def assign_slabs(points, candidates, everything, ends, origin, scale, slabs, start, stop, labels):
    """Label candidates ``start..stop`` with ``side * slabs + slab`` (0 is the lower side), -1 on the line of the ends.

    Returns:
        The number of candidates with each label.
    """
    first_x = points[ends[0], 0]
    first_y = points[ends[0], 1]
    last_x = points[ends[1], 0]
    last_y = points[ends[1], 1]
    counts = np.zeros(2 * slabs, np.int64)
    for k in range(start, stop):
        index = k if everything else candidates[k]
        x = points[index, 0]
        y = points[index, 1]
        turn = orient2d(first_x, first_y, last_x, last_y, x, y)
        if turn == 0:
            labels[k] = -1
            continue
        label = bin_of(x, origin, scale, slabs - 2) + slabs * np.int64(turn > 0)
        counts[label] += 1
        labels[k] = label
    return counts


@kernel
def fill_slabs(points, candidates, everything, slabs, start, stop, labels, positions, records):
    """Write candidates ``start..stop`` as records to their slabs; ``positions`` are the next free rows, changed."""
    for k in range(start, stop):
        label = labels[k]
        if label >= 0:
            index = k if everything else candidates[k]
            row = positions[label]
            positions[label] = row + 1
            y = points[index, 1]
            records[row, 0] = points[index, 0]
            records[row, 1] = y if label < slabs else -y
            records[row, 2] = index


@kernel
def chain_slabs(records, slab_starts, begin, end):
    """Chain of consecutive slabs ``begin..end`` of one side, written to the front of their rows; returns its end."""
    chain_begin = slab_starts[begin]
    chain_end = chain_begin
    for slab in range(begin, end):
        start = slab_starts[slab]
        stop = slab_starts[slab + 1]
        sort_by_x(records, start, stop)
        for k in range(start, stop):
            chain_end = extend_chain(records, chain_begin, chain_end, records[k, 0], records[k, 1], records[k, 2])
    return chain_end


@kernel
def find_runs(points, most):
    """Starts of the maximal runs with monotone x (as cut greedily from the left), closed by n.

    Returns:
        The ``runs + 1`` bounds, or none when there are more than ``most`` runs; it stops looking as soon as it knows.
    """
    n = points.shape[0]
    bounds = np.zeros(most + 1, np.int64)
    runs = 1
    direction = 0
    for i in range(1, n):
        step = np.int64(points[i, 0] > points[i - 1, 0]) - np.int64(points[i, 0] < points[i - 1, 0])
        if step * direction < 0:
            if runs == most:
                return bounds[:0]
            bounds[runs] = i
            runs += 1
            direction = 0
        elif step != 0:
            direction = step
    bounds[runs] = n
    return bounds[: runs + 1]


@kernel
def chain_run(points, ends, start, stop, records):
    """Lower and upper chain of points whose x is monotone over ``start..stop``.

    The lower chain is written to the rows of ``records`` from ``start`` on, the upper one from ``n + start`` on.

    Returns:
        The two sizes.
    """
    n = points.shape[0]
    first_x = points[ends[0], 0]
    first_y = points[ends[0], 1]
    last_x = points[ends[1], 0]
    last_y = points[ends[1], 1]
    lower_end = start
    upper_end = n + start
    backwards = points[start, 0] > points[stop - 1, 0]
    for k in range(stop - start):
        index = stop - 1 - k if backwards else start + k
        x = points[index, 0]
        y = points[index, 1]
        turn = orient2d(first_x, first_y, last_x, last_y, x, y)
        if turn < 0:
            lower_end = extend_chain(records, start, lower_end, x, y, np.float64(index))
        elif turn > 0:
            upper_end = extend_chain(records, n + start, upper_end, x, -y, np.float64(index))
    return lower_end - start, upper_end - n - start
