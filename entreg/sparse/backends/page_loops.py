"""A decoding step on a CPU: pages are ranked, chosen and read in place, by compiled loops.

PyTorch has no operator that reads scattered pages: they are copied first, which touches every chosen key three times,
and a chain of small operators costs more than the arithmetic in it. The loops here read every page once. They compute
what :mod:`entreg.sparse.backends.pages` and :func:`entreg.sparse.decoder.decoding.decoder_plan` compute otherwise, in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from entreg.parallel import chunk_ranges
from entreg.sparse.backends.loops import ANY_ORDER, INTEGERS, SHIFTS, exponentials, flat_memory, prefetch, widen
from entreg.sparse.backends.recording import record_kernel
from entreg.sparse.backends.team import run_in_team, team_size

# Numbers of keys times d below which a second thread costs more than it saves.
_WORTH_A_THREAD = 1 << 18


def choose_pages(
    q: Tensor,
    means: Tensor,
    total: int | np.ndarray,
    count: int | np.ndarray,
    scale: float,
    maximum: bool,
    complete: int | np.ndarray | None = None,
) -> Tensor:
    """The pages of highest attention mass: the last, the first, the last but one, and the best of the others.

    Numbers of pages are the same for all sequences or (batch,) int64.

    Args:
        q: (batch, heads, 1, d).
        means: (batch, key_heads, pages, d) of the complete pages.
        total: pages, the incomplete one included.
        count: pages chosen, in [1, total].
        scale: factor of the logits.
        maximum: of the query heads that share a key head the largest mass counts, otherwise the mean.
        complete: complete pages; as many as there are means by default.

    Returns:
        (batch, key_heads, 1, largest total) bool.
    """
    batch, heads, _, width = q.shape
    key_heads = means.shape[1]
    tasks = batch * key_heads
    complete = means.shape[2] if complete is None else complete
    numbers = np.empty((3, batch), np.int64)
    numbers[0], numbers[1], numbers[2] = total, complete, count
    chosen = torch.zeros(tasks, int(numbers[0].max()), dtype=torch.bool)
    arguments = (
        q.reshape(tasks, -1).float().numpy(),
        *flat_memory(means),
        np.uint32(SHIFTS[means.dtype]),
        numbers,
        np.float32(scale),
        maximum,
        key_heads,
        heads // key_heads,
        width,
        chosen.numpy(),
    )
    _in_threads(_choose, arguments, tasks, means[..., 0].numel() * width)
    return chosen.view(batch, key_heads, 1, -1)


def attend_chosen_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    size: int,
    scale: float,
    first_keys: Sequence[int] | None = None,
) -> Tensor:
    """Attention of one query over whole pages, read in place.

    Args:
        q: (batch, heads, 1, d).
        k: (batch, key_heads, m, d).
        v: (batch, key_heads, m, d_v).
        chosen: (batch, key_heads or 1, 1, pages) bool; without a page the output is 0.
        size: keys per page.
        scale: factor of the logits.
        first_keys: where the pages of each sequence begin; None for 0.

    Returns:
        (batch, heads, 1, d_v).
    """
    record_kernel("loops")
    batch, heads, _, width = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    tasks, share, value_width = batch * key_heads, heads // key_heads, v.shape[3]
    mask = chosen.expand(batch, key_heads, 1, -1).reshape(tasks, -1).numpy()
    out = torch.empty(tasks, share * value_width)
    arguments = (
        q.reshape(tasks, -1).float().numpy(),
        *flat_memory(k),
        *flat_memory(v),
        np.uint32(SHIFTS[q.dtype]),
        mask,
        _starts(first_keys, batch),
        size,
        m,
        np.float32(scale),
        key_heads,
        share,
        width,
        value_width,
        out.numpy(),
    )
    _in_threads(_attend, arguments, tasks, int(np.count_nonzero(mask)) * size * width)
    return out.view(batch, heads, 1, value_width).to(q.dtype)


def _in_threads(function: Callable[..., None], arguments: tuple, tasks: int, work: int) -> None:
    """Call a loop for the ranges of its tasks, in as many threads as there are and the work is worth."""
    parts = min(team_size(), tasks, 1 + work // _WORTH_A_THREAD)
    run_in_team(lambda first, last: function(*arguments, first, last), chunk_ranges(tasks, parts))


def _starts(first_keys: Sequence[int] | None, batch: int) -> np.ndarray:
    return np.zeros(batch, np.int64) if first_keys is None else np.array(first_keys, np.int64)


def known_pages(
    k: Tensor, last_keys: Tensor, size: int, pages: np.ndarray, first_keys: Sequence[int] | None = None
) -> np.ndarray:
    """Number of leading pages of each sequence whose last keys begin as they did before, in all heads.

    Args:
        k: (batch, key_heads, m, d).
        last_keys: (batch, key_heads, pages, components) of k's dtype.
        size: keys per page.
        pages: (batch,) int64, how many pages of each sequence to compare.
        first_keys: where the pages of each sequence begin; None for 0.

    Returns:
        (batch,) int64, at most ``pages``.
    """
    known = pages.copy()
    _known(*flat_memory(k), last_keys.view(INTEGERS[k.dtype]).numpy(), size, _starts(first_keys, len(k)), known)
    return known


@njit(cache=True, nogil=True)
def _known(memory, stride_b, stride_h, stride_m, last_keys, size, first_keys, known):
    batch, heads, _, components = last_keys.shape
    for b in range(batch):
        for h in range(heads):
            for page in range(known[b]):
                start = b * stride_b + h * stride_h + (first_keys[b] + (page + 1) * size - 1) * stride_m
                for i in range(components):
                    if memory[start + i] != last_keys[b, h, page, i]:
                        known[b] = page
                        break
                if known[b] == page:
                    break


@njit(cache=True, nogil=True, fastmath=ANY_ORDER)
def _choose(
    q,
    memory,
    stride_b,
    stride_h,
    stride_m,
    shift,
    numbers,
    scale,
    maximum,
    key_heads,
    share,
    d,
    chosen,
    first,
    last,
):
    most = chosen.shape[1]
    bits = np.empty(d, np.uint32)
    mean = bits.view(np.float32)
    logits = np.empty((share, most), np.float32)
    exponents = np.empty(most, np.int32)
    powers = exponents.view(np.float32)
    memory_of_scores = np.empty(most, np.float32)
    highest = np.finfo(np.float32).max
    for task in range(first, last):
        sequence = task // key_heads
        total, complete, count = numbers[0, sequence], numbers[1, sequence], numbers[2, sequence]
        if count == total:
            chosen[task, :total] = True
            continue
        scores = memory_of_scores[:total]
        start = sequence * stride_b + task % key_heads * stride_h
        for page in range(complete):
            widen(memory, start + page * stride_m, d, shift, bits, 0)
            for g in range(share):
                query = q[task, g * d : (g + 1) * d]
                dot = np.float32(0.0)
                for i in range(d):
                    dot += query[i] * mean[i]
                logits[g, page] = dot * scale
        scores[:] = 0.0
        for g in range(share):
            row = logits[g]
            largest = np.float32(-np.inf)
            for page in range(complete):
                largest = max(largest, row[page])
            for page in range(complete):
                row[page] -= largest
            exponentials(row, complete, exponents, powers)
            mass = np.float32(0.0)
            for page in range(complete):
                mass += row[page]
            for page in range(complete):
                one = row[page] / mass
                scores[page] = max(scores[page], one) if maximum else scores[page] + one
        # Where the budget does not hold all that is always kept, later lines come first.
        scores[max(total - 2, 0)] = highest / np.float32(2.0)
        scores[0] = highest
        scores[total - 1] = np.float32(np.inf)
        least = np.partition(scores, total - count)[total - count]
        left = count
        for page in range(total):
            if scores[page] > least:
                chosen[task, page] = True
                left -= 1
        for page in range(total):
            if left > 0 and scores[page] == least:
                chosen[task, page] = True
                left -= 1


@njit(cache=True, nogil=True, fastmath=ANY_ORDER)
def _attend(
    q, keys, key_b, key_h, key_m, values, value_b, value_h, value_m, shift, mask, first_keys, size, m, scale, key_heads,
    share, d, d_v, out, first, last,
):  # fmt: skip
    key_bits, value_bits = np.empty(size * d, np.uint32), np.empty(size * d_v, np.uint32)
    key_rows, value_rows = key_bits.view(np.float32), value_bits.view(np.float32)
    exponents = np.empty(size, np.int32)
    powers = exponents.view(np.float32)
    weights = np.empty(size, np.float32)
    queries, sums = np.empty(share * d, np.float32), np.empty(share * d_v, np.float32)
    largest, mass = np.empty(share, np.float32), np.empty(share, np.float32)
    for task in range(first, last):
        key_start = task // key_heads * key_b + task % key_heads * key_h
        value_start = task // key_heads * value_b + task % key_heads * value_h
        begin = first_keys[task // key_heads]
        for i in range(share * d):
            queries[i] = q[task, i] * scale
        sums[:] = 0.0
        mass[:] = 0.0
        largest[:] = np.finfo(np.float32).min
        for page in range(mask.shape[1]):
            if not mask[task, page]:
                continue
            # Chosen pages lie apart: while this one is worked on, the next one is fetched.
            following = page + 1
            while following < mask.shape[1] and not mask[task, following]:
                following += 1
            for place in range(begin + following * size, min(begin + (following + 1) * size, m)):
                prefetch(keys, key_start + place * key_m, d)
                prefetch(values, value_start + place * value_m, d_v)
            rows = min(size, m - begin - page * size)
            for r in range(rows):
                place = begin + page * size + r
                widen(keys, key_start + place * key_m, d, shift, key_bits, r * d)
                widen(values, value_start + place * value_m, d_v, shift, value_bits, r * d_v)
            for g in range(share):
                query, total = queries[g * d : (g + 1) * d], sums[g * d_v : (g + 1) * d_v]
                highest = largest[g]
                for r in range(rows):
                    row = key_rows[r * d : (r + 1) * d]
                    dot = np.float32(0.0)
                    for i in range(d):
                        dot += query[i] * row[i]
                    weights[r] = dot
                    highest = max(highest, dot)
                if highest > largest[g]:
                    # What was summed up so far was relative to a smaller maximum.
                    shrink = np.float32(math.exp(largest[g] - highest))
                    largest[g] = highest
                    mass[g] *= shrink
                    for i in range(d_v):
                        total[i] *= shrink
                for r in range(rows):
                    weights[r] -= highest
                exponentials(weights, rows, exponents, powers)
                for r in range(rows):
                    weight = weights[r]
                    mass[g] += weight
                    row = value_rows[r * d_v : (r + 1) * d_v]
                    for i in range(d_v):
                        total[i] += weight * row[i]
        for g in range(share):
            # Without a page there is nothing to weigh.
            inverse = np.float32(1.0) / max(mass[g], np.finfo(np.float32).tiny)
            for i in range(d_v):
                out[task, g * d_v + i] = sums[g * d_v + i] * inverse
