"""A certain lower bound on the range-partition entropy of a point list with respect to its convex hull.

Notation: S the list, n its length, K its hull, V one list element for each of the h strict hull vertices, U the other
n - h elements. Let X be a uniformly random element and P(X) its part in any respectful partition, so that the
partition's entropy is H(P(X)).

**Conditioning.** With B = [X in V], H(P(X)) >= H(P(X) | B) = (h/n) H(P | X in V) + (1 - h/n) H(P | X in U).

**V.** A hull vertex is an extreme point of K, hence of every triangle within K that holds it, hence one of its at
most three corners: a triangle part holds at most 3 elements of V. A run part misses no hull vertex between its first
and last element, so within V (in list order) it is a block of consecutive elements, monotone in x; one that holds v
has at most r(v) elements, the longer of the maximal ascending and the maximal descending block of V around v. Hence
H(P | X in V) >= (1/h) sum_v log(h / max(3, r(v))), and it is at least the entropy of the most uneven partition of h
elements into parts of at most max(3, max_v r(v)).

**U.** A run part holds at most as many elements of U as the longest monotone subsequence of their x. A triangle within
K can be grown until its corners lie on the boundary of K (push a corner away from another one, along their line). Cut
the boundary into m arcs at points b_0 .. b_(m-1). If the corners lie in arcs a <= b <= c, the triangle keeps to the
inner side of the chords from the end of each of these arcs to the start of the next, so it misses the three disjoint
caps beyond those chords. Counting the elements of U in all m^2 caps bounds the elements of U in any triangle. If no
part holds more than M of the n - h elements, H(P | X in U) is at least the entropy of the most uneven partition into
parts of at most M, because entropy is Schur-concave.

Caps are counted in floating point, but a point counts only if it lies beyond the chord by far more than all rounding
errors, so every count is at most the true one and the bound stays valid.
"""

from __future__ import annotations

import numpy as np

from entreg.kernels import kernel

_ARCS = 96
# Scaled coordinates lie in [-1, 1] and carry at most 2**-53 of error, points on the boundary at most 2**-50; the
# orientation determinant is then off by less than 2**-45. The margin is 32 times that.
_MARGIN = 2.0**-40


def scale_to_unit(points: np.ndarray) -> np.ndarray:
    """Move and scale each axis so that the coordinates fill about [-1, 1], with a relative error of 2**-53.

    Scaling by powers of two is exact, so the only rounding is that of one subtraction. Works over the whole float64
    range; an axis without any spread becomes 0.
    """
    scaled = np.empty_like(points)
    for axis in range(2):
        column = points[:, axis]
        _, exponent = np.frexp(np.abs(column).max())
        column = np.ldexp(column, -int(exponent))
        column = column - (0.5 * column.min() + 0.5 * column.max())
        _, exponent = np.frexp(np.abs(column).max())
        scaled[:, axis] = np.ldexp(column, -int(exponent))
    return scaled


def lower_bound(points: np.ndarray, scaled: np.ndarray, hull: np.ndarray) -> float:
    """The bound derived above, in nats.

    Args:
        points: ``(n, 2)`` finite float64.
        scaled: the same after :func:`scale_to_unit`.
        hull: ``(h,)`` indices of the strict hull vertices, one for each, counter-clockwise, h at least 3.
    """
    n, h = len(points), len(hull)
    block = _longest_blocks(points[np.sort(hull), 0])
    largest = np.maximum(block, 3)
    vertices = max(float(np.log(h / np.minimum(largest, h)).mean()), most_uneven_entropy(h, int(largest.max())))
    if n == h:
        return vertices
    inner = np.ones(n, dtype=np.bool_)
    inner[hull] = False
    inner_scaled = scaled[inner]
    x = points[inner, 0]
    longest_run = max(_longest_nondecreasing(x), _longest_nondecreasing(-x))
    triangle = _most_in_triangle(inner_scaled, _boundary_points(scaled[hull]))
    others = most_uneven_entropy(n - h, max(longest_run, triangle))
    return (h * vertices + (n - h) * others) / n


def most_uneven_entropy(total: int, largest: int) -> float:
    """Least entropy, in nats, of a partition of ``total`` elements into parts of at most ``largest``."""
    full, rest = divmod(total, largest)
    tail = rest * np.log(total / rest) if rest else 0.0
    return float(full * largest * np.log(total / largest) + tail) / total


def _boundary_points(polygon: np.ndarray) -> np.ndarray:
    closed = np.concatenate([polygon, polygon[:1]])
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    position = np.arange(_ARCS) * (length[-1] / _ARCS)
    edge = np.clip(np.searchsorted(length, position, side="right") - 1, 0, len(polygon) - 1)
    share = (position - length[edge]) / np.maximum(length[edge + 1] - length[edge], np.finfo(np.float64).tiny)
    share = np.clip(share, 0.0, 1.0)[:, None]
    return (1.0 - share) * closed[edge] + share * closed[edge + 1]


@kernel
def _longest_blocks(x):
    """For each element, the longest block of consecutive, weakly monotone elements that holds it."""
    n = len(x)
    longest = np.ones(n, dtype=np.int64)
    for direction in (1.0, -1.0):
        start = 0
        for i in range(1, n + 1):
            if i == n or direction * x[i] < direction * x[i - 1]:
                for j in range(start, i):
                    longest[j] = max(longest[j], i - start)
                start = i
    return longest


@kernel
def _longest_nondecreasing(x):
    """Length of the longest weakly ascending subsequence: least possible last element for each length."""
    last = np.empty(len(x))
    length = 0
    for i in range(len(x)):
        low, high = 0, length
        while low < high:
            middle = (low + high) // 2
            if last[middle] <= x[i]:
                low = middle + 1
            else:
                high = middle
        last[low] = x[i]
        length = max(length, low + 1)
    return length


@kernel
def _most_in_triangle(points, boundary):
    """Upper bound on the number of points in any triangle within the polygon whose boundary is sampled."""
    m = len(boundary)
    # cap[i, d]: points certainly beyond the chord from boundary point i to i + d.
    cap = np.zeros((m, m + 1), dtype=np.int64)
    for p in range(len(points)):
        x, y = points[p, 0], points[p, 1]
        j = 1
        for i in range(m):
            j = max(j, i + 1)
            ax, ay = x - boundary[i, 0], y - boundary[i, 1]
            # Once beyond the chord to j, a point is beyond those to all later boundary points up to i itself; and
            # the first such j can only move on with i.
            while j < i + m:
                end = j if j < m else j - m
                if (boundary[end, 0] - boundary[i, 0]) * ay - (boundary[end, 1] - boundary[i, 1]) * ax < -_MARGIN:
                    cap[i, j - i] += 1
                    break
                j += 1
    for i in range(m):
        for d in range(1, m + 1):
            cap[i, d] += cap[i, d - 1]
    fewest_missed = len(points)
    for a in range(m):
        for b in range(a, m):
            for c in range(b, m):
                missed = 0
                for start, stop in ((a + 1, b), (b + 1, c), (c + 1, a + m)):
                    if stop > start:
                        missed += cap[start % m, stop - start]
                fewest_missed = min(fewest_missed, missed)
    return len(points) - fewest_missed
