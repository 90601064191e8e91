"""Turning what a user passes as points into the array that the kernels read."""

from typing import Any

import numpy as np

from entreg.errors import InputError
from entreg.kernels import kernel

_FLOAT64 = np.dtype(np.float64)


def as_points(points: Any, minimum: int = 1) -> np.ndarray:
    """Return ``points`` as a C-contiguous, aligned float64 array of shape ``(n, 2)`` with the same values.

    An array that already has this form is returned without a copy (a read-only one as a writeable alias, because
    the kernels are compiled for one array type; no kernel writes to its input). Finiteness is not checked here:
    the kernels see every coordinate anyway, see :func:`require_finite`.

    Args:
        points: Array-like of shape ``(n, 2)``: NumPy array of any memory layout, CPU tensor, or nested sequence;
            floats or integers whose values float64 holds exactly.
        minimum: Smallest admissible ``n``.

    Returns:
        The ``(n, 2)`` float64 array.

    Raises:
        InputError: Wrong shape, too few rows, or values that are not real numbers representable in float64.
    """
    if type(points) is np.ndarray and points.dtype is _FLOAT64 and points.ndim == 2 and points.flags.carray:
        rows, columns = points.shape
        if columns == 2 and rows >= minimum:
            return points
    array = points if type(points) is np.ndarray else _to_array(points)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"Points must have shape (n, 2), but the shape is {array.shape}.")
    if array.shape[0] < minimum:
        raise InputError(
            f"At least {minimum} point{'s are' if minimum > 1 else ' is'} needed, but there are {array.shape[0]}."
        )
    if array.dtype != np.float64:
        array = _to_float64(array)
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned and array.dtype.isnative):
        array = np.array(array, dtype=np.float64, order="C")
    elif not flags.writeable:
        array = np.asarray(_WriteableAlias(array))
    return array


def require_finite(points: np.ndarray) -> None:
    """Raise if any coordinate is NaN or infinite.

    Args:
        points: Array of shape ``(n, 2)`` as returned by :func:`as_points`.

    Raises:
        InputError: Naming the first row with such a coordinate.
    """
    row = first_nonfinite_row(points)
    if row >= 0:
        raise nonfinite_error(points, row)


def nonfinite_error(points: np.ndarray, row: int) -> InputError:
    """The error for a NaN or infinite coordinate in ``row`` of ``points``, to be raised by the caller."""
    return InputError(f"Coordinates must be finite, but point {row} is ({points[row, 0]}, {points[row, 1]}).")


@kernel
def first_nonfinite_row(points):
    """Index of the first row of a ``(n, 2)`` float64 array with a NaN or infinite coordinate, -1 if there is none."""
    block = 4096
    n = points.shape[0]
    for start in range(0, n, block):
        stop = min(n, start + block)
        # x * 0 is 0 exactly for finite x and NaN otherwise; summing lanes keeps the loop free of branches.
        poison = 0.0
        for i in range(start, stop):
            if not (abs(points[i, 0]) < np.inf and abs(points[i, 1]) < np.inf):
                poison = np.nan
        if poison != 0.0:
            for i in range(start, stop):
                if not (np.isfinite(points[i, 0]) and np.isfinite(points[i, 1])):
                    return i
    return -1


class _WriteableAlias:
    """Shares the memory of a read-only array through the array interface, and keeps that array alive."""

    def __init__(self, array: np.ndarray):
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _to_array(points: Any) -> np.ndarray:
    if isinstance(points, np.ma.MaskedArray):
        raise InputError("Points must not be a masked array; drop or fill the masked points first.")
    if hasattr(points, "detach") and hasattr(points, "device"):
        return _tensor_to_array(points)
    try:
        return np.asarray(points)
    except (ValueError, TypeError) as error:
        raise InputError("Points must form a regular array of numbers of shape (n, 2).") from error


def _tensor_to_array(tensor: Any) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise InputError(f"Points must lie in CPU memory, but the tensor is on {tensor.device}; call .cpu() first.")
    if "strided" not in str(tensor.layout):
        raise InputError(f"Points must be a dense tensor, but the layout is {tensor.layout}; call .to_dense() first.")
    tensor = tensor.detach()
    if tensor.is_floating_point():
        # NumPy has no bfloat16; every floating dtype of a tensor converts to float64 exactly.
        tensor = tensor.double()
    return tensor.resolve_conj().resolve_neg().numpy()


def _to_float64(array: np.ndarray) -> np.ndarray:
    kind = array.dtype.kind
    if kind not in "fiu":
        raise InputError(f"Points must be real floats or integers, but the dtype is {array.dtype}.")
    if array.dtype.itemsize <= 4 or (kind == "f" and array.dtype.itemsize == 8):
        return array.astype(np.float64, order="C")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(np.float64, order="C")
        if kind == "f":
            exact = (converted == array) | ((array != array) & (converted != converted))
        else:
            # The limit keeps the conversion back within the integer type.
            limit = 2.0 ** (64 if kind == "u" else 63)
            inside = converted < limit
            exact = inside & (np.where(inside, converted, 0.0).astype(array.dtype) == array)
    if not exact.all():
        row = int(np.argmin(exact.all(axis=1)))
        raise InputError(f"Point {row} has a coordinate of dtype {array.dtype} that float64 cannot hold exactly.")
    return converted
