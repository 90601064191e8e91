"""Divide and conquer on linked edges: triangulations of neighbouring cells are merged into one.

The merge is that of Guibas and Stolfi, "Primitives for the manipulation of general subdivisions and the computation of
Voronoi diagrams" (1985): find the lower common tangent, then raise it, deleting the edges that the rising bubble
invalidates. The cells are those of a binary trie over Morton keys, cut in turn along x and along y as Dwyer (1987)
proposed for medians, so that the seams are short.

An edge is a pair of directed edges e and e ^ 1. Directed edge e owns four words of the flat uint32 array ``links``:
its destination, the next and the previous edge around its origin (counter-clockwise), and a word for the
triangle on its left, NONE in a free slot. Unsigned words spare the negative-index check on every access.

A triangulation in the making is known by two handles: directed edges with the outside on their left, outermost on its
last seam (both -1 - p for the lone point p). Having two keeps the way to any hull vertex short where most points lie
on the hull. ``pool`` holds the first free edge and the first slot never used.
"""

import numpy as np

from entreg.geometry.delaunay_predicates import (
    ANGLE_BOUND,
    CROSS_BOUND,
    MARGIN,
    angle_parts,
    is_above,
    is_inside,
    is_left_turn,
)
from entreg.kernels import kernel, part

NONE = 0xFFFFFFFF
# Positions of the words of a directed edge.
WORDS = 4
NEXT = 1
PREVIOUS = 2
FACE = 3
# A planar graph on m points has fewer than 3 m edges.
WORDS_PER_POINT = 3 * 2 * WORDS
TOP_LEVEL = 32767
# No literals: Numba compiles a function anew for every literal among its arguments.
_TO_LAST = np.bool_(True)
_TO_FIRST = np.bool_(False)
# More than 32 per factor of about 2**16 between the largest and the smallest distance of two float64 numbers.
MOST_LEVELS = 8192


@kernel
def merge(scaled, exact, links, blocks, levels, start, stop):
    """Triangulate the points ``start .. stop - 1``, which lie in the order of their trie, or merge blocks of them.

    One kernel does both, because compiling the merge takes longer than anything else.

    Args:
        scaled, exact: Flat coordinates, see :mod:`entreg.geometry.delaunay_predicates`.
        links: Edge records, changed; only the slots of these points are touched.
        blocks: ``(0, 3)`` int64 to triangulate points; or what this function returned for consecutive blocks of
            points, one row each. Then ``start .. stop - 1`` are all rows.
        levels: int16; ``levels[i]`` is the level of the trie at which points (or blocks) i and i + 1 part, see
            :mod:`entreg.geometry.delaunay_order`.

    Returns:
        The two handles of the triangulation, and the first of the free slots, which are linked and marked as free.
    """
    points = blocks.shape[0] == 0
    pool = np.empty(2, np.int64)
    pool[0] = NONE
    pool[1] = 6 * start
    for k in range(blocks.shape[0]):
        edge = blocks[k, 2]
        while edge != NONE:
            following = np.int64(links[WORDS * edge + NEXT])
            _free_edge(links, pool, edge)
            edge = following
    # Handles and seams. From bottom to top of the stack the levels fall.
    stack = np.empty((min(stop - start, MOST_LEVELS), 3), np.int64)
    depth = 0
    for i in range(start, stop):
        lower = upper = np.int64(-1 - i)
        if not points:
            lower = blocks[i, 0]
            upper = blocks[i, 1]
        level = np.int64(levels[i]) if i + 1 < stop else np.int64(TOP_LEVEL)
        while depth > 0 and stack[depth - 1, 2] <= level:
            depth -= 1
            lower, upper = _merge(
                scaled, exact, links, pool, stack[depth, 0], stack[depth, 1], lower, upper, stack[depth, 2]
            )
        stack[depth, 0] = lower
        stack[depth, 1] = upper
        stack[depth, 2] = level
        depth += 1
    if points:
        for edge in range(pool[1], 6 * stop, 2):
            _free_edge(links, pool, edge)
    return stack[0, 0], stack[0, 1], pool[0]


