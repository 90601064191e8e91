"""Comparisons of the Delaunay merge, relative to a base line from ``left`` to ``right``.

Seen from a point p, the base subtends an angle with cosine-like part ``dot = (left - p) . (right - p)`` and sine-like
part ``cross = (left - p) x (right - p)``. A point above the base has ``cross > 0``, and of two such points d lies
inside the circle through left, right and c exactly when its angle is the larger one, that is when
``dot_d * cross_c < dot_c * cross_d``. So every point is evaluated once per base and each in-circle test costs two
products (our choice of formulation; the determinant is the usual one).

Floating-point filters accept a sign only beyond a bound on the rounding error; what remains goes through a stage that
is exact for lattice-like coordinates and then to the exact predicates. Coordinates come as flat arrays, x and y of
point i at 2 i and 2 i + 1: ``scaled`` is what the filters read (magnitudes at most ``LARGEST_SCALED``), ``exact``
holds the values as given. They are the same array unless those had to be scaled; then the exact predicates' own
filters may still decide where scaling lost too much.
"""

from entreg.geometry.predicates import incircle, orient2d
from entreg.kernels import part

LARGEST_SCALED = 2.0**60
_UNIT_ROUNDOFF = 2.0**-53
# Rounding errors relative to the span (|ax| + |ay|) (|bx| + |by|): dot and cross are each off by at most 3 units (and
# higher-order terms), so dot_d * cross_c - dot_c * cross_d is off by at most 8 units of the product of the spans.
CROSS_BOUND = 4.0 * _UNIT_ROUNDOFF
ANGLE_BOUND = 10.0 * _UNIT_ROUNDOFF
# Underflow: each first-level quantity is off by less than 2**-1070 and is multiplied by at most 2**124.
MARGIN = 2.0**-940
_SPLITTER = 134217729.0
# Below this, the rounding error of a product may itself underflow.
_SMALLEST_PRODUCT = 2.0**-900
_LARGEST_PRODUCT = 2.0**900
_DOUBLED_BOUND = 2.0**-95


@part
def angle_parts(scaled, left_x, left_y, right_x, right_y, point):
    """``(dot, cross, span)`` of the base seen from ``point``; errors are at most ``CROSS_BOUND * span`` + tiny."""
    x = scaled[2 * point]
    y = scaled[2 * point + 1]
    ax = left_x - x
    ay = left_y - y
    bx = right_x - x
    by = right_y - y
    return ax * bx + ay * by, ax * by - ay * bx, (abs(ax) + abs(ay)) * (abs(bx) + abs(by))


@part
def is_left_turn(scaled, exact, a, b, c):
    """Whether points a, b, c turn strictly counter-clockwise."""
    x = scaled[2 * a]
    y = scaled[2 * a + 1]
    left = (scaled[2 * b] - x) * (scaled[2 * c + 1] - y)
    right = (scaled[2 * b + 1] - y) * (scaled[2 * c] - x)
    turn = left - right
    bound = CROSS_BOUND * (abs(left) + abs(right)) + MARGIN
    if turn > bound:
        return True
    if turn < -bound:
        return False
    return is_above(exact, b, c, a)


@part
def is_above(exact, left, right, point):
    """Whether ``cross > 0`` for ``point``, decided exactly."""
    px, py = exact[2 * point], exact[2 * point + 1]
    lx, ly = exact[2 * left], exact[2 * left + 1]
    rx, ry = exact[2 * right], exact[2 * right + 1]
    ax, ay, bx, by = lx - px, ly - py, rx - px, ry - py
    if (
        _difference_error(lx, px, ax) == 0.0
        and _difference_error(ly, py, ay) == 0.0
        and _difference_error(rx, px, bx) == 0.0
        and _difference_error(ry, py, by) == 0.0
    ):
        first = ax * by
        second = ay * bx
        if _has_plain_error(ax, by, first) and _has_plain_error(ay, bx, second):
            if first != second:
                return first > second
            return _product_error(ax, by, first) > _product_error(ay, bx, second)
    return orient2d(px, py, lx, ly, rx, ry) > 0


