"""Range-partition entropy of a list of planar points with respect to the convex hull.

**Definition** (paper: "Range-partition entropy"; arXiv 2508.20489; structural part: Afshani, Barbay, Chan). A
partition of the list S is *respectful* if each part is one of

1. a *single* point;
2. a *triangle* part: its points lie in a closed triangle, which may be degenerate, wholly inside the closed convex
   hull of S;
3. a *run*: its points are in sorted order along the list, that is, x never decreases or never increases; and every
   other element of the list between its first and its last one is neither at a hull vertex nor in another run.

H(S) is the least entropy ``sum_P (|P| / n) log(n / |P|)`` of a respectful partition.

The sources at hand fix the idea, not these details, so they are our reading. *Closed* triangles: a triangle that
touches the boundary of the hull still lies inside it, so it may hold up to three hull vertices, and any three points
form a part. Without it the entropy of n points in convex position would be log n instead of log(n / 3). *Runs are
disjoint in the list* (their index ranges do not overlap), not in the plane: then k interleaved sorted sequences have
entropy log k, as in sorting, which the notion is meant to subsume. *A run may skip* points that are no hull vertices
and belong to no run: an algorithm discards them by the triangles first and then meets the rest in sorted order.
Sorted by x, weakly: ties cost nothing, since of equal x only the extreme y matter.

The exact value is a minimum over exponentially many partitions; :func:`hull_entropy` encloses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from entreg.entropy._hull_lower_bound import lower_bound, scale_to_unit
from entreg.entropy.partition import partition_entropy
from entreg.errors import InputError


class PartKind(IntEnum):
    """Why a part of a respectful partition is allowed."""

    SINGLE = 0
    TRIANGLE = 1
    RUN = 2


@dataclass(frozen=True, eq=False)
class HullPartition:
    """A partition of a point list into singles, triangle parts and runs, ordered by decreasing size.

    Attributes:
        labels: ``(n,)`` int64, the part of each point, in ``[0, parts)``.
        kinds: ``(parts,)`` int8, a :class:`PartKind` each.
        corners: ``(parts, 3)`` int64, for singles and triangles the indices of the points at the triangle's corners
            (repeated if it is degenerate), for runs -1. Corners need not belong to the part.
        spans: ``(parts, 2)`` int64, for runs the half-open range of list indices from the first to past the last
            element, for other parts -1.
    """

    labels: np.ndarray
    kinds: np.ndarray
    corners: np.ndarray
    spans: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """``(parts,)`` int64, the number of points of each part."""
        return np.bincount(self.labels, minlength=len(self.kinds))

    @property
    def entropy(self) -> float:
        """Entropy of the partition in nats."""
        return partition_entropy(self.sizes)


@dataclass(frozen=True, eq=False)
class EntropyBounds:
    """``lower <= H(S) <= upper``, in nats; ``partition`` is respectful and has entropy ``upper``."""

    lower: float
    upper: float
    partition: HullPartition


def hull_entropy(points: Any) -> EntropyBounds:
    """Enclose the range-partition entropy of a point list with respect to its convex hull (module docstring).

    Upper bound: the hull is triangulated from a root triangle outwards, each cap being split where a sample says that
    the triangle takes most points; then runs are cut from the hull vertices together with the points of small
    triangles, and from the whole list, and kept where they lower the entropy; what is left alone is grouped by
    threes. All decisions use the exact orientation predicate, so the partition is respectful for every finite input.
    Lower bound: see :mod:`entreg.entropy._hull_lower_bound`, where it is proved. A few seconds for a million points.

    When all points are collinear (or equal, or there is one), one degenerate triangle holds them: both bounds are 0.

    Args:
        points: ``(n, 2)`` finite real coordinates, n at least 1: array, CPU tensor or nested sequence, of values that
            float64 holds exactly. The order of the rows matters.

    Returns:
        :class:`EntropyBounds` with ``0 <= lower <= H <= upper <= log n``.

    Raises:
        InputError: wrong shape, no points, NaN or infinite coordinates, or values that float64 cannot hold.
    """
    # Geometry builds on entropy, so entropy may use its exact kernels only once both are loaded.
    from entreg.entropy import _hull_carving as carving
    from entreg.geometry.convex_hull import convex_hull

    points = _finite_points(points)
    n = len(points)
    low, high, collinear = carving.collinear_span(points)
    if collinear:
        partition = HullPartition(
            labels=np.zeros(n, dtype=np.int64),
            kinds=np.array([PartKind.TRIANGLE if n > 1 else PartKind.SINGLE], dtype=np.int8),
            corners=np.array([[low, high, high]], dtype=np.int64),
            spans=np.full((1, 2), -1, dtype=np.int64),
        )
        return EntropyBounds(0.0, 0.0, partition)
    hull = convex_hull(points)
    scaled = scale_to_unit(points)
    carved = carving.carve(points, scaled, hull)
    vertex = carving.at_hull_vertex(points, carved.owner, carved.corners)
    run_of, remaining, runs = carving.choose_runs(points[:, 0], carved.owner, len(carved.corners), vertex)
    partition = _assemble(carved.owner, carved.corners, run_of, remaining, runs)
    upper = partition.entropy
    # The bounds may meet; rounding must not make them cross.
    return EntropyBounds(min(max(lower_bound(points, scaled, hull), 0.0), upper), upper, partition)


def check_partition(points: Any, partition: HullPartition) -> None:
    """Check that a partition of a point list is respectful in the sense of the module docstring. Exact, O(n log n).

    Args:
        points: ``(n, 2)`` the list, as for :func:`hull_entropy`.
        partition: the partition to check.

    Raises:
        InputError: one sentence naming the first violation found.
    """
    from entreg.entropy import _hull_carving as carving
    from entreg.geometry.convex_hull import convex_hull

    points = _finite_points(points)
    n, parts = len(points), len(partition.kinds)
    labels, kinds = partition.labels, partition.kinds
    corners, spans = partition.corners, partition.spans
    if labels.shape != (n,) or corners.shape != (parts, 3) or spans.shape != (parts, 2):
        raise InputError(f"the partition's arrays do not fit {n} points and {parts} parts")
    if labels.min() < 0 or labels.max() >= parts or (partition.sizes == 0).any():
        raise InputError("every label must name a part and every part must have a point")
    if not np.isin(kinds, list(PartKind)).all():
        raise InputError("every part must be a single, a triangle or a run")
    is_run = kinds == PartKind.RUN
    if corners.max() >= n or ((corners < 0).any(axis=1) != is_run).any():
        raise InputError("singles and triangles need three corners among the points, and runs none")
    if (partition.sizes[kinds == PartKind.SINGLE] != 1).any():
        raise InputError("a single must have exactly one point")
    outside = carving.first_outside(points, labels, np.where(is_run[:, None], -1, corners))
    if outside >= 0:
        raise InputError(f"point {outside} lies outside the triangle of its part {labels[outside]}")
    if not is_run.any():
        return
    members = np.flatnonzero(is_run[labels])
    # Members sorted by run; within a run they stay in list order.
    members = members[np.argsort(labels[members], kind="stable")]
    first = np.flatnonzero(np.diff(labels[members], prepend=-1))
    last = np.append(first[1:], len(members)) - 1
    run_parts = labels[members[first]]
    if (spans[run_parts] != np.stack([members[first], members[last] + 1], axis=1)).any():
        raise InputError("the span of a run must reach from its first to past its last element")
    steps = np.diff(points[members, 0])
    within = labels[members[1:]] == labels[members[:-1]]
    rises = np.bincount(labels[members[1:]][within & (steps > 0)], minlength=parts)
    falls = np.bincount(labels[members[1:]][within & (steps < 0)], minlength=parts)
    if ((rises > 0) & (falls > 0)).any():
        raise InputError("the x coordinates of a run must never decrease or never increase along the list")
    by_start = run_parts[np.argsort(spans[run_parts, 0])]
    if (spans[by_start[1:], 0] < spans[by_start[:-1], 1]).any():
        raise InputError("the index ranges of two runs must not overlap")
    blockers = _at_hull_vertices(points, carving, convex_hull) & ~is_run[labels]
    before = np.concatenate([[0], np.cumsum(blockers)])
    if (before[spans[run_parts, 1]] > before[spans[run_parts, 0]]).any():
        raise InputError("a run must not skip a point at a hull vertex")


def _at_hull_vertices(points: np.ndarray, carving: Any, convex_hull: Any) -> np.ndarray:
    low, high, collinear = carving.collinear_span(points)
    hull = np.array([low, high]) if collinear else convex_hull(points)
    # Adding 0 makes -0 and 0 the same bytes; complex numbers compare both coordinates at once.
    place = (points + 0.0).view(np.complex128)[:, 0]
    return np.isin(place, place[hull])


def _finite_points(points: Any) -> np.ndarray:
    from entreg.geometry.validation import as_points, require_finite

    points = as_points(points)
    require_finite(points)
    return points


def _assemble(
    owner: np.ndarray, triangle_corners: np.ndarray, run_of: np.ndarray, remaining: np.ndarray, runs: int
) -> HullPartition:
    """Number the runs, the triangles that keep three points or more, and the rest grouped by threes."""
    in_run = run_of >= 0
    kept = np.flatnonzero(remaining >= 3)
    number_of = np.full(len(remaining) + 1, -1, dtype=np.int64)
    number_of[kept] = runs + np.arange(len(kept))
    # Owner -1 indexes the extra last entry.
    labels = np.where(in_run, run_of, number_of[owner])
    alone = np.flatnonzero(labels < 0)
    groups = -(-len(alone) // 3)
    labels[alone] = runs + len(kept) + np.arange(len(alone)) // 3
    grouped = np.append(alone, alone[-1:].repeat(3 * groups - len(alone))).reshape(groups, 3)
    parts = runs + len(kept) + groups
    kinds = np.full(parts, PartKind.TRIANGLE, dtype=np.int8)
    kinds[:runs] = PartKind.RUN
    if len(alone) % 3 == 1:
        kinds[-1] = PartKind.SINGLE
    corners = np.concatenate([np.full((runs, 3), -1, dtype=np.int64), triangle_corners[kept], grouped])
    spans = np.full((parts, 2), -1, dtype=np.int64)
    members = np.flatnonzero(in_run)
    # Later assignments win: reversed order leaves the first element of each run.
    spans[run_of[members[::-1]], 0] = members[::-1]
    spans[run_of[members], 1] = members + 1
    order = np.argsort(-np.bincount(labels, minlength=parts), kind="stable")
    rank = np.empty(parts, dtype=np.int64)
    rank[order] = np.arange(parts)
    return HullPartition(rank[labels], kinds[order], corners[order], spans[order])
