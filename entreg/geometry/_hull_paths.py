"""The routes from points to their hull; :mod:`entreg.geometry.convex_hull` chooses among them by size.

Each returns the indices of the strict hull vertices, counter-clockwise from the lexicographically smallest point, and
fewer than three when there is no hull: none for a NaN or infinite coordinate, one when all points are equal, two when
they lie on one line. All are exact and agree for every input.
"""

import itertools

import numpy as np

from entreg.geometry._chains import find_ends, hull_from_chains, hull_of_candidates, join_chains
from entreg.geometry._filtering import bin_placement, interior_table, keep_in_chunks, sample_positions
from entreg.geometry._slabs import assign_slabs, chain_run, chain_slabs, fill_slabs, find_runs
from entreg.parallel import chunk_ranges, run_chunks

ALL = np.empty(0, np.int64)
"""Stands for all indices where candidates are expected."""

_SLABS_FROM = 50_000
_SLAB_SIZE = 2_048
_MOST_SLABS = 512
_MOST_RUNS = 16


def hull_by_filter(
    points: np.ndarray,
    threads: int,
    sample_size: int,
    bins: int,
    worthwhile: float,
    filter_tasks: int,
    tasks: int,
) -> np.ndarray:
    """Hull of what a filter keeps; without the filter when it would keep more than the share ``worthwhile``.

    The filter's pass is cut into ``filter_tasks`` chunks for the threads, everything slower into ``tasks``.
    """
    n = points.shape[0]
    sample = sample_positions(n, sample_size)
    sample_hull = hull_of_candidates(points, sample, False)
    table, origin, scale, share = interior_table(points, sample, sample_hull, bins)
    if share <= worthwhile:
        candidates = keep_in_chunks(points, table, origin, scale, threads, filter_tasks)
        if candidates.shape[0] >= _SLABS_FROM:
            return hull_by_slabs(points, threads, candidates, tasks, slab_count(candidates.shape[0]))
        return hull_of_candidates(points, candidates, False)
    if n >= _SLABS_FROM:
        return hull_by_runs(points, threads, tasks, _MOST_RUNS)
    return hull_of_candidates(points, ALL, True)


