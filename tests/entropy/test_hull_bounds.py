import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.entropy import EntropyBounds, PartKind, check_partition, hull_entropy, partition_entropy
from entreg.entropy import _hull_lower_bound as lower
from entreg.entropy._hull_carving import collinear_span
from entreg.errors import InputError
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.generators import generate
from tests.entropy.hull_oracle import (
    NestedTriangle,
    assert_respectful,
    exact_hull_entropy,
    rational,
    strict_hull,
    turn,
)

ROUNDING = 1e-12


def enclosed(points: np.ndarray) -> EntropyBounds:
    """The bounds, after checks that need no truth; the lower one before it is cut off at the upper one."""
    bounds = hull_entropy(points)
    if not collinear_span(points)[2]:
        uncut = lower.lower_bound(points, lower.scale_to_unit(points), convex_hull(points))
        assert bounds.lower == min(max(uncut, 0), bounds.upper)
        assert uncut <= bounds.upper + ROUNDING
    assert 0 <= bounds.lower <= bounds.upper <= math.log(len(points)) + ROUNDING
    assert bounds.upper == partition_entropy(np.unique(bounds.partition.labels, return_counts=True)[1])
    check_partition(points, bounds.partition)
    return bounds


def small_lists(maximum: int) -> st.SearchStrategy[np.ndarray]:
    number = st.integers(1, maximum)

    def grid(limit: int) -> st.SearchStrategy[np.ndarray]:
        coordinate = st.integers(0, limit).map(float)
        return number.flatmap(lambda n: st.lists(st.tuples(coordinate, coordinate), min_size=n, max_size=n)).map(
            lambda rows: np.array(rows, dtype=np.float64).reshape(-1, 2)
        )

    def drawn(seed: int, n: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        points = rng.standard_normal((n, 2))
        if seed % 3 == 1:
            points /= np.hypot(*points.T)[:, None]
        if seed % 3 == 2:
            points = points[np.argsort(points[:, 0] * (rng.random(n) < 0.8))]
        return points

    return st.one_of(grid(2), grid(4), grid(20), st.builds(drawn, st.integers(0, 10**6), number))


@given(small_lists(7))
@settings(max_examples=80, deadline=None)
def test_bounds_enclose_the_exact_entropy(points: np.ndarray) -> None:
    bounds = enclosed(points)
    assert_respectful(points, bounds.partition)
    exact = exact_hull_entropy(points)
    assert bounds.lower <= exact + ROUNDING
    assert exact <= bounds.upper + ROUNDING


@pytest.mark.parametrize("distribution", ["square", "circle", "disk", "sorted_runs"])
def test_bounds_enclose_the_exact_entropy_of_eight_points(distribution: str) -> None:
    parameters = {"runs": 2} if distribution == "sorted_runs" else {}
    for seed in range(2):
        points = generate(distribution, 8, seed, **parameters)
        bounds = enclosed(points)
        assert bounds.lower - ROUNDING <= exact_hull_entropy(points) <= bounds.upper + ROUNDING


def best_scale_on_a_grid(outer: np.ndarray, inner: np.ndarray, steps: int) -> float:
    """Largest scale of ``inner`` that fits into a triangle with corners on a sampled boundary; both hold the origin."""
    position = np.arange(len(outer) * steps) / steps
    edge, share = position.astype(int), (position % 1)[:, None]
    boundary = (1 - share) * outer[edge] + share * outer[(edge + 1) % len(outer)]
    step = boundary[None] - boundary[:, None]
    across = boundary[:, None, 0] * step[..., 1] - boundary[:, None, 1] * step[..., 0]
    reach = (step[..., 1, None] * inner[:, 0] - step[..., 0, None] * inner[:, 1]).max(axis=2)
    # The chord i-j leaves the scaled set on its left up to this scale.
    scale = np.where((reach > 0) & (across >= 0), across / np.where(reach > 0, reach, 1), 0.0)
    best = 0.0
    for i in range(len(boundary)):
        best = max(best, np.minimum(np.minimum(scale[i][:, None], scale), scale[:, i][None]).max())
    return best


def test_oracle_decides_nested_triangles_at_the_threshold() -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        outer = np.array(strict_hull(rational(rng.integers(-30, 30, (7, 2)))), dtype=np.float64)
        outer -= outer.mean(axis=0).round()
        angles = np.sort(rng.random(5) * 0.4 + np.arange(5)) * (2 * np.pi / 5)
        inner = np.round(64 * np.stack([np.cos(angles), np.sin(angles)], axis=1)) / 64
        threshold = best_scale_on_a_grid(outer, inner, 24)
        for scale, expected in ((threshold * (1 - 1e-9), True), (threshold * 1.1, False)):
            shrunk = strict_hull(rational(inner * scale))
            hull = rational(outer)
            inside = all(turn(hull[i - 1], hull[i], q) >= 0 for q in shrunk for i in range(len(hull)))
            assert (inside and NestedTriangle(hull, shrunk).exists()) == expected


def test_oracle_knows_closed_forms() -> None:
    # Four points in convex position whose x rise, fall and rise: a triangle and a single.
    zigzag = np.array([[0.0, 0], [3, 0], [1, 2], [4, 2]])
    assert exact_hull_entropy(zigzag) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    # The same points sorted by x are one run; three of them with any interior points are one triangle.
    assert exact_hull_entropy(zigzag[[0, 2, 1, 3]]) == 0
    assert exact_hull_entropy(np.array([[3.0, 1], [0, 0], [4, 9], [9, 0], [4, 4], [2, 1]])) == 0
    # Six points around a hexagon: two triples at best.
    hexagon = np.array([[0.0, 2], [4, 2], [1, 0], [3, 4], [1, 4], [3, 0]])
    assert exact_hull_entropy(hexagon) == pytest.approx(math.log(2))


FAMILIES = {
    "square": lambda n, rng: rng.random((n, 2)),
    "grid": lambda n, rng: rng.integers(0, 7, (n, 2)).astype(float),
    "duplicates": lambda n, rng: rng.random((5, 2))[rng.integers(5, size=n)],
    "collinear": lambda n, rng: np.outer(rng.integers(0, 30, n), [1.0, 2.0]),
    "vertical": lambda n, rng: np.stack([np.zeros(n), rng.random(n)], axis=1),
    "two distinct": lambda n, rng: np.array([[0.0, 1.0], [-0.0, 2.0]])[rng.integers(2, size=n)],
    "circle": lambda n, rng: generate("circle", n, int(rng.integers(100))),
    "sorted with noise": lambda n, rng: np.concatenate(
        [generate("circle_ordered", n, int(rng.integers(100))), 0.3 * rng.random((n, 2))]
    )[np.argsort(np.concatenate([np.arange(n), rng.integers(0, n, n)]), kind="stable")],
    "one ulp": lambda n, rng: 1.0 + np.finfo(float).eps * rng.integers(0, 4, (n, 2)),
    "subnormal": lambda n, rng: 5e-324 * rng.integers(0, 40, (n, 2)),
    "huge": lambda n, rng: rng.choice([-1.0, 1.0], (n, 2)) * rng.random((n, 2)) * 1.79e308,
    "mixed scales": lambda n, rng: rng.choice([-1.0, 1.0], (n, 2)) * 10.0 ** rng.integers(-320, 308, (n, 2)),
    "flat": lambda n, rng: rng.random((n, 2)) * [1.0, 1e-320],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_partitions_are_respectful_for_every_kind_of_input(family: str) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        points = FAMILIES[family](int(rng.integers(1, 60)), rng)
        assert_respectful(points, enclosed(points).partition)


@pytest.mark.parametrize("family", ["collinear", "vertical", "two distinct"])
def test_collinear_lists_have_entropy_zero(family: str) -> None:
    points = FAMILIES[family](50, np.random.default_rng(1))
    bounds = enclosed(points)
    assert (bounds.lower, bounds.upper) == (0, 0)
    assert len(bounds.partition.kinds) == 1


def test_entropy_of_known_families() -> None:
    n = 20_000
    points = generate("square", n, 0)
    assert enclosed(points[np.argsort(points[:, 0])]).upper == 0
    square = enclosed(generate("square", n, 0))
    # A triangle in a square takes at most half of it, and two halves take it all.
    assert 0.9 * math.log(2) < square.lower <= square.upper < 1.3 * math.log(2)
    assert enclosed(generate("disk", n, 0)).upper < 2.5
    assert enclosed(generate("gaussian", n, 0)).upper < 0.6
    circle = enclosed(generate("circle", n, 0))
    assert math.log(n / 3) - 0.2 < circle.lower <= circle.upper < circle.lower + 0.1
    ordered = enclosed(generate("circle_ordered", n, 0))
    assert math.log(2) - 1e-2 < ordered.lower <= ordered.upper < math.log(2) + 1e-2
    for runs in (4, 64, 1000):
        sorted_runs = enclosed(generate("sorted_runs", n, 0, runs=runs))
        assert sorted_runs.lower == pytest.approx(math.log(runs), rel=0.01)
        assert sorted_runs.upper == pytest.approx(math.log(runs), rel=0.01)


def test_entropy_depends_on_the_order_of_the_list_only_through_runs() -> None:
    points = generate("sorted_runs", 2000, 0, runs=5)
    shuffled = points[np.random.default_rng(0).permutation(len(points))]
    assert hull_entropy(points).upper < 2 < 6 < hull_entropy(shuffled).lower
    backwards = hull_entropy(points[::-1])
    assert backwards.upper == pytest.approx(hull_entropy(points).upper, abs=0.01)


def test_a_run_skips_interior_points() -> None:
    rng = np.random.default_rng(0)
    vertices = generate("sorted_runs", 400, 0, runs=1)
    interior = np.stack([0.4 * rng.random(400) - 0.2, 0.3 + 0.2 * rng.random(400)], axis=1)
    points = np.stack([vertices, interior], axis=1).reshape(-1, 2)
    bounds = enclosed(points)
    assert bounds.upper < 1.1 * math.log(2)
    run = np.flatnonzero(bounds.partition.kinds == PartKind.RUN)[0]
    assert np.diff(bounds.partition.spans[run])[0] > 1.5 * bounds.partition.sizes[run]


def test_one_million_points() -> None:
    n = 1_000_000
    square = hull_entropy(generate("square", n, 0))
    assert 0.9 * math.log(2) < square.lower <= square.upper < 1.1 * math.log(2)
    circle = hull_entropy(generate("circle", n, 0))
    assert 0.9 * math.log(n) < circle.lower <= circle.upper < circle.lower + 0.1


def test_every_violation_is_named() -> None:
    rng = np.random.default_rng(2)
    points = np.concatenate([generate("sorted_runs", 40, 0, runs=2), 0.1 * rng.random((20, 2)) + [-0.1, 0.5]])
    good = hull_entropy(points).partition
    check_partition(points, good)
    runs = np.flatnonzero(good.kinds == PartKind.RUN)
    triangle = np.flatnonzero(good.kinds == PartKind.TRIANGLE)[0]
    assert len(runs) == 2

    def changed(field: str, index: object, value: object) -> object:
        array = getattr(good, field).copy()
        array[index] = value
        return replace(good, **{field: array})

    inside = np.flatnonzero(good.labels == triangle)[0]
    first_run = np.flatnonzero(good.labels == runs[0])
    tiny = np.full(3, inside)
    other = np.where(good.labels == runs[0], runs[1], good.labels)
    other[first_run[::2]] = runs[0]
    interleaved = good.spans.copy()
    for run in runs:
        members = np.flatnonzero(other == run)
        interleaved[run] = members[0], members[-1] + 1
    hole = good.labels.copy()
    hole[first_run[5]] = triangle
    wide = good.corners.copy()
    wide[triangle] = np.array([first_run[0], first_run[5], first_run[-1]])
    cases = [
        (replace(good, labels=good.labels[1:]), "do not fit"),
        (changed("labels", 0, len(good.kinds)), "name a part"),
        (changed("labels", slice(None), 0), "name a part"),
        (changed("kinds", triangle, 9), "must be a single, a triangle or a run"),
        (changed("corners", triangle, -1), "three corners"),
        (changed("corners", runs[0], 0), "three corners"),
        (changed("kinds", triangle, PartKind.SINGLE), "exactly one point"),
        (changed("corners", triangle, tiny), "outside the triangle"),
        (changed("spans", runs[0], (0, 60)), "span of a run"),
        (replace(good, labels=other, spans=interleaved), "never decrease|must not overlap"),
        (replace(good, labels=hole, corners=wide), "outside the triangle|hull vertex"),
    ]
    for partition, words in cases:
        with pytest.raises(InputError, match=words):
            check_partition(points, partition)


def test_runs_that_turn_overlap_or_skip_a_vertex_are_refused() -> None:
    x = np.array([0.0, 1, 2, 3, 4, 5])
    points = np.stack([x, x * x], axis=1)

    def runs(labels: list[int], kinds: list[int], order: list[int]) -> tuple[np.ndarray, object]:
        from entreg.entropy import HullPartition

        labels = np.array(labels)
        corners = np.full((len(kinds), 3), -1)
        spans = np.full((len(kinds), 2), -1)
        for part, kind in enumerate(kinds):
            members = np.flatnonzero(labels == part)
            if kind == PartKind.RUN:
                spans[part] = members[0], members[-1] + 1
            else:
                corners[part] = members[[0, -1, -1]]
        return points[order], HullPartition(labels, np.array(kinds, dtype=np.int8), corners, spans)

    check_partition(*runs([0, 0, 0, 1, 1, 1], [2, 2], [0, 1, 2, 5, 4, 3]))
    with pytest.raises(InputError, match="never decrease or never increase"):
        check_partition(*runs([0] * 6, [2], [0, 1, 2, 5, 4, 3]))
    with pytest.raises(InputError, match="must not overlap"):
        check_partition(*runs([0, 0, 1, 0, 1, 1], [2, 2], [0, 1, 2, 3, 4, 5]))
    with pytest.raises(InputError, match="skip a point at a hull vertex"):
        check_partition(*runs([0, 0, 1, 0, 0, 0], [2, 0], [0, 1, 2, 3, 4, 5]))


def test_longest_monotone_subsequence_against_quadratic_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = rng.integers(0, 6, rng.integers(1, 25)).astype(float)
        best = np.ones(len(x), dtype=int)
        for i in range(len(x)):
            best[i] += max((best[j] for j in range(i) if x[j] <= x[i]), default=0)
        assert lower._longest_nondecreasing(x) == best.max()


@pytest.mark.parametrize("family", ["square", "grid", "circle", "flat"])
def test_no_triangle_in_the_hull_beats_the_bound_on_its_points(family: str) -> None:
    rng = np.random.default_rng(5)
    points = lower.scale_to_unit(FAMILIES[family](40, rng))
    hull = np.array(strict_hull(rational(points)), dtype=np.float64)
    bound = lower._most_in_triangle(points, lower._boundary_points(hull))
    rotated = points - points[:, None]
    # cross[i, j, p] > 0 where p lies left of the line from i to j.
    cross = rotated[:, :, None, 0] * rotated[:, None, :, 1] - rotated[:, :, None, 1] * rotated[:, None, :, 0]
    left = cross >= -1e-15
    most = 0
    # Two corners at one place would count every point as left of their line.
    places = np.unique(points, axis=0, return_index=True)[1]
    for a, b, c in combinations(places, 3):
        most = max(most, (left[a, b] & left[b, c] & left[c, a]).sum(), (left[b, a] & left[c, b] & left[a, c]).sum())
    assert most <= bound
    if family == "square":
        assert bound < 40


def test_most_uneven_partition() -> None:
    assert lower.most_uneven_entropy(10, 4) == pytest.approx(partition_entropy([4, 4, 2]))
    assert lower.most_uneven_entropy(9, 3) == pytest.approx(math.log(3))
    assert lower.most_uneven_entropy(5, 8) == 0


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.zeros((0, 2)), "point"),
        (np.zeros((3, 3)), "shape"),
        (np.zeros(4), "shape"),
        (np.array([[0.0, np.nan], [1, 1]]), "finite"),
        (np.array([[0.0, np.inf], [1, 1]]), "finite"),
        (np.zeros((2, 2), dtype=complex), "real"),
    ],
)
def test_bad_points_give_one_sentence(points: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        hull_entropy(points)


def test_importing_entropy_does_not_import_geometry() -> None:
    code = "import sys, entreg.entropy; sys.exit('entreg.geometry' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