@part
def _merge(scaled, exact, links, pool, below, below_upper, above, above_upper, level):
    """Merge two triangulations that a line separates, the first left of it (level even) or below it (odd).

    Returns:
        The two handles of the result: its outermost edges across the line.
    """
    if below < 0 and above < 0:
        edge = _take_edge(links, pool)
        twin = edge ^ 1
        links[WORDS * edge] = -1 - below
        links[WORDS * edge + NEXT] = edge
        links[WORDS * edge + PREVIOUS] = edge
        links[WORDS * twin] = -1 - above
        links[WORDS * twin + NEXT] = twin
        links[WORDS * twin + PREVIOUS] = twin
        return edge, twin
    left_edge, left, right_edge, right = _lower_tangent(
        scaled, exact, links, below, below_upper, above, above_upper, level & 1
    )
    # The base runs from right to left, with the finished part on its left; ``twin`` is its reverse.
    base = _take_edge(links, pool)
    twin = base ^ 1
    links[WORDS * base] = left
    links[WORDS * twin] = right
    if above < 0:
        links[WORDS * base + NEXT] = base
        links[WORDS * base + PREVIOUS] = base
    else:
        _insert_before(links, base, right_edge)
    if below < 0:
        links[WORDS * twin + NEXT] = twin
        links[WORDS * twin + PREVIOUS] = twin
    else:
        _insert_after(links, twin, left_edge)
    lower = base
    left_x, left_y = scaled[2 * left], scaled[2 * left + 1]
    right_x, right_y = scaled[2 * right], scaled[2 * right + 1]
    while True:
        left_edge = np.int64(links[WORDS * twin + NEXT])
        left_tip = np.int64(links[WORDS * left_edge])
        left_found = False
        left_dot = left_cross = left_span = 0.0
        if left_tip != right:
            left_dot, left_cross, left_span = angle_parts(scaled, left_x, left_y, right_x, right_y, left_tip)
            bound = CROSS_BOUND * left_span + MARGIN
            left_found = left_cross > bound or (left_cross >= -bound and is_above(exact, left, right, left_tip))
        while left_found:
            following = np.int64(links[WORDS * left_edge + NEXT])
            tip = np.int64(links[WORDS * following])
            if tip == right:
                break
            dot, cross, span = angle_parts(scaled, left_x, left_y, right_x, right_y, tip)
            bound = CROSS_BOUND * span + MARGIN
            if cross < -bound:
                break
            excess = dot * left_cross - left_dot * cross
            doubt = ANGLE_BOUND * (span * left_span) + MARGIN
            if excess > doubt:
                break
            if cross <= bound and not is_above(exact, left, right, tip):
                break
            if excess >= -doubt and not is_inside(exact, left, right, left_tip, tip):
                break
            _unlink(links, left_edge)
            _free_edge(links, pool, left_edge & ~1)
            left_edge, left_tip, left_dot, left_cross, left_span = following, tip, dot, cross, span
        right_edge = np.int64(links[WORDS * base + PREVIOUS])
        right_tip = np.int64(links[WORDS * right_edge])
        right_found = False
        right_dot = right_cross = right_span = 0.0
        if right_tip != left:
            right_dot, right_cross, right_span = angle_parts(scaled, left_x, left_y, right_x, right_y, right_tip)
            bound = CROSS_BOUND * right_span + MARGIN
            right_found = right_cross > bound or (right_cross >= -bound and is_above(exact, left, right, right_tip))
        while right_found:
            following = np.int64(links[WORDS * right_edge + PREVIOUS])
            tip = np.int64(links[WORDS * following])
            if tip == left:
                break
            dot, cross, span = angle_parts(scaled, left_x, left_y, right_x, right_y, tip)
            bound = CROSS_BOUND * span + MARGIN
            if cross < -bound:
                break
            excess = dot * right_cross - right_dot * cross
            doubt = ANGLE_BOUND * (span * right_span) + MARGIN
            if excess > doubt:
                break
            if cross <= bound and not is_above(exact, left, right, tip):
                break
            if excess >= -doubt and not is_inside(exact, left, right, right_tip, tip):
                break
            _unlink(links, right_edge)
            _free_edge(links, pool, right_edge & ~1)
            right_edge, right_tip, right_dot, right_cross, right_span = following, tip, dot, cross, span
        if left_found and right_found:
            excess = right_dot * left_cross - left_dot * right_cross
            doubt = ANGLE_BOUND * (right_span * left_span) + MARGIN
            left_found = excess > doubt or (excess >= -doubt and not is_inside(exact, left, right, left_tip, right_tip))
        elif not (left_found or right_found):
            return lower, twin
        edge = _take_edge(links, pool)
        reverse = edge ^ 1
        # Selections instead of a branch: which side advances is as good as random.
        before_place = base if left_found else right_edge ^ 1
        after_place = left_edge ^ 1 if left_found else twin
        left = left_tip if left_found else left
        right = right if left_found else right_tip
        links[WORDS * edge] = left
        links[WORDS * reverse] = right
        _insert_before(links, edge, before_place)
        _insert_after(links, reverse, after_place)
        left_x, left_y = scaled[2 * left], scaled[2 * left + 1]
        right_x, right_y = scaled[2 * right], scaled[2 * right + 1]
        base = edge
        twin = reverse


