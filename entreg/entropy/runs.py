"""Entropy of the maximal monotone runs of a sequence: how sorted a list already is.

Sorting by merging runs takes O(n (1 + H)) comparisons, and no comparison sort can do better in the worst case over
all sequences with these run lengths (arXiv 2508.20489, section 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from entreg.entropy.partition import partition_entropy
from entreg.errors import InputError
from entreg.kernels import kernel


@kernel
def greedy_run_starts(values: np.ndarray, starts: np.ndarray) -> int:
    """Write the first index of every run into ``starts`` (at least ``len(values)`` long); return their number."""
    count = 0
    direction = 0
    for i in range(len(values)):
        if i == 0:
            starts[0] = 0
            count = 1
        elif values[i] > values[i - 1]:
            if direction < 0:
                starts[count] = i
                count += 1
                direction = 0
            else:
                direction = 1
        elif values[i] < values[i - 1]:
            if direction > 0:
                starts[count] = i
                count += 1
                direction = 0
            else:
                direction = -1
    return count


def run_boundaries(sequence: torch.Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    """Cut a sequence into maximal monotone runs of consecutive elements, in linear time.

    The paper speaks of maximal increasing or decreasing runs and leaves ties and the cutting rule open. Ours: a run
    is weakly monotone (equal neighbours never end it); it takes its direction from its first unequal pair; it is
    extended as far as that direction allows, and the next run starts at the first element that goes against it.
    Cut from left to right this way, the number of runs is the smallest possible.

    Args:
        sequence: ``(n,)`` real numbers, n at least 1; infinities are ordered as usual, NaN is refused. Integers are
            compared as integers.

    Returns:
        ``(runs + 1,)`` int64 offsets: run ``i`` is ``sequence[offsets[i]:offsets[i + 1]]``.

    Raises:
        InputError: not one-dimensional, empty, not real, or NaN.
    """
    values = _as_sequence(sequence)
    offsets = np.empty(len(values) + 1, dtype=np.int64)
    count = greedy_run_starts(values, offsets)
    offsets[count] = len(values)
    return offsets[: count + 1].copy()


def run_entropy(sequence: torch.Tensor | np.ndarray | Sequence[float]) -> float:
    """Entropy ``sum_i (|R_i| / n) log(n / |R_i|)`` of the maximal monotone runs ``R_i`` of a sequence, in nats.

    Formula: arXiv 2508.20489, section 1. The runs are those of :func:`run_boundaries`. A sorted sequence, in either
    direction, has entropy 0; a random permutation has ``log n`` less a constant.

    Args:
        sequence: ``(n,)`` real numbers, n at least 1, without NaN.

    Returns:
        Nats, in ``[0, log n]``.

    Raises:
        InputError: not one-dimensional, empty, not real, or NaN.
    """
    return partition_entropy(np.diff(run_boundaries(sequence)))


def _as_sequence(sequence: torch.Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    if isinstance(sequence, torch.Tensor):
        # numpy has no bfloat16; every half-precision value is exact in float32.
        half = sequence.dtype in (torch.float16, torch.bfloat16)
        sequence = sequence.detach().cpu().to(torch.float32 if half else sequence.dtype).numpy()
    try:
        values = np.asarray(sequence)
        if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
            raise TypeError
    except (TypeError, ValueError):
        raise InputError("a sequence must hold real numbers of at most 64 bits") from None
    if values.ndim != 1 or len(values) == 0:
        raise InputError(f"a sequence must be one-dimensional and not empty, got shape {values.shape}")
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            raise InputError("a sequence must not contain NaN, which has no place in an order")
        return np.ascontiguousarray(values, dtype=np.float64)
    return np.ascontiguousarray(values, dtype=np.uint64 if values.dtype.kind == "u" else np.int64)