def slab_count(n: int) -> int:
    """Number of slabs that keeps a slab's records in cache and the number of write streams moderate."""
    return min(max(n // _SLAB_SIZE, 4), _MOST_SLABS)


def hull_by_runs(points: np.ndarray, threads: int, tasks: int, most_runs: int) -> np.ndarray:
    """Hull of points that come in few runs of monotone x: no sorting as long as the runs' chains do not overlap.

    With more than ``most_runs`` runs, or overlapping ones, it goes on to :func:`hull_by_slabs`, in the latter case
    with the points that are left on the chains of their runs.
    """
    n = points.shape[0]
    bounds = find_runs(points, most_runs)
    if bounds.shape[0] == 0:
        return hull_by_slabs(points, threads, ALL, tasks, slab_count(n))
    ends = _find_ends(points, ALL, threads, tasks)
    if ends[0] < 0:
        return ALL
    pieces = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        cuts = [start + cut for cut, _ in chunk_ranges(stop - start, max(1, tasks * (stop - start) // n))]
        # Points with equal x stay together, so that their ties are resolved within one chain.
        pieces += _move_off_ties(points, cuts, stop)
    records = np.empty((2 * n + 4, 3))
    sizes = run_chunks(lambda start, stop: chain_run(points, ends, start, stop, records), pieces, threads)
    sides = []
    for side in range(2):
        begins = [side * n + start for start, _ in pieces]
        segments = [(b, b + size[side]) for b, size in zip(begins, sizes, strict=True) if size[side] > 0]
        segments.sort(key=lambda segment: records[segment[0], 0])
        sides.append(segments)
    overlapping = any(
        records[end - 1, 0] >= records[begin, 0]
        for segments in sides
        for (_, end), (begin, _) in itertools.pairwise(segments)
    )
    if overlapping:
        left = [records[begin:end, 2].astype(np.int64) for segments in sides for begin, end in segments]
        candidates = np.concatenate([ends, *left])
        return hull_by_slabs(points, threads, candidates, tasks, slab_count(candidates.shape[0]))
    return _joined_hull(points, ends, records, *sides)


def hull_by_slabs(points: np.ndarray, threads: int, candidates: np.ndarray, tasks: int, slabs: int) -> np.ndarray:
    """Hull of the candidates (:data:`ALL` for all points): distributed to slabs of x, sorted within each."""
    everything = candidates is ALL
    count = points.shape[0] if everything else candidates.shape[0]
    ends = _find_ends(points, candidates, threads, tasks)
    if ends[0] < 0:
        return ALL
    slabs += 2
    origin, scale = bin_placement(float(points[ends[0], 0]), float(points[ends[1], 0]), slabs - 2)
    labels = np.empty(count, np.int16)
    chunks = chunk_ranges(count, tasks)
    counts = np.stack(
        run_chunks(
            lambda start, stop: assign_slabs(
                points, candidates, everything, ends, origin, scale, slabs, start, stop, labels
            ),
            chunks,
            threads,
        )
    )
    slab_starts = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    positions = slab_starts[:-1] + np.cumsum(counts, axis=0) - counts
    records = np.empty((slab_starts[-1] + 4, 3))
    run_chunks(
        lambda start, stop, free: fill_slabs(points, candidates, everything, slabs, start, stop, labels, free, records),
        [(*chunk, free) for chunk, free in zip(chunks, positions, strict=True)],
        threads,
    )
    groups = [_balanced(slab_starts[side * slabs : (side + 1) * slabs + 1], tasks, side * slabs) for side in range(2)]
    ends_of_chains = iter(
        run_chunks(lambda begin, end: chain_slabs(records, slab_starts, begin, end), groups[0] + groups[1], threads)
    )
    sides = [[(int(slab_starts[begin]), next(ends_of_chains)) for begin, _ in group] for group in groups]
    return _joined_hull(points, ends, records, *sides)


def _balanced(starts: np.ndarray, tasks: int, offset: int) -> list[tuple[int, int]]:
    """Group consecutive slabs (numbered from ``offset``) so that groups hold about equally many records."""
    slabs = len(starts) - 1
    targets = starts[0] + (starts[-1] - starts[0]) * np.arange(1, tasks) / tasks
    cuts = [0, *np.searchsorted(starts, targets).tolist(), slabs]
    return [(offset + a, offset + b) for a, b in itertools.pairwise(cuts) if a < b]


def _find_ends(points: np.ndarray, candidates: np.ndarray, threads: int, tasks: int) -> np.ndarray:
    everything = candidates is ALL
    count = points.shape[0] if everything else candidates.shape[0]
    found = run_chunks(
        lambda start, stop: find_ends(points, candidates, everything, start, stop), chunk_ranges(count, tasks), threads
    )
    if any(first < 0 for first, _ in found):
        return np.array([-1, -1])
    first = min((first for first, _ in found), key=lambda i: (points[i, 0], points[i, 1], i))
    last = max((last for _, last in found), key=lambda i: (points[i, 0], points[i, 1], -i))
    return np.array([first, last])


def _move_off_ties(points: np.ndarray, cuts: list[int], stop: int) -> list[tuple[int, int]]:
    moved = [cuts[0]]
    for cut in cuts[1:]:
        while cut < stop and points[cut, 0] == points[cut - 1, 0]:
            cut += 1
        moved.append(cut)
    return [(a, b) for a, b in itertools.pairwise([*moved, stop]) if a < b]


def _joined_hull(
    points: np.ndarray,
    ends: np.ndarray,
    records: np.ndarray,
    lower: list[tuple[int, int]],
    upper: list[tuple[int, int]],
) -> np.ndarray:
    """Hull from chains (row ranges of ``records``, ordered by x); the last four rows of ``records`` are free."""
    if not any(begin < end for begin, end in lower + upper):
        return np.empty(1 if ends[0] == ends[1] else 2, np.int64)
    bounds = []
    for side, segments in enumerate((lower, upper)):
        row = len(records) - 4 + 2 * side
        for k in range(2):
            x, y = points[ends[k]]
            records[row + k] = x, -y if side else y, ends[k]
        chains = np.array([(row, row + 1), *segments, (row + 1, row + 2)], dtype=np.int64)
        begins, stops = chains[:, 0].copy(), chains[:, 1].copy()
        join_chains(records, begins, stops)
        bounds += [begins, stops]
    return hull_from_chains(records, *bounds)
