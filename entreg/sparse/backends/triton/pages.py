"""Decoding: pages chosen from their means, and attention of one query over lists of pages.

Four launches per layer: means brought up to date and logits of pages; the choice; attention over parts of the lists;
the parts put together. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from entreg.sparse.backends.triton.launch import (
    listed_blocks,
    multiprocessors,
    padded_width,
    power_of_two,
    rows_contiguous,
)
from entreg.sparse.backends.triton.selection import _highest
from entreg.sparse.counting import num_blocks
from entreg.sparse.plan import BlockLists, SparsityPlan

# Leading components of a page's last key by which a page is known again.
COMPARED = 8
_GROWTH = 1.25
_PAGES_PER_PROGRAM = 32
_KEYS_PER_TILE = 64
# Programs per multiprocessor, so that memory is kept busy.
_OCCUPANCY = 4
_MOST_SPLITS = 64

Buffers = tuple[Tensor, Tensor]


def chosen_pages(
    q: Tensor, k: Tensor, buffers: Buffers | None, page_size: int, count: int, scale: float, maximum: bool
) -> tuple[Tensor, BlockLists, Buffers]:
    """The pages of highest estimated mass, among them the first and the two latest.

    Args:
        q: (batch, heads, 1, d).
        k: (batch, key_heads, m, d).
        buffers: of the step before, or None: means (batch, key_heads, capacity, d) and beginnings of last keys.
        page_size: keys per page.
        count: pages per key head, at least 2.
        scale: factor of the logits.
        maximum: whether the largest mass among the heads that share a key head counts, or the mean.

    Returns:
        the plan's (batch, key_heads, 1, pages) mask, its lists, and buffers for the next step.
    """
    q, k = rows_contiguous(q), rows_contiguous(k)
    batch, heads, _, width = q.shape
    key_heads, m = k.shape[1:3]
    complete, total = m // page_size, num_blocks(m, page_size)
    means, last_keys = buffers = _with_room(buffers, k, complete)
    logits = torch.empty(batch, heads, complete, dtype=torch.float32, device=q.device)
    share = heads // key_heads
    _page_logits_kernel[(num_blocks(complete, _PAGES_PER_PROGRAM), batch * key_heads)](
        q,
        k,
        means,
        last_keys,
        logits,
        *q.stride()[:2],
        *k.stride()[:3],
        key_heads,
        complete,
        means.shape[2],
        scale * math.log2(math.e),
        SHARE=share,
        PADDED_SHARE=padded_width(share),
        PAGE=page_size,
        PAGES=_PAGES_PER_PROGRAM,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        COMPARED=last_keys.shape[3],
        num_warps=4,
    )
    chosen = torch.empty(batch, key_heads, 1, total, dtype=torch.bool, device=q.device)
    index = torch.empty(chosen.shape, dtype=torch.int32, device=q.device)
    lengths = torch.empty(batch, key_heads, 1, dtype=torch.int32, device=q.device)
    padded = power_of_two(total)
    _choose_pages_kernel[(batch * key_heads,)](
        logits,
        chosen.view(torch.uint8),
        index,
        lengths,
        complete,
        total,
        count,
        SHARE=share,
        MAXIMUM=maximum,
        COLUMNS=padded,
        num_warps=max(1, min(16, padded // 256)),
    )
    return chosen, BlockLists(index, lengths), buffers


def attend_pages(q: Tensor, k: Tensor, v: Tensor, plan: SparsityPlan, scale: float) -> Tensor:
    """Attention of one query over the plan's pages, read where they lie.

    Args:
        q: (batch, heads, 1, d), float16 or bfloat16.
        k: (batch, key_heads, m, d).
        v: (batch, key_heads, m, d_v).
        plan: causal blocks of one query.
        scale: factor of the logits, above 0.

    Returns:
        (batch, heads, 1, d_v).
    """
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    batch, heads, _, width = q.shape
    key_heads, m, value_width = k.shape[1], k.shape[2], v.shape[3]
    share, page = heads // key_heads, plan.block_size
    lists = listed_blocks(plan)
    tile = max(_KEYS_PER_TILE, page)
    wanted = num_blocks(_OCCUPANCY * multiprocessors(q.device), batch * key_heads)
    # The number of splits does not depend on the number of pages, which only the device knows.
    splits = power_of_two(max(1, min(_MOST_SPLITS, wanted, m // (4 * tile))))
    parts = torch.empty(batch * heads, splits, value_width, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch * heads, splits, dtype=torch.float32, device=q.device)
    _attend_pages_kernel[(splits, batch * key_heads)](
        q,
        k,
        v,
        lists.index,
        lists.lengths,
        parts,
        sums,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        key_heads,
        plan.plan_heads,
        m,
        plan.key_blocks,
        scale * math.log2(math.e),
        SHARE=share,
        PADDED_SHARE=padded_width(share),
        SPLITS=splits,
        PAGE=page,
        TILE=tile,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        VALUE_WIDTH=value_width,
        PADDED_VALUE_WIDTH=padded_width(value_width),
        num_warps=4,
        num_stages=3,
    )
    out = q.new_empty(batch, heads, 1, value_width)
    _combine_kernel[(batch * heads,)](
        parts,
        sums,
        out,
        SPLITS=splits,
        VALUE_WIDTH=value_width,
        PADDED_VALUE_WIDTH=padded_width(value_width),
        num_warps=4,
    )
    return out


def _with_room(buffers: Buffers | None, k: Tensor, complete: int) -> Buffers:
    """The buffers if they fit, or new ones, of which every page is computed anew because NaN equals nothing."""
    batch, heads, _, width = k.shape
    if buffers is not None:
        means = buffers[0]
        same = means.shape[:2] == (batch, heads) and means.shape[3] == width
        if same and means.dtype == k.dtype and means.device == k.device and means.shape[2] >= complete:
            return buffers
    room = int(complete * _GROWTH) + _PAGES_PER_PROGRAM
    compared = min(COMPARED, 1 << (width.bit_length() - 1))
    return k.new_empty(batch, heads, room, width), k.new_full((batch, heads, room, compared), math.nan)


@triton.jit(do_not_specialize=["complete", "room"])
def _page_logits_kernel(
    queries,
    keys,
    means,
    last_keys,
    logits,
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    key_heads,
    complete,
    room,
    scale,
    SHARE: tl.constexpr,
    PADDED_SHARE: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    COMPARED: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    real = page < complete
    feature = tl.arange(0, PADDED_WIDTH)
    beginning = tl.arange(0, COMPARED)
    image = group // key_heads
    key_head = group % key_heads
    first_key = keys + image * key_batch_stride + key_head * key_head_stride
    first_key = first_key + page[:, None].to(tl.int64) * PAGE * key_stride
    kept = group * room + page[:, None]
    # A page whose last key is another than when its mean was computed is computed anew.
    last = tl.load(first_key + (PAGE - 1) * key_stride + beginning[None, :], mask=real[:, None], other=0.0)
    known = tl.load(last_keys + kept * COMPARED + beginning[None, :], mask=real[:, None], other=0.0)
    differs = (tl.max((last != known).to(tl.int32), 1) > 0) & real
    inside = (feature < WIDTH)[None, :]
    mean = tl.load(means + kept * WIDTH + feature[None, :], mask=(real & (differs == 0))[:, None] & inside, other=0.0)
    if tl.max(differs.to(tl.int32), 0) > 0:
        total = tl.zeros([PAGES, PADDED_WIDTH], tl.float32)
        for place in range(0, PAGE):
            x = tl.load(first_key + place * key_stride + feature[None, :], mask=differs[:, None] & inside, other=0.0)
            total += x.to(tl.float32)
        mean += (total / PAGE).to(mean.dtype)
        tl.store(means + kept * WIDTH + feature[None, :], mean, mask=differs[:, None] & inside)
        tl.store(last_keys + kept * COMPARED + beginning[None, :], last, mask=differs[:, None])
    member = tl.arange(0, PADDED_SHARE)
    q = tl.load(
        queries
        + image * query_batch_stride
        + (key_head * SHARE + member[:, None]) * query_head_stride
        + feature[None, :],
        mask=(member < SHARE)[:, None] & inside,
        other=0.0,
    )
    x = tl.dot(q, tl.trans(mean), input_precision="ieee") * scale
    tl.store(
        logits + (group * SHARE + member[:, None]) * complete + page[None, :],
        x,
        mask=(member < SHARE)[:, None] & real[None, :],
    )


@triton.jit(do_not_specialize=["complete", "total", "count"])
def _choose_pages_kernel(
    logits,
    chosen,
    index,
    lengths,
    complete,
    total,
    count,
    SHARE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0)
    page = tl.arange(0, COLUMNS)
    result = tl.zeros([COLUMNS], tl.float32)
    for member in range(0, SHARE):
        begin = (group * SHARE + member).to(tl.int64) * complete
        x = tl.load(logits + begin + page, mask=page < complete, other=-float("inf"))
        x = tl.math.exp2(x - tl.max(x, 0))
        mass = x / tl.sum(x, 0)
        if MAXIMUM:
            result = tl.maximum(result, mass)
        else:
            result += mass / SHARE
    own = total - 1
    bits = result.to(tl.int32, bitcast=True)
    bits = tl.where(page == own - 1, 0x7F7FFFFE, bits)
    bits = tl.where(page == 0, 0x7F7FFFFF, bits)
    bits = tl.where(page == own, 0x7F800000, bits)
    bits = tl.where(page < total, bits, -1)
    kept = _highest(bits, tl.zeros_like(group) + count)
    tl.store(chosen + group.to(tl.int64) * total + page, kept.to(tl.uint8), mask=page < total)
    before = (kept & (page < own)).to(tl.int32)
    place = tl.cumsum(before, 0) - before
    tl.store(index + group.to(tl.int64) * total + place, page, mask=before > 0)
    tl.store(lengths + group, 2 * tl.sum(before, 0) + 1)


@triton.jit(do_not_specialize=["num_keys", "columns"])
def _attend_pages_kernel(
    queries,
    keys,
    values,
    index,
    lengths,
    parts,
    sums,
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    value_batch_stride,
    value_head_stride,
    value_stride,
    key_heads,
    plan_heads,
    num_keys,
    columns,
    scale,
    SHARE: tl.constexpr,
    PADDED_SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_VALUE_WIDTH: tl.constexpr,
):
    PAGES: tl.constexpr = TILE // PAGE
    split = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    image = group // key_heads
    key_head = group % key_heads
    plan_row = image * plan_heads + key_head % plan_heads
    feature = tl.arange(0, PADDED_WIDTH)
    value_feature = tl.arange(0, PADDED_VALUE_WIDTH)
    member = tl.arange(0, PADDED_SHARE)
    q = tl.load(
        queries
        + image * query_batch_stride
        + (key_head * SHARE + member[:, None]) * query_head_stride
        + feature[None, :],
        mask=(member < SHARE)[:, None] & (feature < WIDTH)[None, :],
        other=0.0,
    )
    length = tl.load(lengths + plan_row)
    before = length // 2
    pages = before + length % 2
    tiles = tl.cdiv(tl.cdiv(pages, PAGES), SPLITS)
    key = tl.arange(0, TILE)
    key_rows = keys + image * key_batch_stride + key_head * key_head_stride + feature[:, None]
    value_rows = values + image * value_batch_stride + key_head * value_head_stride + value_feature[None, :]
    largest = tl.full([PADDED_SHARE], -float("inf"), tl.float32)
    total = tl.zeros([PADDED_SHARE], tl.float32)
    mean = tl.zeros([PADDED_SHARE, PADDED_VALUE_WIDTH], tl.float32)
    for tile in range(split * tiles, tl.minimum(split * tiles + tiles, tl.cdiv(pages, PAGES))):
        slot = tile * PAGES + key // PAGE
        # The last of all is the query's own page.
        page = tl.load(index + plan_row * columns + slot, mask=slot < before, other=0)
        page = tl.where(slot < before, page, columns - 1)
        place = page.to(tl.int64) * PAGE + key % PAGE
        real = (slot < pages) & (place < num_keys)
        k = tl.load(key_rows + place[None, :] * key_stride, mask=real[None, :] & (feature < WIDTH)[:, None], other=0.0)
        logits = tl.where(real[None, :], tl.dot(q, k, input_precision="ieee") * scale, -float("inf"))
        # Every tile has a key: the first of its first page.
        highest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.math.exp2(logits - highest[:, None])
        decay = tl.math.exp2(largest - highest)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(
            value_rows + place[:, None] * value_stride,
            mask=real[:, None] & (value_feature < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        mean = tl.dot(weights.to(v.dtype), v, mean * decay[:, None], input_precision="ieee")
        largest = highest
    some = total > 0
    row = (group * SHARE + member) * SPLITS + split
    tl.store(
        parts + row[:, None] * VALUE_WIDTH + value_feature[None, :],
        mean / tl.where(some, total, 1.0)[:, None],
        mask=(member < SHARE)[:, None] & (value_feature < VALUE_WIDTH)[None, :],
    )
    tl.store(sums + row, largest + tl.math.log2(tl.where(some, total, 1.0)), mask=member < SHARE)


@triton.jit
def _combine_kernel(
    parts, sums, output, SPLITS: tl.constexpr, VALUE_WIDTH: tl.constexpr, PADDED_VALUE_WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    feature = tl.arange(0, PADDED_VALUE_WIDTH)
    x = tl.load(sums + row * SPLITS + split)
    highest = tl.max(x, 0)
    # Nothing seen at all: zeros.
    weights = tl.math.exp2(x - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    part = tl.load(
        parts + (row * SPLITS + split[:, None]) * VALUE_WIDTH + feature[None, :],
        mask=(feature < VALUE_WIDTH)[None, :],
        other=0.0,
    )
    mean = tl.sum(part * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + row * VALUE_WIDTH + feature, mean.to(output.dtype.element_ty), mask=feature < VALUE_WIDTH)
