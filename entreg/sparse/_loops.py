"""What the compiled loops of the sparse path share on a CPU: reading tensors of bfloat16, vectors of exponentials."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Sums in any order: what lets them be computed in vector registers. Infinities and NaN keep their meaning.
ANY_ORDER = {"reassoc", "contract", "arcp", "nsz", "afn"}
# bfloat16 is the upper half of float32.
SHIFTS = {torch.bfloat16: 16, torch.float32: 0}
INTEGERS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}


def serves(*tensors: Tensor) -> bool:
    """Whether the loops can take these tensors; all others take the operators."""
    dtype = tensors[0].dtype
    return (
        all(one.device.type == "cpu" and one.dtype == dtype and one.stride(-1) == 1 for one in tensors)
        and dtype in SHIFTS
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


def flat_memory(x: Tensor) -> tuple[np.ndarray, int, int, int]:
    """The memory of x (batch, heads, length, d) as integers of its width, and its three strides."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    memory = x.detach().as_strided((max(extent, 0),), (1,)).view(INTEGERS[x.dtype])
    return memory.numpy(), *x.stride()[:3]


@njit(cache=True, nogil=True, fastmath=ANY_ORDER, inline="always")
def widen(memory: np.ndarray, start: int, length: int, shift: np.uint32, bits: np.ndarray, at: int) -> None:
    """Numbers as the bits of float32."""
    source, target = memory[start : start + length], bits[at : at + length]
    for i in range(length):
        target[i] = np.uint32(source[i]) << shift


@njit(cache=True, nogil=True, fastmath=ANY_ORDER, inline="always")
def exponentials(x: np.ndarray, length: int, exponents: np.ndarray, powers: np.ndarray) -> None:
    """exp of numbers up to 0, in place, to 2e-7: 2^whole by its bits (``powers`` are those of ``exponents``)."""
    for i in range(length):
        y = max(x[i] * np.float32(math.log2(math.e)), np.float32(-126.0))
        whole = np.floor(y)
        f = y - whole
        exponents[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        p = np.float32(1.8775767e-3)
        p = p * f + np.float32(8.9893397e-3)
        p = p * f + np.float32(5.5826318e-2)
        p = p * f + np.float32(2.4015361e-1)
        p = p * f + np.float32(6.9315308e-1)
        x[i] = p * f + np.float32(9.9999994e-1)
    for i in range(length):
        x[i] *= powers[i]
