"""Causal attention over a plan's blocks: one program per block of queries walks through its list of key blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from entreg.sparse.backends.triton.launch import listed_blocks, padded_width, rows_contiguous
from entreg.sparse.plan import SparsityPlan

# Rows of a tile of queries: two warp groups of tensor cores' 64.
_MOST_ROWS = 128
# Last rows of blocks of all heads come first: they may see everything, and the last program to start should be short.
_FIRST_ROWS = 2


@dataclass(frozen=True)
class Tiles:
    """How attention over blocks is cut into programs.

    Attributes:
        keys: keys that are looked at together; divides the block size.
        warps: per program.
        stages: of the pipeline that loads keys and values.
    """

    keys: int
    warps: int
    stages: int


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsityPlan, scale: float, tiles: Tiles | None = None
) -> Tensor:
    """Attention over the plan's blocks, without a copy of keys, a mask or waiting for the device.

    Args:
        q: (batch, heads, n, d), float16 or bfloat16.
        k: (batch, key_heads, m, d).
        v: (batch, key_heads, m, d_v).
        plan: causal blocks.
        scale: factor of the logits, above 0.
        tiles: None for those that suit the sizes.

    Returns:
        (batch, heads, n, d_v), its memory in the order (batch, n, heads, d_v). Rows without keys are zeros.
    """
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    batch, heads, n, width = q.shape
    key_heads, m, value_width = k.shape[1], k.shape[2], v.shape[3]
    share, size, rows = heads // key_heads, plan.block_size, plan.query_blocks
    first = (m - n) // size
    # Heads that read the same blocks fill a tile together where a block of queries is smaller than one.
    pack = math.gcd(share, _MOST_ROWS // size)
    tiles = _tiles(size, pack) if tiles is None else tiles
    lists = listed_blocks(plan)
    # As models go on with it: no copy after the transposition.
    out = q.new_empty(batch, n, heads, value_width).transpose(1, 2)
    groups = batch * heads // pack
    _attend_blocks_kernel[(groups * rows,)](
        q,
        k,
        v,
        out,
        lists.index,
        lists.lengths,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        n,
        m,
        rows,
        plan.key_blocks,
        first,
        plan.query_offset,
        groups,
        key_heads,
        plan.plan_heads,
        scale * math.log2(math.e),
        SHARE=share,
        PACK=pack,
        FIRST_ROWS=min(_FIRST_ROWS, rows),
        SIZE=size,
        KEYS=tiles.keys,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        VALUE_WIDTH=value_width,
        PADDED_VALUE_WIDTH=padded_width(value_width),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _tiles(size: int, pack: int) -> Tiles:
    # Measured on an H200: larger tiles of keys are worth more than a longer pipeline, more warps than needed less.
    if size == 128:
        return Tiles(keys=128, warps=8, stages=2)
    return Tiles(keys=min(size, 64), warps=8 if size * pack >= 128 else 4, stages=3)


@triton.jit
def _attend_blocks_kernel(
    queries,
    keys,
    values,
    output,
    index,
    lengths,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    value_batch_stride,
    value_head_stride,
    value_stride,
    output_batch_stride,
    output_head_stride,
    output_stride,
    num_queries,
    num_keys,
    rows,
    columns,
    first,
    query_offset,
    groups,
    key_heads,
    plan_heads,
    scale,
    SHARE: tl.constexpr,
    PACK: tl.constexpr,
    FIRST_ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_VALUE_WIDTH: tl.constexpr,
):
    PARTS: tl.constexpr = SIZE // KEYS
    PACKS: tl.constexpr = SHARE // PACK
    # After the first ones head by head, so that programs that run at once read the same keys.
    program = tl.program_id(0)
    if program < groups * FIRST_ROWS:
        group = program // FIRST_ROWS
        row = rows - 1 - program % FIRST_ROWS
    else:
        others = rows - FIRST_ROWS
        group = (program - groups * FIRST_ROWS) // others
        row = others - 1 - (program - groups * FIRST_ROWS) % others
    key_group = group // PACKS
    image = key_group // key_heads
    key_head = key_group % key_heads
    plan_row = (image * plan_heads + key_head % plan_heads) * rows + row
    image = image.to(tl.int64)

    member = tl.arange(0, PACK * SIZE)
    head = key_head * SHARE + (group % PACKS) * PACK + member // SIZE
    within = member % SIZE
    place = row * SIZE + within - query_offset
    exists = (place >= 0) & (place < num_queries)
    feature = tl.arange(0, PADDED_WIDTH)
    value_feature = tl.arange(0, PADDED_VALUE_WIDTH)
    key = tl.arange(0, KEYS)
    q = tl.load(
        queries
        + image * query_batch_stride
        + head[:, None].to(tl.int64) * query_head_stride
        + place[:, None].to(tl.int64) * query_stride
        + feature[None, :],
        mask=exists[:, None] & (feature < WIDTH)[None, :],
        other=0.0,
    )
    key_tile = (
        keys
        + image * key_batch_stride
        + key_head.to(tl.int64) * key_head_stride
        + key[None, :] * key_stride
        + feature[:, None]
    )
    value_tile = (
        values
        + image * value_batch_stride
        + key_head.to(tl.int64) * value_head_stride
        + key[:, None] * value_stride
        + value_feature[None, :]
    )
    largest = tl.full([PACK * SIZE], -float("inf"), tl.float32)
    total = tl.zeros([PACK * SIZE], tl.float32)
    mean = tl.zeros([PACK * SIZE, PADDED_VALUE_WIDTH], tl.float32)

    length = tl.load(lengths + plan_row)
    listed = index + plan_row.to(tl.int64) * columns
    # Blocks before a row's own are seen by all its queries, and are whole.
    for step in range(0, (length // 2) * PARTS):
        start = tl.load(listed + step // PARTS).to(tl.int64) * SIZE + (step % PARTS) * KEYS
        if WIDTH == PADDED_WIDTH:
            k = tl.load(key_tile + start * key_stride)
        else:
            k = tl.load(key_tile + start * key_stride, mask=(feature < WIDTH)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee")
        highest = tl.maximum(largest, tl.max(logits, 1) * scale)
        weights = tl.math.exp2(logits * scale - highest[:, None])
        decay = tl.math.exp2(largest - highest)
        total = total * decay + tl.sum(weights, 1)
        mean = mean * decay[:, None]
        if VALUE_WIDTH == PADDED_VALUE_WIDTH:
            v = tl.load(value_tile + start * value_stride)
        else:
            v = tl.load(value_tile + start * value_stride, mask=(value_feature < VALUE_WIDTH)[None, :], other=0.0)
        mean = tl.dot(weights.to(v.dtype), v, mean, input_precision="ieee")
        largest = highest

    # The row's own block, causal and perhaps cut short.
    for part in range(0, (length % 2) * PARTS):
        start = (row + first).to(tl.int64) * SIZE + part * KEYS
        real = start + key < num_keys
        k = tl.load(key_tile + start * key_stride, mask=real[None, :] & (feature < WIDTH)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where((part * KEYS + key)[None, :] <= within[:, None], logits, -float("inf"))
        highest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.math.exp2(logits - highest[:, None])
        decay = tl.math.exp2(largest - highest)
        total = total * decay + tl.sum(weights, 1)
        mean = mean * decay[:, None]
        v = tl.load(
            value_tile + start * value_stride,
            mask=real[:, None] & (value_feature < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        mean = tl.dot(weights.to(v.dtype), v, mean, input_precision="ieee")
        largest = highest

    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        output
        + image * output_batch_stride
        + head[:, None].to(tl.int64) * output_head_stride
        + place[:, None].to(tl.int64) * output_stride
        + value_feature[None, :],
        mean.to(output.dtype.element_ty),
        mask=exists[:, None] & (value_feature < VALUE_WIDTH)[None, :],
    )
