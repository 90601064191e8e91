"""From linked edges to triangles, their neighbours and the convex hull.

The last word of a directed edge is 0 while the triangle on its left has no number, NONE when there is no such triangle
(outside, or a free slot), and else 1 + 3 t + k for the triangle t opposite whose vertex k the edge lies.
"""

import numpy as np

from entreg.geometry.delaunay_merge import FACE, NONE, PREVIOUS, WORDS
from entreg.kernels import kernel


@kernel
def mark_outside(links, handle):
    """Mark the edges that have the outside on their left and return their number."""
    edge = handle
    count = 0
    while True:
        links[WORDS * edge + FACE] = NONE
        count += 1
        edge = np.int64(links[WORDS * (edge ^ 1) + PREVIOUS])
        if edge == handle:
            return count


@kernel
def write_hull(links, original, handle, hull):
    """Write the edges of the convex hull, counter-clockwise, to all rows of the ``(edges, 2)`` int32 ``hull``."""
    edge = handle
    for k in range(hull.shape[0] - 1, -1, -1):
        # Along the edges with the outside on their left the hull runs clockwise.
        hull[k, 0] = original[links[WORDS * edge]]
        hull[k, 1] = original[links[WORDS * (edge ^ 1)]]
        edge = np.int64(links[WORDS * (edge ^ 1) + PREVIOUS])


@kernel
def number_triangles(links, original, simplices, start, stop, first, step):
    """Number the triangles of the edges ``start .. stop - 1`` and write their vertices.

    A triangle that has edges both inside and outside of this range belongs to the range of its lowest edge, so that
    several ranges can be worked on at once.

    Args:
        links: Edge records; the last word is changed.
        original: int32, index among the given points of each point of the triangulation.
        simplices: Out: ``(triangles, 3)`` int32.
        first, step: Number of the first triangle found, and 1 to count up along the edges or -1 to count down from
            the last edge.
    """
    triangle = first
    for k in range(stop - start):
        edge = start + k if step > 0 else stop - 1 - k
        if links[WORDS * edge + FACE] == 0:
            second = np.int64(links[WORDS * (edge ^ 1) + PREVIOUS])
            third = np.int64(links[WORDS * (second ^ 1) + PREVIOUS])
            lowest = min(second, third)
            if lowest < start or (lowest < edge and max(second, third) >= stop):
                continue
            links[WORDS * edge + FACE] = 3 * triangle + 3
            links[WORDS * second + FACE] = 3 * triangle + 1
            links[WORDS * third + FACE] = 3 * triangle + 2
            simplices[triangle, 0] = original[links[WORDS * third]]
            simplices[triangle, 1] = original[links[WORDS * edge]]
            simplices[triangle, 2] = original[links[WORDS * second]]
            triangle += step


@kernel
def write_neighbors(links, neighbors, start, stop):
    """Write the neighbours that meet in the edge pairs ``start .. stop - 1`` into the flat int32 ``neighbors``."""
    for pair in range(start, stop):
        a = np.int64(links[2 * WORDS * pair + FACE])
        b = np.int64(links[2 * WORDS * pair + WORDS + FACE])
        if a != NONE:
            neighbors[a - 1] = (b - 1) // 3 if b != NONE else -1
        if b != NONE:
            neighbors[b - 1] = (a - 1) // 3 if a != NONE else -1


@kernel
def write_faces(links, original, handle, simplices, neighbors, hull):
    """Write triangles, neighbours and hull after :func:`mark_outside`, all in one call."""
    zero = np.int64(0)
    count = np.int64(original.shape[0])
    number_triangles(links, original, simplices, zero, 6 * count, zero, np.int64(1))
    write_neighbors(links, neighbors, zero, 3 * count)
    write_hull(links, original, handle, hull)
