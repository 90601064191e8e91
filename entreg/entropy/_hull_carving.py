"""Carving the convex hull of a point list into triangles and runs of low entropy.

Loaded by :func:`entreg.entropy.hull_entropy` when it is called, never at import: the kernels inline the exact
orientation predicate of :mod:`entreg.geometry`, a package that itself builds on this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entreg.entropy.runs import greedy_run_starts
from entreg.geometry.predicates import orient2d
from entreg.kernels import kernel, part

_ROOT_DIRECTIONS = 16
_ROOT_SAMPLE = 1024
_NODE_SAMPLE = 128
_NODE_CANDIDATES = 8
# A point left in a cap pays for the cap's own subdivision as well. Three nats per point gave the lowest entropies on
# square, disk, Gaussian and clusters among 0.8 to 3; the figure steers the choice of triangles, not their validity.
_CAP_PENALTY = 3.0
# Below this share of captured points an apex is chosen for balance alone, which bounds the depth of the recursion.
_WORTHWHILE = 0.1


@dataclass(frozen=True)
class Carving:
    """Triangles of a triangulation of the hull, and the triangle that each point was given to.

    ``owner`` is -1 for points that were left alone: hull vertices in caps without any other point.
    """

    owner: np.ndarray
    corners: np.ndarray


def carve(points: np.ndarray, scaled: np.ndarray, hull: np.ndarray) -> Carving:
    """Give every point to one triangle of a triangulation of its convex hull, chosen for low entropy.

    A root triangle between three hull vertices leaves three caps; each cap, cut off by a chord, is split by an apex
    among its hull vertices into a triangle and two smaller caps. Apexes are chosen on a sample so that few, large
    triangles take most points; membership is decided by the exact predicate, points on a chord stay on the inner
    side. Each step either captures a fair share of its points (on the sample) or halves the cap's hull vertices.

    Args:
        points: ``(n, 2)`` finite float64, not all collinear.
        scaled: ``(n, 2)`` the same up to scale, within [-1, 1]; used to choose, never to decide.
        hull: ``(h,)`` strict hull vertices, counter-clockwise.
    """
    owner = np.full(len(points), -1, dtype=np.int64)
    corners = np.empty((len(hull), 3), dtype=np.int64)
    root = _choose_root(scaled, hull)
    count = _carve(points, scaled, hull, root, owner, corners)
    return Carving(owner, corners[:count].copy())


def _choose_root(scaled: np.ndarray, hull: np.ndarray) -> np.ndarray:
    angles = np.arange(_ROOT_DIRECTIONS) * (2.0 * np.pi / _ROOT_DIRECTIONS)
    extremes = np.argmax(scaled[hull] @ np.stack([np.cos(angles), np.sin(angles)]), axis=0)
    candidates = np.unique(np.concatenate([extremes, np.arange(min(3, len(hull)))]))
    stride = max(1, len(scaled) // _ROOT_SAMPLE)
    return _best_root(scaled, hull, candidates, np.ascontiguousarray(scaled[::stride]))


@part
def _cross(scaled, a, b, x, y):
    return (scaled[b, 0] - scaled[a, 0]) * (y - scaled[a, 1]) - (scaled[b, 1] - scaled[a, 1]) * (x - scaled[a, 0])


@part
def _mass(count):
    return count * np.log(count) if count > 0 else 0.0


@kernel
def _best_root(scaled, hull, candidates, sample):
    best = np.empty(3, dtype=np.int64)
    best_score = -np.inf
    for first in range(len(candidates)):
        for second in range(first + 1, len(candidates)):
            for third in range(second + 1, len(candidates)):
                a, b, c = candidates[first], candidates[second], candidates[third]
                inside = cap_ab = cap_bc = cap_ca = np.int64(0)
                for s in range(len(sample)):
                    x, y = sample[s, 0], sample[s, 1]
                    if _cross(scaled, hull[a], hull[b], x, y) < 0:
                        cap_ab += 1
                    elif _cross(scaled, hull[b], hull[c], x, y) < 0:
                        cap_bc += 1
                    elif _cross(scaled, hull[c], hull[a], x, y) < 0:
                        cap_ca += 1
                    else:
                        inside += 1
                caps = cap_ab + cap_bc + cap_ca
                score = _mass(inside) + _mass(cap_ab) + _mass(cap_bc) + _mass(cap_ca) - _CAP_PENALTY * caps
                if score > best_score:
                    best_score = score
                    best[0], best[1], best[2] = a, b, c
    return best


@part
def _farthest(scaled, hull, i, j):
    """Position between i and j of the hull vertex farthest beyond the chord; distance is unimodal along a hull."""
    h = len(hull)
    a, b = hull[i % h], hull[j % h]
    low, high = i + 1, j - 1
    while low < high:
        middle = (low + high) // 2
        here, after = hull[middle % h], hull[(middle + 1) % h]
        if _cross(scaled, a, b, scaled[after, 0], scaled[after, 1]) < _cross(
            scaled, a, b, scaled[here, 0], scaled[here, 1]
        ):
            low = middle + 1
        else:
            high = middle
    return low


@part
def _choose_apex(scaled, hull, i, j, order, start, stop):
    h = len(hull)
    between = j - i - 1
    candidates = min(between, _NODE_CANDIDATES)
    stride = max(1, (stop - start) // _NODE_SAMPLE)
    best, best_score, best_inside, best_seen = (i + j) // 2, -np.inf, 0, 1
    for candidate in range(candidates + 1):
        if candidate == candidates:
            k = _farthest(scaled, hull, i, j)
        else:
            k = i + 1 + (between * (2 * candidate + 1)) // (2 * candidates)
        inside = left = right = np.int64(0)
        for s in range(start, stop, stride):
            x, y = scaled[order[s], 0], scaled[order[s], 1]
            if _cross(scaled, hull[i % h], hull[k % h], x, y) < 0:
                left += 1
            elif _cross(scaled, hull[k % h], hull[j % h], x, y) < 0:
                right += 1
            else:
                inside += 1
        score = _mass(inside) + _mass(left) + _mass(right) - _CAP_PENALTY * (left + right)
        if score > best_score:
            best, best_score, best_inside, best_seen = k, score, inside, inside + left + right
    return best if best_inside >= _WORTHWHILE * best_seen else (i + j) // 2


@part
def _beyond(points, a, b, p):
    """Whether point p lies strictly beyond the chord from a to b, on the side away from the hull's inside."""
    ax, ay, bx, by, px, py = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[p, 0], points[p, 1]
    # Copies of the chord's ends are common, and would take the predicate's slow path.
    if (px == ax and py == ay) or (px == bx and py == by):
        return False
    return orient2d(ax, ay, bx, by, px, py) < 0


