"""What the compiled loops of the sparse path share on a CPU: reading tensors of bfloat16, vectors of exponentials."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
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
    batch, heads, length, width = x.shape
    by_batch, by_head, by_token, step = x.stride()
    last = (batch - 1) * by_batch + (heads - 1) * by_head + (length - 1) * by_token + (width - 1) * step
    memory = x.detach().as_strided((max(last + 1, 0),), (1,)).view(INTEGERS[x.dtype])
    return memory.numpy(), by_batch, by_head, by_token


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


@intrinsic
def _prefetch(typing_context: Any, memory: Any, at: Any) -> Any:
    """Ask for the cache line that holds memory[at]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To be read; into the second level, which does not hold up what is read now; data.
        builder.call(function, [address, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(memory, types.intp), generate


@njit(cache=True, nogil=True, inline="always")
def prefetch(memory: np.ndarray, start: int, length: int) -> None:
    """Ask for numbers that will be read soon."""
    for i in range(start, start + length, 64 // memory.itemsize):
        _prefetch(memory, i)
