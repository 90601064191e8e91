"""Exact range-partition entropy of small point lists, in rational arithmetic, straight from the definition.

Nothing here is shared with the package: own convex hull, own containment tests, all set partitions, and an exact
decision whether some triangle inside the hull encloses a given set (nested polygons).
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np

from entreg.entropy import HullPartition, PartKind

Point = tuple[Fraction, Fraction]


def rational(points: np.ndarray) -> list[Point]:
    return [(Fraction(float(x)), Fraction(float(y))) for x, y in points]


def turn(a: Point, b: Point, c: Point) -> Fraction:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def strict_hull(points: Sequence[Point]) -> list[Point]:
    """Extreme points, counter-clockwise (two for a segment, one for a point)."""
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
    chains = []
    for sequence in (ordered, ordered[::-1]):
        chain: list[Point] = []
        for point in sequence:
            while len(chain) > 1 and turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        chains.append(chain[:-1])
    return chains[0] + chains[1]


def in_closed_triangle(corners: Sequence[Point], point: Point) -> bool:
    hull = strict_hull(corners)
    if len(hull) == 1:
        return point == hull[0]
    if len(hull) == 2:
        low, high = hull
        return turn(low, high, point) == 0 and low <= point <= high
    return all(turn(hull[i], hull[(i + 1) % 3], point) >= 0 for i in range(3))


class NestedTriangle:
    """Decides whether a triangle lies inside a convex polygon and around a set of points.

    Corners can be moved to the polygon's boundary. From a corner s, the farthest next corner g(s) counter-clockwise is
    where the tangent that keeps the set on its left leaves the polygon, so a triangle with corner s exists exactly if
    three such steps lead once around. Positions on the boundary are edge + share; between finitely many rational
    breakpoints three steps are one fractional linear map of the share, and the question is the sign of a quadratic.
    """

    def __init__(self, outer: Sequence[Point], inner: Sequence[Point]):
        self.outer, self.inner, self.edges = outer, inner, len(outer)

    def exists(self) -> bool:
        m = self.edges
        lines = [(self.inner[i], self.inner[i - 1]) for i in range(len(self.inner))]
        breaks = {Fraction(i) for i in range(m)}
        breaks |= {self._exit(a, b) for a, b in lines} | {self._exit(b, a) for a, b in lines}
        level = breaks
        for _ in range(3):
            level = {self._step(s, -1) for s in level}
            breaks = breaks | level
        if any(self._around(s) >= m for s in breaks):
            return True
        ordered = sorted(breaks)
        return any(
            self._exists_between(low, high) for low, high in zip(ordered, [*ordered[1:], ordered[0] + m], strict=True)
        )

    def _exists_between(self, low: Fraction, high: Fraction) -> bool:
        m = self.edges
        samples = []
        for share in (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)):
            s = low + share * (high - low)
            lead = self._around(s) - m
            if lead >= 0:
                return True
            edge = math.floor(s)
            if s + lead < edge:
                return False
            samples.append((s - edge, s + lead - edge))
        u0, u1 = low - math.floor(low), high - math.floor(low)
        if samples[0][1] == samples[1][1] == samples[2][1]:
            return samples[0][1] > u0
        a, b, c, d = _null_vector([[u, Fraction(1), -u * v, -v] for u, v in samples])
        sign = 1 if c * samples[0][0] + d > 0 else -1

        def lead_at(u: Fraction) -> Fraction:
            return sign * (a * u + b - u * (c * u + d))

        if lead_at(u0) > 0 or lead_at(u1) > 0:
            return True
        top = (a - d) / (2 * c) if sign * c > 0 else u0
        return u0 < top < u1 and lead_at(top) >= 0

    def _around(self, s: Fraction) -> Fraction:
        total = Fraction(0)
        for _ in range(3):
            after = self._step((s + total) % self.edges, 1)
            total += (after - s - total) % self.edges
        return total

    def _at(self, s: Fraction) -> Point:
        edge = math.floor(s)
        a, b, u = self.outer[edge], self.outer[(edge + 1) % self.edges], s - edge
        return (a[0] + u * (b[0] - a[0]), a[1] + u * (b[1] - a[1]))

    def _step(self, s: Fraction, direction: int) -> Fraction:
        start = self._at(s)
        for p in self.inner:
            if p != start and all(direction * turn(start, p, q) >= 0 for q in self.inner):
                return self._exit(start, p)
        raise AssertionError("a boundary point has a tangent")

    def _exit(self, start: Point, through: Point) -> Fraction:
        dx, dy = through[0] - start[0], through[1] - start[1]
        best: tuple[Fraction, int] | None = None
        for i in range(self.edges):
            a, b = self.outer[i], self.outer[(i + 1) % self.edges]
            approach = -((b[0] - a[0]) * dy - (b[1] - a[1]) * dx)
            if approach > 0:
                t = turn(a, b, start) / approach
                if best is None or t < best[0]:
                    best = (t, i)
        assert best is not None
        t, i = best
        a, b = self.outer[i], self.outer[(i + 1) % self.edges]
        axis = 0 if a[0] != b[0] else 1
        share = ((start[axis] + t * (dx, dy)[axis]) - a[axis]) / (b[axis] - a[axis])
        return (i + share) % self.edges


def _null_vector(rows: list[list[Fraction]]) -> list[Fraction]:
    """The one-dimensional null space of three independent equations in four unknowns."""
    rows, pivots = [row[:] for row in rows], []
    for column in range(4):
        r = len(pivots)
        pivot = next((i for i in range(r, 3) if rows[i][column] != 0), None)
        if pivot is None:
            continue
        rows[r], rows[pivot] = rows[pivot], rows[r]
        rows[r] = [value / rows[r][column] for value in rows[r]]
        for i in range(3):
            if i != r:
                factor = rows[i][column]
                rows[i] = [value - factor * own for value, own in zip(rows[i], rows[r], strict=True)]
        pivots.append(column)
        if len(pivots) == 3:
            break
    free = next(column for column in range(4) if column not in pivots)
    solution = [Fraction(0)] * 4
    solution[free] = Fraction(1)
    for r, column in enumerate(pivots):
        solution[column] = -rows[r][free]
    return solution


def enclosable(hull: Sequence[Point], members: Sequence[Point]) -> bool:
    """Whether a closed, possibly degenerate triangle inside the closed polygon holds all members."""
    inner = strict_hull(members)
    if len(inner) <= 3:
        return True
    if len(set(inner) & set(hull)) > 3:
        return False
    return NestedTriangle(hull, inner).exists()


def monotone(values: Sequence[Fraction]) -> bool:
    pairs = list(pairwise(values))
    return all(a <= b for a, b in pairs) or all(a >= b for a, b in pairs)


def set_partitions(n: int) -> Iterator[list[list[int]]]:
    def extend(i: int, blocks: list[list[int]]) -> Iterator[list[list[int]]]:
        if i == n:
            yield blocks
            return
        for block in blocks:
            block.append(i)
            yield from extend(i + 1, blocks)
            block.pop()
        blocks.append([i])
        yield from extend(i + 1, blocks)
        blocks.pop()

    yield from extend(0, [])


def exact_hull_entropy(points: np.ndarray) -> float:
    """Minimum entropy over all respectful partitions; practical up to 8 points."""
    exact = rational(points)
    n, hull = len(exact), strict_hull(exact)
    vertex = [point in hull for point in exact]

    @cache
    def in_triangle(block: tuple[int, ...]) -> bool:
        return enclosable(hull, [exact[i] for i in block])

    best = math.inf
    for blocks in set_partitions(n):
        entropy = sum(len(block) / n * math.log(n / len(block)) for block in blocks)
        if entropy >= best:
            continue
        # A part that can be a triangle gains nothing from being a run, and only runs are hard to skip.
        runs = [block for block in blocks if not in_triangle(tuple(block))]
        in_run = {i for block in runs for i in block}
        if all(
            monotone([exact[i][0] for i in block])
            and not any(vertex[i] or i in in_run for i in set(range(block[0], block[-1])) - set(block))
            for block in runs
        ):
            best = entropy
    return best


def assert_respectful(points: np.ndarray, partition: HullPartition) -> None:
    """The definition, checked part by part in rational arithmetic."""
    exact = rational(points)
    hull = set(strict_hull(exact))
    assert sorted(set(partition.labels.tolist())) == list(range(len(partition.kinds)))
    in_run = partition.kinds[partition.labels] == PartKind.RUN
    for part, kind in enumerate(partition.kinds):
        members = np.flatnonzero(partition.labels == part)
        if kind == PartKind.RUN:
            assert monotone([exact[i][0] for i in members])
            assert partition.spans[part].tolist() == [members[0], members[-1] + 1]
            skipped = set(range(members[0], members[-1])) - set(members.tolist())
            assert not any(in_run[i] or exact[i] in hull for i in skipped)
        else:
            corners = [exact[i] for i in partition.corners[part]]
            assert all(in_closed_triangle(corners, exact[i]) for i in members)
            assert kind == PartKind.TRIANGLE or len(members) == 1
