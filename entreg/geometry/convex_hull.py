"""Exact planar convex hulls in time O(n (1 + H)), H being the range-partition entropy of the input."""

from typing import Any

import numpy as np

from entreg.errors import InputError
from entreg.geometry._chains import hull_of_candidates
from entreg.geometry._filtering import filter_size
from entreg.geometry._hull_paths import ALL, hull_by_filter
from entreg.geometry._small_hull import small_hull
from entreg.geometry.validation import as_points, first_nonfinite_row, nonfinite_error
from entreg.parallel import resolve_threads

# Sizes at which each stage begins to pay, measured on uniform, Gaussian and disk input.
_SMALL = 64
_FILTER_FROM = 1_500
_THREADS_FROM = 400_000
# A filter that keeps more than this share of a sample costs more than it saves.
_WORTHWHILE = 0.85
# Chunks per thread, so that threads that are held up do not hold up the others.
_TASKS_PER_THREAD = 4


def convex_hull(points: Any, *, threads: int | None = None) -> np.ndarray:
    """Convex hull of points in the plane, exact for every finite input.

    Points that are certainly interior are discarded in one pass (a sample's hull serves as the certificate); what
    remains is sorted, unless it is sorted already, and scanned with exact orientation tests.

    Args:
        points: ``(n, 2)`` array-like of finite numbers, see :func:`entreg.geometry.validation.as_points`.
        threads: Largest number of threads to use; None for all cores available to the process. The result does not
            depend on it.

    Returns:
        ``(h,)`` int64: indices of the strict hull vertices (no point on an edge between two others), counter-clockwise
        from the lexicographically smallest; of equal points the first.

    Raises:
        InputError: Wrong shape or dtype, NaN or infinite coordinates, fewer than three distinct points, or all points
            on one line.

    Source: the filter generalises Akl and Toussaint (1978) from few extreme points to a sampled hull, our choice; the
    scan is Andrew's monotone chain (1979); the entropy bound is that of Afshani, Barbay and Chan (2009).
    """
    points = as_points(points, 3)
    n = len(points)
    if threads is not None or n >= _FILTER_FROM:
        threads = resolve_threads(threads)
    if n <= _SMALL:
        hull = np.empty(3 * n, np.int64)
        size = small_hull(points, hull)
        if size >= 3:
            return hull[:size]
    if n < _FILTER_FROM:
        hull = hull_of_candidates(points, ALL, True)
    else:
        tasks = _TASKS_PER_THREAD * threads
        filter_tasks = 1 if n < _THREADS_FROM else tasks
        hull = hull_by_filter(points, threads, *filter_size(n), _WORTHWHILE, filter_tasks, tasks)
    if hull.shape[0] < 3:
        raise _no_hull(points, hull.shape[0])
    return hull


def _no_hull(points: np.ndarray, size: int) -> InputError:
    """The error for points whose hull has fewer than three vertices."""
    row = first_nonfinite_row(points)
    if row >= 0:
        return nonfinite_error(points, row)
    if size == 1:
        return InputError(f"A convex hull needs three points not on one line, but all {len(points)} points are equal.")
    return InputError(f"A convex hull needs three points not on one line, but all {len(points)} points lie on one.")
