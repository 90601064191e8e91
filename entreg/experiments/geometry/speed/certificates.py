"""Exact checks that a convex hull or a Delaunay triangulation is right, in linear or near-linear time.

They share only the predicates with the algorithms they check: a hull is right when it is strictly convex and no point
lies outside it; a triangulation is right when its triangles fit together over the whole hull and every inner edge is
locally Delaunay. So a million points can be checked without trusting another library's rounding.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from entreg.geometry.predicates import incircle, orient2d


@njit(cache=True, nogil=True)
def _before(points: np.ndarray, a: int, b: int) -> bool:
    """Whether point ``a`` precedes point ``b`` lexicographically."""
    return points[a, 0] < points[b, 0] or (points[a, 0] == points[b, 0] and points[a, 1] < points[b, 1])


@njit(cache=True, nogil=True)
def _runs_to_the_right(points: np.ndarray, chain: np.ndarray) -> bool:
    steps = 0
    for k in range(chain.shape[0] - 1):
        if _before(points, chain[k], chain[k + 1]):
            steps += 1
    return steps == chain.shape[0] - 1


@njit(cache=True, nogil=True)
def _orient(points: np.ndarray, a: int, b: int, c: int) -> int:
    return orient2d(points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1])


@njit(cache=True, nogil=True)
def _count_outside(points: np.ndarray, chain: np.ndarray, wanted: int) -> int:
    """Points strictly on the wrong side of an x-monotone ``chain`` of indices, or outside its range of x."""
    xs = points[chain, 0]
    last = chain.shape[0] - 1
    outside = 0
    for i in range(points.shape[0]):
        x = points[i, 0]
        if not xs[0] <= x <= xs[last]:
            # Both chains span the same range: only the lower one counts these.
            outside += 1 if wanted > 0 else 0
            continue
        low, high = 0, last
        while high - low > 1:
            middle = (low + high) // 2
            if xs[middle] <= x:
                low = middle
            else:
                high = middle
        # A vertical edge can only be the last one; the edge before it bounds the points above or below it.
        if xs[low] == xs[high] and low > 0:
            low, high = low - 1, low
        if (
            orient2d(
                points[chain[low], 0],
                points[chain[low], 1],
                points[chain[high], 0],
                points[chain[high], 1],
                x,
                points[i, 1],
            )
            * wanted
            < 0
        ):
            outside += 1
    return outside


def hull_defect(points: np.ndarray, indices: np.ndarray) -> str | None:
    """What is wrong with a claimed convex hull, or None when it is exactly right.

    Args:
        points: ``(n, 2)`` float64, not all collinear.
        indices: ``(h,)`` claimed strict hull vertices, counter-clockwise from the lexicographically smallest.
    """
    indices = np.asarray(indices, dtype=np.int64)
    h = len(indices)
    if h < 3:
        return f"{h} vertices are fewer than three"
    corners = points[indices]
    last = int(np.lexsort((corners[:, 1], corners[:, 0]))[-1])
    lower, upper = indices[: last + 1], np.append(indices[last:], indices[0])[::-1].copy()
    for name, chain in (("lower", lower), ("upper", upper)):
        if not _runs_to_the_right(points, chain):
            return f"the {name} chain does not run from left to right"
    bad_turns = _count_flat_or_right_turns(points, indices)
    if bad_turns:
        return f"{bad_turns} vertices are not strictly convex"
    outside = _count_outside(points, lower, 1) + _count_outside(points, upper, -1)
    return f"{outside} points lie outside" if outside else None


@njit(cache=True, nogil=True)
def _count_flat_or_right_turns(points: np.ndarray, indices: np.ndarray) -> int:
    h = indices.shape[0]
    count = 0
    for k in range(h):
        if _orient(points, indices[k], indices[(k + 1) % h], indices[(k + 2) % h]) <= 0:
            count += 1
    return count


@njit(cache=True, nogil=True)
def _count_bad_triangles(points: np.ndarray, simplices: np.ndarray) -> int:
    bad = 0
    for t in range(simplices.shape[0]):
        if _orient(points, simplices[t, 0], simplices[t, 1], simplices[t, 2]) <= 0:
            bad += 1
    return bad


@njit(cache=True, nogil=True)
def _count_bad_edges(points: np.ndarray, simplices: np.ndarray, neighbors: np.ndarray) -> tuple[int, int]:
    """Inner edges whose two triangles do not fit together, and those that are not locally Delaunay."""
    misfits, violations = 0, 0
    for t in range(simplices.shape[0]):
        for k in range(3):
            u = neighbors[t, k]
            if u < 0:
                continue
            a, b = simplices[t, (k + 1) % 3], simplices[t, (k + 2) % 3]
            apex = np.int64(-1)
            for j in range(3):
                back = simplices[u, (j + 1) % 3] == b and simplices[u, (j + 2) % 3] == a
                if back and neighbors[u, j] == t:
                    apex = simplices[u, j]
            if apex < 0:
                misfits += 1
            elif t < u:
                p, q, r = simplices[t, 0], simplices[t, 1], simplices[t, 2]
                inside = incircle(
                    points[p, 0],
                    points[p, 1],
                    points[q, 0],
                    points[q, 1],
                    points[r, 0],
                    points[r, 1],
                    points[apex, 0],
                    points[apex, 1],
                )
                if inside > 0:
                    violations += 1
    return misfits, violations


@njit(cache=True, nogil=True)
def _boundary_defect(points: np.ndarray, simplices: np.ndarray, neighbors: np.ndarray) -> tuple[int, int]:
    """Number of boundary edges, and 0 when they form one convex cycle, else the number of the rule broken."""
    following = np.full(points.shape[0], -1, dtype=np.int64)
    count = 0
    start = np.int64(-1)
    for t in range(simplices.shape[0]):
        for k in range(3):
            if neighbors[t, k] < 0:
                a, b = simplices[t, (k + 1) % 3], simplices[t, (k + 2) % 3]
                if following[a] >= 0:
                    return count, 1
                following[a] = b
                start = a
                count += 1
    if count < 3:
        return count, 1
    minima, walked = 0, 0
    previous, current = start, following[start]
    while walked < count:
        after = following[current] if current >= 0 else -1
        if after < 0:
            return count, 1
        if _orient(points, previous, current, after) < 0:
            return count, 2
        # A closed convex curve has one lexicographic minimum; one that winds twice has two.
        if _before(points, current, previous) and _before(points, current, after):
            minima += 1
        previous, current = current, after
        walked += 1
    return count, 0 if previous == start and minima == 1 else 1


def delaunay_defect(points: np.ndarray, simplices: np.ndarray, neighbors: np.ndarray) -> str | None:
    """What is wrong with a claimed Delaunay triangulation, or None when it is exactly right.

    Triangles that are all counter-clockwise, meet pairwise along shared edges and leave one convex boundary cover
    the convex hull once; if then no inner edge has the opposite corner strictly inside the circumcircle, the
    triangulation is Delaunay (Delaunay's lemma).

    Args:
        points: ``(n, 2)`` float64, not all collinear.
        simplices: ``(m, 3)`` counter-clockwise corner indices.
        neighbors: ``(m, 3)`` triangle opposite each corner, -1 at the boundary.
    """
    simplices = np.ascontiguousarray(simplices, dtype=np.int64)
    neighbors = np.ascontiguousarray(neighbors, dtype=np.int64)
    bad_triangles = _count_bad_triangles(points, simplices)
    if bad_triangles:
        return f"{bad_triangles} triangles are not counter-clockwise"
    misfits, violations = _count_bad_edges(points, simplices, neighbors)
    if misfits:
        return f"{misfits} neighbour entries do not fit their triangles"
    if violations:
        return f"{violations} edges are not locally Delaunay"
    boundary, broken_rule = _boundary_defect(points, simplices, neighbors)
    if broken_rule:
        return ("", "the boundary is not one closed cycle", "the boundary is not convex")[broken_rule]
    used = len(np.unique(simplices))
    distinct = used if used == len(points) else len(np.unique(points, axis=0))
    if used != distinct:
        return f"{used} points are corners but {distinct} are distinct"
    if len(simplices) != 2 * used - 2 - boundary:
        return f"{len(simplices)} triangles break Euler's formula for {used} points and {boundary} boundary edges"
    return None


def edge_keys(simplices: np.ndarray, n: int) -> np.ndarray:
    """The undirected edges of triangles ``(m, 3)`` on ``n`` points as sorted unique ``smaller * n + larger``."""
    corners = np.asarray(simplices, dtype=np.int64)
    first = np.concatenate([corners[:, 0], corners[:, 1], corners[:, 2]])
    second = np.concatenate([corners[:, 1], corners[:, 2], corners[:, 0]])
    return np.unique(np.minimum(first, second) * n + np.maximum(first, second))


def vertex_set_difference(exact: np.ndarray, claimed: np.ndarray) -> tuple[int, int]:
    """How many vertices of an exact hull are missing from a claimed one, and how many are too many.

    Args:
        exact: ``(h, 2)`` coordinates.
        claimed: ``(k, 2)`` coordinates of the same dtype.
    """

    # Adding 0.0 makes -0.0 and 0.0 one value, which a set of complex numbers would keep apart in its bytes only.
    def as_set(vertices: np.ndarray) -> np.ndarray:
        plain = np.ascontiguousarray(vertices, dtype=np.float64) + 0.0
        return np.unique(plain.view(np.complex128).ravel())

    exact_set, claimed_set = as_set(exact), as_set(claimed)
    shared = len(np.intersect1d(exact_set, claimed_set, assume_unique=True))
    return len(exact_set) - shared, len(claimed_set) - shared


def canonical_indices(points: np.ndarray) -> np.ndarray:
    """For each of ``(n, 2)`` points the first index with equal coordinates: ``(n,)`` int64."""
    as_numbers = np.ascontiguousarray(points + 0.0).view(np.complex128).ravel()
    _, first, inverse = np.unique(as_numbers, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def triangle_neighbors(points: np.ndarray, simplices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Counter-clockwise corners and neighbours of triangles given in any orientation.

    Returns:
        ``(m, 3)`` corners and ``(m, 3)`` neighbours in :func:`delaunay_defect`'s convention, or None in place of the
        neighbours when some directed edge occurs twice, that is, when triangles overlap.
    """
    n, m = len(points), len(simplices)
    oriented = _counter_clockwise(points, np.ascontiguousarray(simplices, dtype=np.int64))
    # Entry 3 t + k is the edge opposite corner k of triangle t.
    tails, heads = np.roll(oriented, -1, axis=1).ravel(), np.roll(oriented, -2, axis=1).ravel()
    forward, backward = tails * n + heads, heads * n + tails
    order = np.argsort(forward, kind="stable")
    if m == 0 or np.any(forward[order][1:] == forward[order][:-1]):
        return oriented, None
    position = np.minimum(np.searchsorted(forward, backward, sorter=order), 3 * m - 1)
    match = order[position]
    return oriented, np.where(forward[match] == backward, match // 3, -1).reshape(m, 3)


@njit(cache=True, nogil=True)
def _counter_clockwise(points: np.ndarray, simplices: np.ndarray) -> np.ndarray:
    oriented = simplices.copy()
    for t in range(oriented.shape[0]):
        if _orient(points, oriented[t, 0], oriented[t, 1], oriented[t, 2]) < 0:
            oriented[t, 1], oriented[t, 2] = oriented[t, 2], oriented[t, 1]
    return oriented


@njit(cache=True, nogil=True)
def triangle_set_fingerprint(simplices: np.ndarray) -> tuple[int, np.uint64]:
    """Number of triangles ``(m, 3)`` and a 64-bit hash of them as a set of sets.

    Equal sets have equal fingerprints whatever the order of rows and corners; different ones differ but for a chance of
    about 2**-64 (our choice: sorting millions of edges for every library would take longer than the benchmark).
    """
    total = np.uint64(0)
    for t in range(simplices.shape[0]):
        a, b, c = np.int64(simplices[t, 0]), np.int64(simplices[t, 1]), np.int64(simplices[t, 2])
        low, high = min(a, b, c), max(a, b, c)
        state = np.uint64(0)
        for corner in (low, a + b + c - low - high, high):
            # SplitMix64's finaliser over a running state.
            state = (state ^ np.uint64(corner)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
        total += state
    return simplices.shape[0], total