@part
def _lower_tangent(scaled, exact, links, below, below_upper, above, above_upper, axis):
    """Where the first edge between two triangulations goes.

    Returns:
        ``(left_edge, left, right_edge, right)``: the two vertices, and at each the hull edge beside which the new edge
        belongs (meaningless for a lone point).
    """
    left_edge = right_edge = np.int64(0)
    if below < 0:
        left = -1 - below
    else:
        left_edge = _climb(exact, links, below, below_upper, axis, _TO_LAST)
        left = np.int64(links[WORDS * (left_edge ^ 1)])
    if above < 0:
        right = -1 - above
    else:
        right_edge = np.int64(links[WORDS * _climb(exact, links, above, above_upper, axis, _TO_FIRST) + NEXT])
        right = np.int64(links[WORDS * (right_edge ^ 1)])
    moved = True
    while moved:
        moved = False
        while below >= 0:
            following = np.int64(links[WORDS * left_edge])
            if not is_left_turn(scaled, exact, right, left, following):
                break
            left_edge = np.int64(links[WORDS * (left_edge ^ 1) + PREVIOUS])
            left = following
        while above >= 0:
            following = np.int64(links[WORDS * right_edge])
            if not is_left_turn(scaled, exact, left, following, right):
                break
            right_edge = np.int64(links[WORDS * (right_edge ^ 1) + NEXT])
            right = following
            moved = True
    return left_edge, left, right_edge, right


@part
def _climb(exact, links, lower, upper, axis, to_last):
    """The hull edge, outside on its left, whose origin is the last (or first) vertex along an axis."""
    edge = lower
    origin = np.int64(links[WORDS * (edge ^ 1)])
    other = np.int64(links[WORDS * (upper ^ 1)])
    if _precedes(exact, axis, origin, other) == to_last:
        edge = upper
        origin = other
    tip = np.int64(links[WORDS * edge])
    if _precedes(exact, axis, origin, tip) == to_last:
        # The hull is convex: along it the rank rises to the extreme and falls behind it.
        while True:
            edge = np.int64(links[WORDS * (edge ^ 1) + PREVIOUS])
            origin = tip
            tip = np.int64(links[WORDS * edge])
            if _precedes(exact, axis, origin, tip) != to_last:
                return edge
    while True:
        backward = np.int64(links[WORDS * edge + NEXT])
        tip = np.int64(links[WORDS * backward])
        if _precedes(exact, axis, origin, tip) != to_last:
            return edge
        edge = backward ^ 1
        origin = tip


@part
def _precedes(exact, axis, a, b):
    """Order along x, ties by y (axis 0), or the same after a quarter turn: along y, ties by falling x (axis 1)."""
    ax, ay = exact[2 * a], exact[2 * a + 1]
    bx, by = exact[2 * b], exact[2 * b + 1]
    if axis == 0:
        return ax < bx or (ax == bx and ay < by)
    return ay < by or (ay == by and ax > bx)


@part
def _take_edge(links, pool):
    edge = pool[0]
    if edge == NONE:
        edge = pool[1]
        pool[1] = edge + 2
    else:
        pool[0] = links[WORDS * edge + NEXT]
    links[WORDS * edge + FACE] = 0
    links[WORDS * (edge ^ 1) + FACE] = 0
    return edge


@part
def _free_edge(links, pool, edge):
    links[WORDS * edge + FACE] = NONE
    links[WORDS * (edge ^ 1) + FACE] = NONE
    links[WORDS * edge + NEXT] = pool[0]
    pool[0] = edge


@part
def _insert_before(links, edge, place):
    """Put ``edge`` just clockwise of ``place`` around their origin."""
    previous = np.int64(links[WORDS * place + PREVIOUS])
    links[WORDS * edge + NEXT] = place
    links[WORDS * edge + PREVIOUS] = previous
    links[WORDS * place + PREVIOUS] = edge
    links[WORDS * previous + NEXT] = edge


@part
def _insert_after(links, edge, place):
    """Put ``edge`` just counter-clockwise of ``place`` around their origin."""
    following = np.int64(links[WORDS * place + NEXT])
    links[WORDS * edge + PREVIOUS] = place
    links[WORDS * edge + NEXT] = following
    links[WORDS * place + NEXT] = edge
    links[WORDS * following + PREVIOUS] = edge


@part
def _unlink(links, edge):
    """Take an edge out of the rings around both of its ends."""
    for side in range(2):
        end = edge ^ side
        following = np.int64(links[WORDS * end + NEXT])
        previous = np.int64(links[WORDS * end + PREVIOUS])
        links[WORDS * previous + NEXT] = following
        links[WORDS * following + PREVIOUS] = previous
