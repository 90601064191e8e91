"""Exact orientation and in-circle tests for every finite float64 input.

Each predicate evaluates its determinant in floating point first and accepts the sign when the determinant exceeds a
bound on its own rounding error (the bounds of Shewchuk, "Adaptive precision floating-point arithmetic and fast robust
geometric predicates", 1997, widened so that underflow is covered; overflow makes the comparison false). What remains
is decided in exact integer arithmetic: a finite float64 is an integer times a power of two, so all coordinates of one
call are brought to their common power of two and the determinant is an integer. No tolerance appears anywhere.

The filter stages are small enough to be inlined into the caller's loop; the exact stages are not, and those in integers
stay out of the callers' code altogether (:mod:`entreg.geometry._late_calls`).
"""

import math
from fractions import Fraction

import numpy as np

from entreg.geometry._late_calls import called_late
from entreg.kernels import kernel, part

_UNIT_ROUNDOFF = 2.0**-53
_ORIENT_BOUND = (3.0 + 16.0 * _UNIT_ROUNDOFF) * _UNIT_ROUNDOFF
_INCIRCLE_BOUND = (10.0 + 96.0 * _UNIT_ROUNDOFF) * _UNIT_ROUNDOFF
# A product that underflows is off by at most 2**-1075, and that error may be multiplied by a squared distance. These
# margins exceed the sum of all such errors by many orders of magnitude and are normal numbers, hence fast.
_ORIENT_MARGIN = 2.0**-1020
_INCIRCLE_MARGIN = 2.0**-1000

# Between these magnitudes products of two factors, and the parts of such products, are normal numbers.
_SMALLEST_FACTOR = 2.0**-400
_LARGEST_FACTOR = 2.0**400
_SPLITTER = 2.0**27 + 1.0

_LIMB_BITS = 32
_LIMB_MASK = np.uint64(0xFFFFFFFF)
_LIMB_SHIFT = np.uint64(32)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)


@kernel
def orient2d(ax, ay, bx, by, cx, cy):
    """Orientation of three points.

    Args:
        ax, ay, bx, by, cx, cy: Finite float64 coordinates of a, b and c.

    Returns:
        1 when a, b, c turn counter-clockwise, -1 when they turn clockwise, 0 when they are collinear.
    """
    left = (ax - cx) * (by - cy)
    right = (ay - cy) * (bx - cx)
    determinant = left - right
    bound = _ORIENT_BOUND * (abs(left) + abs(right)) + _ORIENT_MARGIN
    # One predictable branch: on random input the sign itself is a coin toss.
    if abs(determinant) > bound:
        return _sign(determinant)
    return orient2d_exact(ax, ay, bx, by, cx, cy)


@kernel
def incircle(ax, ay, bx, by, cx, cy, dx, dy):
    """Position of d relative to the circle through a, b and c, which turn counter-clockwise.

    Args:
        ax, ay, bx, by, cx, cy, dx, dy: Finite float64 coordinates of a, b, c and d.

    Returns:
        1 when d lies strictly inside the circle, -1 when strictly outside, 0 when on it. (For a, b, c clockwise the
        sign is reversed; for collinear a, b, c it is that of the same determinant.)
    """
    adx = ax - dx
    ady = ay - dy
    bdx = bx - dx
    bdy = by - dy
    cdx = cx - dx
    cdy = cy - dy
    bc = bdx * cdy
    cb = cdx * bdy
    ca = cdx * ady
    ac = adx * cdy
    ab = adx * bdy
    ba = bdx * ady
    a_lift = adx * adx + ady * ady
    b_lift = bdx * bdx + bdy * bdy
    c_lift = cdx * cdx + cdy * cdy
    determinant = a_lift * (bc - cb) + b_lift * (ca - ac) + c_lift * (ab - ba)
    permanent = (abs(bc) + abs(cb)) * a_lift + (abs(ca) + abs(ac)) * b_lift + (abs(ab) + abs(ba)) * c_lift
    bound = _INCIRCLE_BOUND * permanent + _INCIRCLE_MARGIN * (a_lift + b_lift + c_lift + 1.0)
    if abs(determinant) > bound:
        return _sign(determinant)
    return incircle_exact(ax, ay, bx, by, cx, cy, dx, dy)


@kernel
def orient2d_exact(ax, ay, bx, by, cx, cy):
    """The same as :func:`orient2d` without the floating-point filter."""
    acx = ax - cx
    acy = ay - cy
    bcx = bx - cx
    bcy = by - cy
    # Differences are rounded, but their signs never are.
    left_sign = _sign(acx) * _sign(bcy)
    right_sign = _sign(acy) * _sign(bcx)
    if left_sign != right_sign or left_sign == 0:
        return _sign(left_sign - right_sign)
    if (
        _is_exact_difference(acx, ax, cx)
        and _is_exact_difference(acy, ay, cy)
        and _is_exact_difference(bcx, bx, cx)
        and _is_exact_difference(bcy, by, cy)
    ):
        # The determinant is a difference of two products, and rounding the products keeps their order.
        left = acx * bcy
        right = acy * bcx
        if left != right:
            return 1 if left > right else -1
        left_error = _product_error(acx, bcy, left)
        right_error = _product_error(acy, bcx, right)
        return _sign(left_error - right_error)
    answer = 0
    while answer == 0:
        answer = _orient2d_integers((ax, ay, bx, by, cx, cy))
    return answer - 2


