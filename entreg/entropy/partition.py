"""Shannon entropy of a partition given by the sizes of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from entreg.errors import InputError


def partition_entropy(counts: torch.Tensor | np.ndarray | Sequence[float]) -> Any:
    """Entropy ``sum_j (c_j / n) log(n / c_j)`` with ``n = sum_j c_j``, in nats (arXiv 2508.20489, section 1).

    Counts need not be integers: soft masses give the entropy of the soft partition. With ``w_j = c_j / max_i c_i``
    and ``s = sum_j w_j`` the value is computed as ``log s + sum_j w_j log(1 / w_j) / s``, where ``log s`` is taken
    by ``log1p`` of everything but the largest part. All terms are non-negative, so nothing cancels: the relative
    accuracy stays near machine precision even when one part holds almost everything, and counts near the largest
    float do not overflow.

    Args:
        counts: ``(..., parts)`` non-negative finite sizes, integers or floats, at least one of them positive in
            every row. Zeros are ignored; with torch their gradient is defined as 0.

    Returns:
        Nats, in ``[0, log parts]``, over the last axis. A tensor for a tensor (differentiable in the positive
        counts; integer counts give float64, half precision is computed in float32 and rounded once), a ``float``
        for a 1-D array or sequence, an array for a batch.

    Raises:
        InputError: no axis, an empty last axis, NaN, an infinite or negative count, or a row without any positive
            count.
    """
    if isinstance(counts, torch.Tensor):
        return _torch_entropy(counts)
    try:
        array = np.asarray(counts)
        if array.dtype.kind not in "biuf":
            raise TypeError
    except (TypeError, ValueError):
        raise InputError("counts must be real numbers in a rectangular array") from None
    array = array.astype(np.float64)
    _require_parts(array.shape)
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError("counts must be finite and non-negative")
    largest = array.max(axis=-1, keepdims=True)
    if (largest == 0).any():
        raise InputError("every row of counts needs at least one positive count")
    weights = array / largest
    rest = weights.copy()
    np.put_along_axis(rest, array.argmax(axis=-1, keepdims=True), 0.0, axis=-1)
    excess = rest.sum(axis=-1)
    # log 1 = 0 stands in for the ignored zeros.
    spread = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=-1)
    entropy = np.log1p(excess) + spread / (1.0 + excess)
    return float(entropy) if array.ndim == 1 else entropy


def _torch_entropy(counts: torch.Tensor) -> torch.Tensor:
    if counts.is_complex():
        raise InputError("counts must be real numbers, got a complex tensor")
    _require_parts(tuple(counts.shape))
    result_dtype = counts.dtype if counts.is_floating_point() else torch.float64
    working = torch.float32 if result_dtype in (torch.float16, torch.bfloat16) else result_dtype
    counts = counts.to(working)
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise InputError("counts must be finite and non-negative")
    # The entropy does not change with the common scale, so the scale needs no gradient.
    largest, index = counts.detach().max(dim=-1, keepdim=True)
    if bool((largest == 0).any()):
        raise InputError("every row of counts needs at least one positive count")
    weights = torch.where(counts > 0, counts, torch.zeros_like(counts)) / largest
    # Subtracting the constant 1 from the largest weight leaves exactly 0 there, and keeps its gradient.
    one_at_largest = torch.zeros_like(weights).scatter_(-1, index, 1.0)
    excess = (weights - one_at_largest).sum(dim=-1)
    positive = torch.where(weights > 0, weights, torch.ones_like(weights))
    spread = -(weights * positive.log()).sum(dim=-1)
    return (excess.log1p() + spread / (1.0 + excess)).to(result_dtype)


def _require_parts(shape: tuple[int, ...]) -> None:
    if not shape or shape[-1] == 0:
        raise InputError(f"counts need a non-empty last axis (the parts), got shape {shape}")