@part
def is_inside(exact, left, right, c, d):
    """Whether d, above the base, lies strictly inside the circle through left, right and c, decided exactly."""
    lx, ly = exact[2 * left], exact[2 * left + 1]
    rx, ry = exact[2 * right], exact[2 * right + 1]
    cx, cy = exact[2 * c], exact[2 * c + 1]
    dx, dy = exact[2 * d], exact[2 * d + 1]
    c_usable, dot_c, dot_c_low, cross_c, cross_c_low, c_exact, c_span = _doubled_parts(lx, ly, rx, ry, cx, cy)
    if c_usable:
        d_usable, dot_d, dot_d_low, cross_d, cross_d_low, d_exact, d_span = _doubled_parts(lx, ly, rx, ry, dx, dy)
        if d_usable:
            first = dot_d * cross_c
            second = dot_c * cross_d
            bound = c_span * d_span
            if _SMALLEST_PRODUCT < bound < _LARGEST_PRODUCT:
                first_low = _product_error(dot_d, cross_c, first)
                second_low = _product_error(dot_c, cross_d, second)
                difference = (first - second) + (
                    (first_low - second_low)
                    + ((dot_d * cross_c_low + dot_d_low * cross_c) - (dot_c * cross_d_low + dot_c_low * cross_d))
                )
                if abs(difference) > _DOUBLED_BOUND * bound:
                    return difference < 0.0
                if c_exact and d_exact:
                    if dot_c == dot_d and dot_c_low == dot_d_low and cross_c == cross_d and cross_c_low == cross_d_low:
                        return False
                    if dot_c == dot_c_low == dot_d == dot_d_low == 0.0:
                        return False
                    plain = _has_plain_error(dot_d, cross_c, first) and _has_plain_error(dot_c, cross_d, second)
                    if plain and dot_c_low == dot_d_low == cross_c_low == cross_d_low == 0.0:
                        return first < second or (first == second and first_low < second_low)
    return incircle(lx, ly, rx, ry, cx, cy, dx, dy) > 0


@part
def _doubled_parts(lx, ly, rx, ry, px, py):
    """Dot and cross as unevaluated sums of two numbers, when the coordinate differences are free of rounding.

    Returns:
        ``(usable, dot, dot_low, cross, cross_low, exact, span)``: ``exact`` when the sums are the true values, else
        they are off by less than 2**-100 span.
    """
    ax, ay, bx, by = lx - px, ly - py, rx - px, ry - py
    span = (abs(ax) + abs(ay)) * (abs(bx) + abs(by))
    usable = (
        _difference_error(lx, px, ax) == 0.0
        and _difference_error(ly, py, ay) == 0.0
        and _difference_error(rx, px, bx) == 0.0
        and _difference_error(ry, py, by) == 0.0
    )
    if not usable:
        return False, 0.0, 0.0, 0.0, 0.0, False, span
    axbx, ayby, axby, aybx = ax * bx, ay * by, ax * by, ay * bx
    usable = (
        _has_plain_error(ax, bx, axbx)
        and _has_plain_error(ay, by, ayby)
        and _has_plain_error(ax, by, axby)
        and _has_plain_error(ay, bx, aybx)
    )
    if not usable:
        return False, 0.0, 0.0, 0.0, 0.0, False, span
    dot, dot_low, dot_exact = _sum_of_products(axbx, _product_error(ax, bx, axbx), ayby, _product_error(ay, by, ayby))
    cross, cross_low, cross_exact = _sum_of_products(
        axby, _product_error(ax, by, axby), -aybx, -_product_error(ay, bx, aybx)
    )
    return True, dot, dot_low, cross, cross_low, dot_exact and cross_exact, span


@part
def _sum_of_products(first, first_low, second, second_low):
    """(first + first_low) + (second + second_low) as high and low part, and whether that is free of rounding."""
    total = first + second
    virtual = total - first
    rest = (first - (total - virtual)) + (second - virtual)
    exact = (first_low == 0.0) + (second_low == 0.0) + (rest == 0.0) >= 2
    return total, rest + (first_low + second_low), exact


@part
def _difference_error(a, b, difference):
    """a - b - difference, exactly, where ``difference`` is the rounded a - b; NaN after an overflow."""
    virtual = a - difference
    return (a - (difference + virtual)) + (virtual - b)


@part
def _has_plain_error(a, b, product):
    """Whether :func:`_product_error` is exact for this product: neither overflow nor underflow comes near."""
    size = abs(product)
    return (
        abs(a) < _LARGEST_PRODUCT
        and abs(b) < _LARGEST_PRODUCT
        and (_SMALLEST_PRODUCT < size < _LARGEST_PRODUCT or a == 0.0 or b == 0.0)
    )


@part
def _product_error(a, b, product):
    """a * b - product, exactly, where ``product`` is the rounded a * b (Dekker's splitting)."""
    spread = _SPLITTER * a
    a_high = spread - (spread - a)
    a_low = a - a_high
    spread = _SPLITTER * b
    b_high = spread - (spread - b)
    b_low = b - b_high
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