@part
def _sign(value):
    return (1 if value > 0 else 0) - (1 if value < 0 else 0)


@part
def _is_exact_difference(difference, a, b):
    """Whether ``difference = a - b`` is exact, and of a magnitude at which its products neither over- nor underflow."""
    if not (_SMALLEST_FACTOR < abs(difference) < _LARGEST_FACTOR):
        return False
    # Knuth's two-difference: the rounding error of a - b.
    b_virtual = a - difference
    a_virtual = difference + b_virtual
    return (b_virtual - b) + (a - a_virtual) == 0.0


@part
def _product_error(a, b, product):
    """The exact a * b - product (Dekker), for factors accepted by :func:`_is_exact_difference`."""
    a_high = _SPLITTER * a
    a_high = a_high - (a_high - a)
    b_high = _SPLITTER * b
    b_high = b_high - (b_high - b)
    a_low = a - a_high
    b_low = b - b_high
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _orientation_determinant(ax: Fraction, ay: Fraction, bx: Fraction, by: Fraction, cx: Fraction, cy: Fraction):
    return (ax - cx) * (by - cy) - (ay - cy) * (bx - cx)


@called_late("entreg_orient2d_integers", _orientation_determinant)
def _orient2d_integers(ax, ay, bx, by, cx, cy):
    coordinates = np.empty(6, np.float64)
    coordinates[0] = ax
    coordinates[1] = ay
    coordinates[2] = bx
    coordinates[3] = by
    coordinates[4] = cx
    coordinates[5] = cy
    mantissas, exponents, width = _decompose(coordinates)
    if width <= 29:
        for k in range(6):
            mantissas[k] <<= exponents[k]
        determinant = (mantissas[0] - mantissas[4]) * (mantissas[3] - mantissas[5]) - (mantissas[1] - mantissas[5]) * (
            mantissas[2] - mantissas[4]
        )
        return 2 + _sign(determinant)
    # |difference| < 2**(width + 1), so |determinant| < 2**(2 * width + 3); one more bit for the sign.
    limbs = (2 * width + 3) // _LIMB_BITS + 1
    fixed = np.zeros((8, limbs), np.uint64)
    for k in range(6):
        _load(fixed[k], mantissas[k], exponents[k])
    for k in range(2):
        _subtract(fixed[k], fixed[k], fixed[4 + k])
        _subtract(fixed[2 + k], fixed[2 + k], fixed[4 + k])
    _multiply_add(fixed[6], fixed[0], fixed[3])
    _multiply_add(fixed[7], fixed[1], fixed[2])
    _subtract(fixed[6], fixed[6], fixed[7])
    return 2 + _limbs_sign(fixed[6])


def compile_exact_stages() -> None:
    """Compile what decides the hardest cases, or load it from the cache, before there are any."""
    _orient2d_integers.pointer.compile()
    _incircle_integers.pointer.compile()


@kernel
def incircle_exact(ax, ay, bx, by, cx, cy, dx, dy):
    """The same as :func:`incircle` without the floating-point filter."""
    answer = 0
    while answer == 0:
        answer = _incircle_integers((ax, ay, bx, by, cx, cy, dx, dy))
    return answer - 2


def _incircle_determinant(*coordinates: Fraction) -> Fraction:
    *corners, dx, dy = coordinates
    ax, bx, cx = (x - dx for x in corners[::2])
    ay, by, cy = (y - dy for y in corners[1::2])
    bends = (ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy)
    return bends[0] * (bx * cy - cx * by) + bends[1] * (cx * ay - ax * cy) + bends[2] * (ax * by - bx * ay)


