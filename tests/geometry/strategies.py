"""Point sets that defeat careless geometry, for Hypothesis."""

import math

import numpy as np
from hypothesis import strategies as st

_TINY = 5e-324
_HUGE = 1.7976931348623157e308


def _points(coordinate: st.SearchStrategy[float], most: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=most).map(
        lambda rows: np.array(rows, dtype=np.float64)
    )


@st.composite
def _along_a_curve(draw, most: int) -> np.ndarray:
    """Points of a line or a parabola, each coordinate off by an ulp at most, at any scale and offset."""
    count = draw(st.integers(3, most))
    parameter = np.array(draw(st.lists(st.integers(-8, 8), min_size=count, max_size=count))) / 8.0
    slope = draw(st.sampled_from([0.0, 1.0, 1.0 / 3.0, 1e-9, 1e9]))
    curvature = draw(st.sampled_from([0.0, 0.0, 1.0, 1e-15]))
    offset = draw(st.sampled_from([0.0, 0.1, 1.0, 1e8]))
    scale = 2.0 ** draw(st.sampled_from([0, 0, -1060, -500, 900]))
    points = np.stack([parameter, slope * parameter + curvature * parameter**2], axis=1)
    points = (points + offset) * scale
    steps = np.array(draw(st.lists(st.integers(-1, 1), min_size=2 * count, max_size=2 * count))).reshape(-1, 2)
    neighbors = np.nextafter(points, np.where(steps > 0, math.inf, -math.inf))
    return np.where(steps == 0, points, neighbors)


def point_sets(most: int = 40) -> st.SearchStrategy[np.ndarray]:
    """``(n, 2)`` float64 arrays with 1 <= n <= ``most``, rich in duplicates, ties, collinear and extreme points."""
    grid = st.integers(-3, 3).map(float)
    return st.one_of(
        _points(grid, most),
        _points(st.integers(-1000, 1000).map(float), most),
        _points(st.floats(-1.0, 1.0), most),
        _points(st.floats(allow_nan=False, allow_infinity=False), min(most, 12)),
        _points(st.integers(-4, 4).map(lambda k: k * _TINY), most),
        _points(st.integers(-4, 4).map(lambda k: k / 4 * _HUGE), most),
        _points(st.sampled_from([0.0, -0.0, 1.0, -1.0, _TINY, -_TINY, _HUGE, -_HUGE]), most),
        _points(st.floats(-1e3, 1e3, width=32), most),
        _along_a_curve(most),
    )