@part
def _split(points, order, start, stop, a, b, c):
    """Reorder so that points beyond a-b come first, then those beyond b-c; return where the two groups end."""
    first_end = start
    for s in range(start, stop):
        p = order[s]
        if _beyond(points, a, b, p):
            order[s] = order[first_end]
            order[first_end] = p
            first_end += 1
    second_end = first_end
    for s in range(first_end, stop):
        p = order[s]
        if _beyond(points, b, c, p):
            order[s] = order[second_end]
            order[second_end] = p
            second_end += 1
    return first_end, second_end


@part
def _push(stack, pending, start, stop, i, j):
    stack[pending, 0] = start
    stack[pending, 1] = stop
    stack[pending, 2] = i
    stack[pending, 3] = j
    return pending + 1


@kernel
def _carve(points, scaled, hull, root, owner, corners):
    h = len(hull)
    order = np.arange(len(points))
    # Pending caps: range of points in order, and the chord's two hull positions (the second may exceed h).
    stack = np.empty((h + 4, 4), dtype=np.int64)
    a, b, c = hull[root[0]], hull[root[1]], hull[root[2]]
    first_end, second_end = _split(points, order, np.int64(0), len(points), a, b, c)
    third_end = second_end
    for s in range(second_end, len(points)):
        p = order[s]
        if _beyond(points, c, a, p):
            order[s] = order[third_end]
            order[third_end] = p
            third_end += 1
    corners[0, 0], corners[0, 1], corners[0, 2] = a, b, c
    for s in range(third_end, len(points)):
        owner[order[s]] = 0
    count = 1
    pending = _push(stack, np.int64(0), np.int64(0), first_end, root[0], root[1])
    pending = _push(stack, pending, first_end, second_end, root[1], root[2])
    pending = _push(stack, pending, second_end, third_end, root[2], root[0] + h)
    while pending > 0:
        pending -= 1
        start, stop, i, j = stack[pending, 0], stack[pending, 1], stack[pending, 2], stack[pending, 3]
        # A cap that holds nothing but hull vertices would give one triangle to each of them.
        if stop - start == j - i - 1:
            continue
        k = _choose_apex(scaled, hull, i, j, order, start, stop)
        a, b, c = hull[i % h], hull[k % h], hull[j % h]
        first_end, second_end = _split(points, order, start, stop, a, b, c)
        corners[count, 0], corners[count, 1], corners[count, 2] = a, b, c
        for s in range(second_end, stop):
            owner[order[s]] = count
        count += 1
        pending = _push(stack, pending, start, first_end, i, k)
        pending = _push(stack, pending, first_end, second_end, k, j)
    return count


@kernel
def collinear_span(points):
    """Indices of the lexicographically least and greatest point, and whether all points are collinear."""
    low, high = 0, 0
    for p in range(1, len(points)):
        x, y = points[p, 0], points[p, 1]
        if x < points[low, 0] or (x == points[low, 0] and y < points[low, 1]):
            low = p
        if x > points[high, 0] or (x == points[high, 0] and y > points[high, 1]):
            high = p
    ax, ay, bx, by = points[low, 0], points[low, 1], points[high, 0], points[high, 1]
    for p in range(len(points)):
        if orient2d(ax, ay, bx, by, points[p, 0], points[p, 1]) != 0:
            return low, high, False
    return low, high, True


