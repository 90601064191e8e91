"""Softmax and sums over blocks of keys in one pass, by compiled loops on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from entreg.parallel import chunk_ranges, run_chunks
from entreg.sparse._loops import ANY_ORDER, INTEGERS, SHIFTS, exponentials, spare_threads, widen


def block_masses(logits: Tensor, visible: Tensor, block_size: int) -> Tensor:
    """Attention mass of every block of keys.

    Args:
        logits: (..., rows, keys) bfloat16 or float32, in one piece.
        visible: (rows,) int64: so many leading keys each row sees, in [1, keys].
        block_size: keys per block; the last block may be shorter.

    Returns:
        (..., rows, blocks) float32; each row sums to 1.
    """
    keys = logits.shape[-1]
    flat = logits.reshape(-1, keys).view(INTEGERS[logits.dtype]).numpy()
    seen = visible.repeat(len(flat) // len(visible)).numpy()
    out = torch.zeros(*logits.shape[:-1], -(-keys // block_size))
    masses = out.view(len(flat), -1).numpy()
    ranges = chunk_ranges(len(flat), spare_threads())
    shift = np.uint32(SHIFTS[logits.dtype])
    run_chunks(lambda first, last: _masses(flat, seen, shift, block_size, masses, first, last), ranges, len(ranges))
    return out


@njit(cache=True, nogil=True, fastmath=ANY_ORDER)
def _masses(logits, visible, shift, block_size, masses, first, last):
    keys = logits.shape[1]
    bits = np.empty(keys, np.uint32)
    values = bits.view(np.float32)
    exponents = np.empty(keys, np.int32)
    powers = exponents.view(np.float32)
    for row in range(first, last):
        length = visible[row]
        widen(logits[row], 0, length, shift, bits, 0)
        largest = values[0]
        for i in range(length):
            largest = max(largest, values[i])
        for i in range(length):
            values[i] -= largest
        exponentials(values, length, exponents, powers)
        total = np.float32(0.0)
        for block in range((length + block_size - 1) // block_size):
            mass = np.float32(0.0)
            for i in range(block * block_size, min(length, (block + 1) * block_size)):
                mass += values[i]
            masses[row, block] = mass
            total += mass
        inverse = np.float32(1.0) / total
        for block in range(masses.shape[1]):
            masses[row, block] *= inverse
