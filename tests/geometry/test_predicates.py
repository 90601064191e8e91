"""The predicates against exact integer arithmetic, on inputs chosen to defeat floating point."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.geometry import _late_calls, predicates
from entreg.geometry.predicates import incircle, incircle_exact, orient2d, orient2d_exact
from tests.geometry.exact_oracle import in_circle, integer_points, orientation

finite = st.floats(allow_nan=False, allow_infinity=False)
subnormal = st.integers(-(2**20), 2**20).map(lambda k: k * 5e-324)
huge = st.floats(1e307, 1.7976931348623157e308).flatmap(lambda x: st.sampled_from([x, -x]))
grid = st.integers(-4, 4).map(float)
wide_grid = st.integers(-(2**31), 2**31).map(float)
# Coordinates that share their magnitude collide and cancel; mixtures reach every branch of the exact stage.
coordinate = st.one_of(finite, subnormal, huge, grid, wide_grid, st.floats(-1, 1), st.just(0.0))


def nudge(value: float, steps: int) -> float:
    for _ in range(abs(steps)):
        value = math.nextafter(value, math.inf if steps > 0 else -math.inf)
    return value


@st.composite
def nearly_collinear(draw):
    ax, ay = draw(st.floats(-2, 2)), draw(st.floats(-2, 2))
    dx, dy = draw(st.floats(-1, 1)), draw(st.floats(-1, 1))
    scale = 2.0 ** draw(st.integers(-1060, 1020))
    numbers = [draw(st.floats(-1, 1)) for _ in range(2)]
    points = [(ax, ay)] + [(ax + t * dx, ay + t * dy) for t in numbers]
    return [nudge(v * scale, draw(st.integers(-1, 1))) for point in points for v in point]


@st.composite
def nearly_cocircular(draw):
    # Integer points on one circle (5, 10, 13 and 25 have several), shifted, scaled and moved by an ulp at most.
    square = draw(st.sampled_from([25, 65, 325, 1105]))
    radius = math.isqrt(square)
    circle = [(x, y) for x in range(-radius, radius + 1) for y in range(-radius, radius + 1) if x * x + y * y == square]
    points = draw(st.lists(st.sampled_from(circle), min_size=4, max_size=4))
    offset = draw(st.sampled_from([0.0, 0.1, 1e3, 1e9]))
    scale = 2.0 ** draw(st.integers(-1060, 980))
    steps = draw(st.sampled_from([0, 1]))
    return [nudge((v + offset) * scale, draw(st.integers(-steps, steps))) for p in points for v in p]


def check_orientation(values):
    points = list(zip(values[::2], values[1::2], strict=True))
    expected = orientation(*integer_points(points))
    assert orient2d(*values) == expected
    assert orient2d_exact(*values) == expected


def check_circle(values):
    points = list(zip(values[::2], values[1::2], strict=True))
    expected = in_circle(*integer_points(points))
    assert incircle(*values) == expected
    assert incircle_exact(*values) == expected


@settings(max_examples=800, deadline=None)
@given(st.one_of(st.lists(coordinate, min_size=6, max_size=6), nearly_collinear()))
def test_orientation_equals_exact_integers(values):
    check_orientation(values)


@settings(max_examples=800, deadline=None)
@given(st.one_of(st.lists(coordinate, min_size=8, max_size=8), nearly_cocircular()))
def test_incircle_equals_exact_integers(values):
    check_circle(values)


@pytest.mark.exhaustive
@settings(max_examples=20_000, deadline=None)
@given(st.one_of(st.lists(coordinate, min_size=6, max_size=6), nearly_collinear()))
def test_orientation_equals_exact_integers_long(values):
    check_orientation(values)


@pytest.mark.exhaustive
@settings(max_examples=20_000, deadline=None)
@given(st.one_of(st.lists(coordinate, min_size=8, max_size=8), nearly_cocircular()))
def test_incircle_equals_exact_integers_long(values):
    check_circle(values)


def test_orientation_around_every_ulp_of_a_line():
    # The classical picture where naive floating point fails: a fine grid around (0.5, 0.5) against a far diagonal.
    step = 2.0**-53
    for i in range(32):
        for j in range(32):
            check_orientation([0.5 + i * step, 0.5 + j * step, 12.0, 12.0, 24.0, 24.0])


def test_mixed_magnitudes_decide_by_the_smallest_term():
    tiny, big = 5e-324, 1.7976931348623157e308
    assert orient2d(-big, -big, big, big, 0.0, tiny) == 1
    assert orient2d(-big, -big, big, big, tiny, 0.0) == -1
    assert orient2d(-big, -big, big, big, tiny, tiny) == 0
    assert orient2d(0.0, 0.0, tiny, 0.0, 0.0, tiny) == 1
    # The circle through (-big, 0), (0, -big), (big, 0) is centred at the origin with radius big.
    below = math.nextafter(big, 0.0)
    assert incircle(-big, 0.0, 0.0, -big, big, 0.0, 0.0, big) == 0
    assert incircle(-big, 0.0, 0.0, -big, big, 0.0, 0.0, below) == 1
    assert incircle(-big, 0.0, 0.0, -big, big, 0.0, tiny, big) == -1
    assert incircle(-tiny, 0.0, 0.0, -tiny, tiny, 0.0, 0.0, 0.0) == 1
    assert incircle(-tiny, 0.0, 0.0, -tiny, tiny, 0.0, 0.0, tiny) == 0
    assert incircle(-tiny, 0.0, 0.0, -tiny, tiny, 0.0, 0.0, 2 * tiny) == -1


def test_predicates_are_antisymmetric():
    rng = np.random.default_rng(3)
    for _ in range(200):
        values = rng.normal(size=8) * 10.0 ** rng.integers(-300, 300)
        a, b, c, d = (tuple(pair) for pair in values.reshape(4, 2))
        assert orient2d(*a, *b, *c) == -orient2d(*b, *a, *c) == orient2d(*b, *c, *a)
        assert incircle(*a, *b, *c, *d) == -incircle(*b, *a, *c, *d) == -incircle(*a, *b, *d, *c)


@pytest.fixture
def uncompiled(monkeypatch):
    """The pointer to the exact stage of the orientation, leading to Python as in a new process."""
    pointer = predicates._orient2d_integers.pointer
    before = pointer.target.value
    pointer.target.value = pointer.uncompiled
    yield pointer
    pointer.target.value = before


# The smallest term decides, at magnitudes that no floating-point stage can deal with.
HARD = (-1.7976931348623157e308, -1.7976931348623157e308, 1.7976931348623157e308, 1.7976931348623157e308, 0.0, 5e-324)


@settings(max_examples=300, deadline=None)
@given(st.lists(coordinate, min_size=8, max_size=8))
def test_rational_and_compiled_answers_agree(values):
    points = list(zip(values[::2], values[1::2], strict=True))
    predicates.compile_exact_stages()
    for pointer, count, expected in (
        (predicates._orient2d_integers.pointer, 6, orientation(*integer_points(points[:3]))),
        (predicates._incircle_integers.pointer, 8, in_circle(*integer_points(points))),
    ):
        assert pointer.answer_in_python(*values[:count]) == pointer.compiled.ctypes(*values[:count]) == 2 + expected


def test_a_stage_that_is_asked_often_is_compiled(uncompiled, monkeypatch):
    monkeypatch.setattr(uncompiled, "asked", 0)
    monkeypatch.setattr(uncompiled, "compile", lambda: calls.append(1))
    calls = []
    for _ in range(_late_calls.PATIENCE):
        assert orient2d(*HARD) == 1
    assert not calls
    assert orient2d(*HARD) == 1
    assert len(calls) == 1


def test_an_interrupt_in_the_exact_stage_is_put_off_and_changes_no_answer(uncompiled, monkeypatch):
    interrupts = []
    monkeypatch.setattr(_late_calls._thread, "interrupt_main", lambda: interrupts.append(1))
    rational = uncompiled.rational

    def interrupted(*coordinates):
        if not interrupts:
            raise KeyboardInterrupt
        return rational(*coordinates)

    monkeypatch.setattr(uncompiled, "rational", interrupted)
    assert orient2d(*HARD) == 1
    assert interrupts == [1]