@kernel
def at_hull_vertex(points, owner, corners):
    """Which points lie at a hull vertex. A hull vertex inside a triangle of the hull can only be its corner."""
    result = np.empty(len(points), dtype=np.bool_)
    for p in range(len(points)):
        result[p] = owner[p] < 0
        if owner[p] >= 0:
            for corner in range(3):
                q = corners[owner[p], corner]
                if points[p, 0] == points[q, 0] and points[p, 1] == points[q, 1]:
                    result[p] = True
    return result


@part
def in_triangle(points, a, b, c, p):
    """Whether point p lies in the closed triangle of points a, b, c, which may be a segment or a point. Exact."""
    ax, ay, bx, by = points[a, 0], points[a, 1], points[b, 0], points[b, 1]
    cx, cy, px, py = points[c, 0], points[c, 1], points[p, 0], points[p, 1]
    turn = orient2d(ax, ay, bx, by, cx, cy)
    if turn != 0:
        return (
            turn * orient2d(ax, ay, bx, by, px, py) >= 0
            and turn * orient2d(bx, by, cx, cy, px, py) >= 0
            and turn * orient2d(cx, cy, ax, ay, px, py) >= 0
        )
    # Collinear corners: p must lie on their line and, as the line is monotone in x and in y, in their bounding box.
    return (
        min(ax, bx, cx) <= px <= max(ax, bx, cx)
        and min(ay, by, cy) <= py <= max(ay, by, cy)
        and orient2d(ax, ay, bx, by, px, py) == 0
        and orient2d(bx, by, cx, cy, px, py) == 0
        and orient2d(cx, cy, ax, ay, px, py) == 0
    )


@kernel
def first_outside(points, labels, corners):
    """First point whose part has corners (not -1) but does not hold it, or -1."""
    for p in range(len(points)):
        part = labels[p]
        if corners[part, 0] >= 0 and not in_triangle(points, corners[part, 0], corners[part, 1], corners[part, 2], p):
            return p
    return -1


@part
def _weight(size):
    """size log(size) of a triangle part; points of parts below three are regrouped by threes."""
    return size * np.log(max(size, 3))


@kernel
def _accept_runs(pool, starts, owner, sizes, greedy, run_of):
    """Turn runs of the pool into parts where that lowers the entropy (or, not greedy, all from four points on).

    The entropy is log n - (1/n) sum of size log size, so a run pays when its own term exceeds what the triangles
    lose. ``sizes`` is updated to what remains of each triangle; ``run_of`` gets the run's number or -1.
    """
    accepted = 0
    for r in range(len(starts) - 1):
        length = starts[r + 1] - starts[r]
        if length < 4:
            continue
        loss = 0.0
        for s in range(starts[r], starts[r + 1]):
            part = owner[pool[s]]
            if part >= 0:
                loss += _weight(sizes[part]) - _weight(sizes[part] - 1)
                sizes[part] -= 1
            else:
                loss += np.log(3.0)
        if not greedy or length * np.log(length) > loss:
            for s in range(starts[r], starts[r + 1]):
                run_of[pool[s]] = accepted
            accepted += 1
        else:
            for s in range(starts[r], starts[r + 1]):
                if owner[pool[s]] >= 0:
                    sizes[owner[pool[s]]] += 1
    return accepted


def choose_runs(
    x: np.ndarray, owner: np.ndarray, triangles: int, vertex: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Choose which points leave their triangle for a sorted run, for the lowest entropy among several pools.

    A pool holds all hull vertices and the points of all triangles up to some size; its runs, in list order, are
    candidates. Points outside the pool are the ones that a run may skip.

    Returns:
        For each point its run or -1, what remains of each triangle's size, and the number of runs.
    """
    sizes = np.bincount(owner[owner >= 0], minlength=triangles)
    size_of_point = np.where(owner >= 0, sizes[owner], 1)
    limits = [2]
    while limits[-1] < sizes.max():
        limits.append(limits[-1] * 8)
    best_mass, best = -1.0, (np.empty(0, np.int64), sizes, 0)
    for limit in limits:
        pool = np.flatnonzero(vertex | (size_of_point <= limit))
        starts = np.empty(len(pool) + 1, dtype=np.int64)
        count = greedy_run_starts(x[pool], starts)
        starts[count] = len(pool)
        for greedy in (True, False):
            run_of = np.full(len(x), -1, dtype=np.int64)
            remaining = sizes.copy()
            runs = _accept_runs(pool, starts[: count + 1], owner, remaining, greedy, run_of)
            run_sizes = np.bincount(run_of[run_of >= 0], minlength=runs)
            kept = remaining[remaining >= 3]
            triples, rest = divmod(len(x) - int(run_sizes.sum()) - int(kept.sum()), 3)
            parts = np.concatenate([run_sizes, kept, [3] * (triples > 0), [rest] * (rest > 0)]).astype(np.float64)
            times = np.ones(len(parts))
            if triples > 0:
                times[len(run_sizes) + len(kept)] = triples
            mass = float((times * parts * np.log(parts)).sum())
            if mass > best_mass:
                best_mass, best = mass, (run_of, remaining, runs)
    return best