@called_late("entreg_incircle_integers", _incircle_determinant)
def _incircle_integers(ax, ay, bx, by, cx, cy, dx, dy):
    coordinates = np.empty(8, np.float64)
    coordinates[0] = ax
    coordinates[1] = ay
    coordinates[2] = bx
    coordinates[3] = by
    coordinates[4] = cx
    coordinates[5] = cy
    coordinates[6] = dx
    coordinates[7] = dy
    mantissas, exponents, width = _decompose(coordinates)
    if width <= 13:
        for k in range(8):
            mantissas[k] <<= exponents[k]
        adx = mantissas[0] - mantissas[6]
        ady = mantissas[1] - mantissas[7]
        bdx = mantissas[2] - mantissas[6]
        bdy = mantissas[3] - mantissas[7]
        cdx = mantissas[4] - mantissas[6]
        cdy = mantissas[5] - mantissas[7]
        determinant = (
            (adx * adx + ady * ady) * (bdx * cdy - cdx * bdy)
            + (bdx * bdx + bdy * bdy) * (cdx * ady - adx * cdy)
            + (cdx * cdx + cdy * cdy) * (adx * bdy - bdx * ady)
        )
        return 2 + _sign(determinant)
    # |difference| < 2**(width + 1); each of the three products of a lift and a minor is below 2**(4 * width + 6),
    # so |determinant| < 2**(4 * width + 8); one more bit for the sign.
    limbs = (4 * width + 8) // _LIMB_BITS + 1
    fixed = np.zeros((12, limbs), np.uint64)
    for k in range(8):
        _load(fixed[k], mantissas[k], exponents[k])
    for corner in range(3):
        for k in range(2):
            _subtract(fixed[2 * corner + k], fixed[2 * corner + k], fixed[6 + k])
    lift = fixed[6]
    minor = fixed[7]
    determinant_limbs = fixed[8]
    for corner in range(3):
        x, y = fixed[2 * corner], fixed[2 * corner + 1]
        following, last = (corner + 1) % 3, (corner + 2) % 3
        lift[:] = _ZERO
        _multiply_add(lift, x, x)
        _multiply_add(lift, y, y)
        fixed[9:12] = _ZERO
        _multiply_add(fixed[9], fixed[2 * following], fixed[2 * last + 1])
        _multiply_add(fixed[10], fixed[2 * last], fixed[2 * following + 1])
        _subtract(minor, fixed[9], fixed[10])
        _multiply_add(determinant_limbs, lift, minor)
    return 2 + _limbs_sign(determinant_limbs)


@part
def _decompose(coordinates):
    """Write each coordinate as mantissa * 2**(common + exponent) with integer mantissa and exponent >= 0.

    Returns:
        Mantissas (int64), exponents (int64) and the width: every |mantissa * 2**exponent| is below 2**width.
    """
    count = coordinates.shape[0]
    mantissas = np.zeros(count, np.int64)
    exponents = np.zeros(count, np.int64)
    common = 4096
    top = -4096
    for k in range(count):
        if coordinates[k] != 0.0:
            fraction, exponent = math.frexp(coordinates[k])
            mantissa = np.int64(fraction * 9007199254740992.0)
            # Without its trailing zeros the mantissa is odd and the common exponent as large as possible.
            _, lowest = math.frexp(float(mantissa & -mantissa))
            mantissas[k] = mantissa >> (lowest - 1)
            exponents[k] = exponent - 53 + (lowest - 1)
            common = min(common, exponents[k])
            top = max(top, exponent)
    for k in range(count):
        if mantissas[k] != 0:
            exponents[k] -= common
    return mantissas, exponents, max(top - common, 0)


# Integers of fixed length in two's complement, 32 bits per uint64 limb, lowest first. All arithmetic is modulo
# 2**(32 * limbs), which is exact when the length holds the result.


@part
def _load(out, mantissa, shift):
    """out = mantissa * 2**shift; ``out`` holds zeros."""
    magnitude = np.uint64(abs(mantissa))
    position = shift // _LIMB_BITS
    remainder = np.uint64(shift % _LIMB_BITS)
    low = (magnitude & _LIMB_MASK) << remainder
    high = ((magnitude >> _LIMB_SHIFT) << remainder) + (low >> _LIMB_SHIFT)
    limbs = out.shape[0]
    out[position] = low & _LIMB_MASK
    if position + 1 < limbs:
        out[position + 1] = high & _LIMB_MASK
    if position + 2 < limbs:
        out[position + 2] = high >> _LIMB_SHIFT
    if mantissa < 0:
        carry = _ONE
        for k in range(limbs):
            value = (out[k] ^ _LIMB_MASK) + carry
            out[k] = value & _LIMB_MASK
            carry = value >> _LIMB_SHIFT


@part
def _subtract(out, a, b):
    """out = a - b; ``out`` may be ``a`` or ``b``."""
    carry = _ONE
    for k in range(out.shape[0]):
        value = a[k] + (b[k] ^ _LIMB_MASK) + carry
        out[k] = value & _LIMB_MASK
        carry = value >> _LIMB_SHIFT


@part
def _multiply_add(out, a, b):
    """out += a * b; ``out`` is neither ``a`` nor ``b``."""
    limbs = out.shape[0]
    for i in range(limbs):
        factor = a[i]
        if factor != _ZERO:
            carry = _ZERO
            for j in range(limbs - i):
                value = factor * b[j] + out[i + j] + carry
                out[i + j] = value & _LIMB_MASK
                carry = value >> _LIMB_SHIFT


@part
def _limbs_sign(a):
    if a[a.shape[0] - 1] >> np.uint64(_LIMB_BITS - 1) != _ZERO:
        return -1
    for k in range(a.shape[0]):
        if a[k] != _ZERO:
            return 1
    return 0
