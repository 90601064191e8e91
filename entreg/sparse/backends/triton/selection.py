"""Which blocks of keys a prompt's blocks of queries need, without a temporary of all score entries.

The estimates are those of :mod:`entreg.sparse.decoder.selection`; what differs is where they are computed. Logits
between rows (sampled queries, or means of queries) and keys (or means of keys) stay in registers: of every row and
block of keys only the logarithm of the summed exponentials is written. From these come the attention masses, and from
there on all is of the size of the plan. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from entreg.sparse.backends.triton.entries import KEYS_PER_PROGRAM, KEYS_PER_TILE, ROWS_PER_TILE
from entreg.sparse.backends.triton.launch import padded_width, power_of_two, rows_contiguous
from entreg.sparse.config import DecoderSparsity
from entreg.sparse.counting import num_blocks, query_offset
from entreg.sparse.plan import BlockLists

_BISECTIONS = 50
_POOLS_PER_PROGRAM = 16


def estimated_blocks(q: Tensor, k: Tensor, sparsity: DecoderSparsity, count: int, scale: float) -> Tensor:
    """Estimated attention mass of every pair of blocks; as :func:`entreg.sparse.decoder.selection.block_scores`.

    Args:
        q: (batch, heads, n, d).
        k: (batch, key_heads, m, d), m >= n.
        sparsity: with selection ``validated``, ``pooled`` or ``sampled``.
        count: key blocks per row of the plan's uniform budget.
        scale: factor of the logits, above 0.

    Returns:
        (batch, key_heads, query_blocks, key_blocks) float32. What no query sees has any value.
    """
    q, k = rows_contiguous(q), rows_contiguous(k)
    sampled = pooled = None
    if sparsity.selection in ("sampled", "validated"):
        number, maximum = sparsity.num_sampled_queries, sparsity.group_reduction == "max"
        sampled = _masses(q, k, sparsity, q.shape[2], k.shape[2], scale, parts=number, pool=1, maximum=maximum)
    if sparsity.selection in ("pooled", "validated"):
        n, m, pool = q.shape[2], k.shape[2], sparsity.pool_size
        offset = query_offset(n, m, sparsity.block_size, True)
        means = (_pool_means(q, sparsity, offset), _pool_means(k, sparsity, 0))
        pooled = _masses(*means, sparsity, n, m, scale, parts=sparsity.block_size // pool, pool=pool, maximum=False)
    if sampled is None:
        return pooled
    return _compared(sampled, pooled, sparsity, count, (k.shape[2] - q.shape[2]) // sparsity.block_size)


def shared_counts(estimated: Tensor, density: float, first: int, least: int, densities: Sequence[float]) -> Tensor:
    """Key blocks per row by entropy; as :func:`entreg.sparse.decoder.selection.counts_by_entropy`.

    Args:
        estimated: (batch, key_heads, query_blocks, key_blocks) float32.
        density: that is not exceeded.
        first: key block of the first row of blocks.
        least: fewest blocks per row.
        densities: for 1, 2, ... key blocks per row the density that they have.

    Returns:
        (batch, key_heads) int32.
    """
    batch, heads, rows, columns = estimated.shape
    support = estimated.new_empty(batch, heads, rows)
    padded = power_of_two(columns)
    _support_kernel[(batch * heads * rows,)](
        estimated, support, rows, columns, first, COLUMNS=padded, num_warps=_warps(padded)
    )
    # The wanted density as the last entry: a number among the kernel's arguments would be float32.
    table = torch.tensor([*densities, density], dtype=torch.float64)
    if estimated.is_cuda:
        # Pinned, so that nobody waits for the copy.
        table = table.pin_memory().to(estimated.device, non_blocking=True)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=estimated.device)
    _share_kernel[(batch,)](
        support.double().mean(-1),
        table,
        counts,
        heads,
        least,
        len(densities),
        HEADS=power_of_two(heads),
        BISECTIONS=_BISECTIONS,
        num_warps=1,
    )
    return counts


def kept_blocks(
    estimated: Tensor, counts: int | Tensor, first: int, local_blocks: int, dense_tail_blocks: int
) -> tuple[Tensor, BlockLists]:
    """The blocks of highest score in every row, with those that are always kept among them.

    Args:
        estimated: (batch, heads, query_blocks, key_blocks) float32, non-negative.
        counts: key blocks per row, or int32 (batch, heads).
        first: key block of the first row of blocks.
        local_blocks: blocks before each row's own that are kept before all but the sink and the row's own.
        dense_tail_blocks: rows at the end that keep everything.

    Returns:
        the plan's mask, of the shape of ``estimated``, and its lists.
    """
    batch, heads, rows, columns = estimated.shape
    index = torch.empty(estimated.shape, dtype=torch.int32, device=estimated.device)
    lengths = torch.empty(estimated.shape[:3], dtype=torch.int32, device=estimated.device)
    chosen = torch.empty(estimated.shape, dtype=torch.bool, device=estimated.device)
    padded = power_of_two(columns)
    uniform = isinstance(counts, int)
    _keep_kernel[(batch * heads * rows,)](
        estimated,
        estimated if uniform else counts,
        chosen.view(torch.uint8),
        index,
        lengths,
        *estimated.stride(),
        counts if uniform else 0,
        heads,
        rows,
        columns,
        first,
        rows - dense_tail_blocks,
        UNIFORM=uniform,
        LOCAL=local_blocks,
        COLUMNS=padded,
        num_warps=_warps(padded),
    )
    return chosen, BlockLists(index, lengths)


def _warps(columns: int) -> int:
    # One warp needs no barriers for its sums, as long as a row fits its registers.
    return max(1, min(8, columns // 1024))


def _pool_means(x: Tensor, sparsity: DecoderSparsity, offset: int) -> Tensor:
    """(batch, heads, pools, d) means of pools in whole blocks, in the dtype of x; 0 for pools without a token."""
    batch, heads, length, width = x.shape
    pools = num_blocks(length + offset, sparsity.block_size) * (sparsity.block_size // sparsity.pool_size)
    means = x.new_empty(batch, heads, pools, width)
    _pool_kernel[(num_blocks(pools, _POOLS_PER_PROGRAM), batch * heads)](
        x,
        means,
        *x.stride()[:3],
        heads,
        length,
        pools,
        offset,
        POOL=sparsity.pool_size,
        POOLS=_POOLS_PER_PROGRAM,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        num_warps=4,
    )
    return means


def _masses(
    rows: Tensor,
    keys: Tensor,
    sparsity: DecoderSparsity,
    n: int,
    m: int,
    scale: float,
    *,
    parts: int,
    pool: int,
    maximum: bool,
) -> Tensor:
    """Mean attention of rows to blocks, reduced over the heads that share a key head.

    Args:
        rows: (batch, heads, n, d) queries of which ``parts`` per block are taken, or their means over pools.
        keys: (batch, key_heads, m, d), or their means over pools.
        sparsity: of the plan.
        n: queries.
        m: keys.
        scale: factor of the logits.
        parts: rows per block.
        pool: tokens per row and key; 1 takes samples.
        maximum: whether the largest of the heads that share a key head counts, or the mean.

    Returns:
        (batch, key_heads, query_blocks, key_blocks) float32.
    """
    batch, heads, _, width = rows.shape
    key_heads, size = keys.shape[1], sparsity.block_size
    offset, first = query_offset(n, m, size, True), (m - n) // size
    blocks, columns = num_blocks(n + offset, size), num_blocks(m, size)
    sums = torch.empty(batch, heads, blocks * parts, columns, dtype=torch.float32, device=rows.device)
    per_block = size // pool
    # Blocks that make a tile on their own need no regrouping.
    tile_keys = per_block if per_block >= 64 else KEYS_PER_TILE
    per_program = max(KEYS_PER_PROGRAM, tile_keys)
    tile_rows = ROWS_PER_TILE
    grid = (num_blocks(blocks * parts, tile_rows), num_blocks(min(keys.shape[2], num_blocks(m, pool)), per_program))
    _sum_kernel[(*grid, batch * heads)](
        rows,
        keys,
        sums,
        *rows.stride()[:3],
        *keys.stride()[:3],
        heads,
        heads // key_heads,
        blocks * parts,
        columns,
        n,
        m,
        first,
        offset,
        scale * math.log2(math.e),
        SIZE=size,
        POOL=pool,
        PARTS=parts,
        PER_BLOCK=per_block,
        ROWS=tile_rows,
        KEYS=tile_keys,
        KEYS_PER_PROGRAM=per_program,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        num_warps=8,
        num_stages=2,
    )
    masses = torch.empty(batch, key_heads, blocks, columns, dtype=torch.float32, device=rows.device)
    padded = power_of_two(columns)
    _mass_kernel[(batch * key_heads * blocks,)](
        sums,
        masses,
        blocks,
        columns,
        n,
        first,
        offset,
        SHARE=heads // key_heads,
        PARTS=parts,
        POOL=pool,
        MAXIMUM=maximum,
        COLUMNS=padded,
        num_warps=_warps(padded),
    )
    return masses


def _compared(sampled: Tensor, pooled: Tensor | None, sparsity: DecoderSparsity, count: int, first: int) -> Tensor:
    """Samples shared with neighbours; with pooled estimates the better of the two for every head and stretch."""
    batch, heads, rows, columns = sampled.shape
    padded = power_of_two(columns)
    estimated = torch.empty_like(sampled)
    hits = sampled.new_empty(batch, heads, rows, 2)
    _neighbour_kernel[(batch * heads * rows,)](
        sampled,
        sampled if pooled is None else pooled,
        estimated,
        hits,
        rows,
        columns,
        first,
        # The sink and the row's own block are kept in any case.
        max(count - 2, 1),
        DIAGONAL=sparsity.diagonal_radius,
        COLUMN=sparsity.column_radius,
        VALIDATED=pooled is not None,
        COLUMNS=padded,
        num_warps=_warps(padded),
    )
    if pooled is not None:
        radius = sparsity.validation_radius
        _decide_kernel[(batch * heads * rows,)](
            sampled,
            pooled,
            estimated,
            hits,
            rows,
            columns,
            sparsity.validation_margin,
            RADIUS=radius,
            STRETCH=power_of_two(2 * radius + 1),
            COLUMNS=padded,
            num_warps=_warps(padded),
        )
    return estimated


@triton.jit
def _pool_kernel(
    tokens,
    means,
    batch_stride,
    head_stride,
    token_stride,
    heads,
    length,
    pools,
    offset,
    POOL: tl.constexpr,
    POOLS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    head = tl.program_id(1)
    pool = tl.program_id(0) * POOLS + tl.arange(0, POOLS)
    feature = tl.arange(0, PADDED_WIDTH)
    begin = tokens + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    total = tl.zeros([POOLS, PADDED_WIDTH], tl.float32)
    number = tl.zeros([POOLS], tl.float32)
    # One token of every pool at a time: nothing is exchanged between threads, and all loads can be under way at once.
    for member in tl.static_range(0, POOL):
        place = pool * POOL + member - offset
        real = (place >= 0) & (place < length)
        total += tl.load(
            begin + place[:, None].to(tl.int64) * token_stride + feature[None, :],
            mask=real[:, None] & (feature < WIDTH)[None, :],
            other=0.0,
        ).to(tl.float32)
        number += real.to(tl.float32)
    mean = total / tl.maximum(number, 1.0)[:, None]
    tl.store(
        means + (head.to(tl.int64) * pools + pool[:, None]) * WIDTH + feature[None, :],
        mean.to(means.dtype.element_ty),
        mask=(pool < pools)[:, None] & (feature < WIDTH)[None, :],
    )


@triton.jit
def _sum_kernel(
    rows,
    keys,
    sums,
    row_batch_stride,
    row_head_stride,
    row_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    heads,
    share,
    num_rows,
    columns,
    num_queries,
    num_keys,
    first,
    offset,
    scale,
    SIZE: tl.constexpr,
    POOL: tl.constexpr,
    PARTS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_PER_PROGRAM: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    # log2 of the sum of exponentials over every block of keys.
    head = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    if POOL == 1:
        # Evenly spaced in each block; blocks that are cut short repeat their nearest query.
        place = (row // PARTS) * SIZE + ((2 * (row % PARTS) + 1) * SIZE) // (2 * PARTS) - offset
        place = tl.minimum(tl.maximum(place, 0), num_queries - 1)
        last = place + (num_keys - num_queries)
    else:
        place = row
        last = row + first * PER_BLOCK
    pools = (num_keys + POOL - 1) // POOL
    last = tl.where(exists, tl.minimum(last, pools - 1), -1)
    begin = tl.program_id(1) * KEYS_PER_PROGRAM
    end = tl.minimum(begin + KEYS_PER_PROGRAM, tl.max(last, 0) + 1)
    if begin < end:
        feature = tl.arange(0, PADDED_WIDTH)
        key = tl.arange(0, KEYS)
        image = (head // heads).to(tl.int64)
        inner = (head % heads).to(tl.int64)
        q = tl.load(
            rows
            + image * row_batch_stride
            + inner * row_head_stride
            + place[:, None].to(tl.int64) * row_stride
            + feature[None, :],
            mask=exists[:, None] & (feature < WIDTH)[None, :],
            other=0.0,
        )
        key_rows = keys + image * key_batch_stride + (inner // share) * key_head_stride + feature[:, None]
        out = sums + (head.to(tl.int64) * num_rows + row[:, None]) * columns
        block = tl.arange(0, KEYS // PER_BLOCK)
        for start in range(begin, end, KEYS):
            k = tl.load(
                key_rows + (start + key)[None, :].to(tl.int64) * key_stride,
                mask=(start + key < pools)[None, :] & (feature < WIDTH)[:, None],
                other=0.0,
            )
            logits = tl.dot(q, k, input_precision="ieee") * scale
            if POOL > 1:
                # A pool of few keys receives less.
                number = tl.minimum(num_keys - (start + key) * POOL, POOL)
                logits += tl.math.log2(tl.maximum(number, 1).to(tl.float32))[None, :]
            logits = tl.where((start + key)[None, :] <= last[:, None], logits, -float("inf"))
            if KEYS == PER_BLOCK:
                highest = tl.max(logits, 1)
                highest = tl.where(highest == -float("inf"), 0.0, highest)
                total = highest + tl.math.log2(tl.sum(tl.math.exp2(logits - highest[:, None]), 1))
                tl.store(out + start // KEYS, total[:, None], mask=exists[:, None])
            else:
                grouped = tl.reshape(logits, (ROWS, KEYS // PER_BLOCK, PER_BLOCK))
                highest = tl.max(grouped, 2)
                highest = tl.where(highest == -float("inf"), 0.0, highest)
                total = highest + tl.math.log2(tl.sum(tl.math.exp2(grouped - highest[:, :, None]), 2))
                column = start // PER_BLOCK + block
                tl.store(out + column[None, :], total, mask=exists[:, None] & (column < columns)[None, :])


@triton.jit
def _mass_kernel(
    sums,
    masses,
    blocks,
    columns,
    num_queries,
    first,
    offset,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
    POOL: tl.constexpr,
    MAXIMUM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // blocks
    row = program % blocks
    column = tl.arange(0, COLUMNS)
    visible = (column <= row + first) & (column < columns)
    result = tl.zeros([COLUMNS], tl.float32)
    for member in range(0, SHARE):
        mass = tl.zeros([COLUMNS], tl.float32)
        weights = 0.0
        for part in range(0, PARTS):
            begin = ((group * SHARE + member).to(tl.int64) * blocks + row) * PARTS + part
            x = tl.load(sums + begin * columns + column, mask=visible, other=-float("inf"))
            x = tl.math.exp2(x - tl.max(x, 0))
            weight = 1.0
            if POOL > 1:
                # As many as the pool has queries.
                place = (row * PARTS + part) * POOL - offset
                number = tl.minimum(place + POOL, num_queries) - tl.maximum(place, 0)
                weight = tl.maximum(number, 0).to(tl.float32)
            mass += x * (weight / tl.sum(x, 0))
            weights += weight
        mass = mass / weights
        if MAXIMUM:
            result = tl.maximum(result, mass)
        else:
            result += mass / SHARE
    tl.store(masses + program.to(tl.int64) * columns + column, result, mask=column < columns)


@triton.jit
def _threshold(bits, number):
    # The largest number that at least so many of the bits reach, 0 if none: of non-negative floats larger ones have
    # larger bits.
    low = tl.zeros_like(number)
    high = low + 0x7F800001
    for _ in range(0, 31):
        middle = low + (high - low) // 2
        enough = tl.sum((bits >= middle).to(tl.int32), 0) >= number
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _highest(bits, number):
    # So many of the highest, the leading ones among equals; bits below 0 never.
    threshold = _threshold(bits, number)
    above = bits > threshold
    equal = (bits == threshold).to(tl.int32)
    room = number - tl.sum(above.to(tl.int32), 0)
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= room))


@triton.jit
def _neighbour_kernel(
    sampled,
    pooled,
    estimated,
    hits,
    rows,
    columns,
    first,
    number,
    DIAGONAL: tl.constexpr,
    COLUMN: tl.constexpr,
    VALIDATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % rows
    column = tl.arange(0, COLUMNS)
    head = sampled + (program // rows).to(tl.int64) * rows * columns
    around = tl.zeros([COLUMNS], tl.float32)
    for across in tl.static_range(-COLUMN, COLUMN + 1):
        for along in tl.static_range(-DIAGONAL, DIAGONAL + 1):
            if across != 0 or along != 0:
                beside = row + across
                other = beside + along
                inside = (beside >= 0) & (beside < rows) & (other >= 0) & (other < rows)
                shifted = column + along
                x = tl.load(
                    head + other * columns + shifted, mask=inside & (shifted >= 0) & (shifted < columns), other=0.0
                )
                steps = across if across > 0 else -across
                weight = (1.0 - steps / (COLUMN + 1)) * (1.0 - (along if along > 0 else -along) / (DIAGONAL + 1))
                around += weight * x
    here = tl.load(head + row * columns + column, mask=column < columns, other=0.0)
    tl.store(estimated + program.to(tl.int64) * columns + column, around + here, mask=column < columns)
    if VALIDATED:
        # How much of the row's own samples its neighbours would have chosen, and how much the means.
        free = (column > 0) & (column < row + first)
        means = tl.load(pooled + program.to(tl.int64) * columns + column, mask=column < columns, other=0.0)
        wanted = tl.zeros_like(row) + number
        by_neighbours = _highest(tl.where(free, around.to(tl.int32, bitcast=True), -1), wanted)
        by_means = _highest(tl.where(free, means.to(tl.int32, bitcast=True), -1), wanted)
        tl.store(hits + 2 * program, tl.sum(tl.where(by_neighbours, here, 0.0), 0))
        tl.store(hits + 2 * program + 1, tl.sum(tl.where(by_means, here, 0.0), 0))


@triton.jit
def _decide_kernel(
    sampled,
    pooled,
    estimated,
    hits,
    rows,
    columns,
    margin,
    RADIUS: tl.constexpr,
    STRETCH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % rows
    near = tl.arange(0, STRETCH)
    other = row - RADIUS + near
    inside = (near <= 2 * RADIUS) & (other >= 0) & (other < rows)
    pair = hits + 2 * (program - row + other)
    by_neighbours = tl.sum(tl.load(pair, mask=inside, other=0.0), 0)
    by_means = tl.sum(tl.load(pair + 1, mask=inside, other=0.0), 0)
    if by_neighbours <= margin * by_means:
        place = program.to(tl.int64) * columns + tl.arange(0, COLUMNS)
        real = tl.arange(0, COLUMNS) < columns
        x = tl.load(pooled + place, mask=real, other=0.0) + tl.load(sampled + place, mask=real, other=0.0)
        tl.store(estimated + place, x, mask=real)


@triton.jit
def _support_kernel(estimated, support, rows, columns, first, COLUMNS: tl.constexpr):
    # exp(H) of a row's distribution over the blocks that it sees, the sink's left out.
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    visible = (column > 0) & (column <= program % rows + first) & (column < columns)
    x = tl.load(estimated + program.to(tl.int64) * columns + column, mask=visible, other=0.0)
    x = x / tl.maximum(tl.sum(x, 0), 1.1754943508222875e-38)
    entropy = -tl.sum(tl.where(x > 0, x * tl.math.log2(tl.where(x > 0, x, 1.0)), 0.0), 0)
    tl.store(support + program, tl.math.exp2(entropy))


@triton.jit
def _share_kernel(support, densities, counts, heads, least, most, HEADS: tl.constexpr, BISECTIONS: tl.constexpr):
    # The density is a step function that grows with the factor: bisection finds the largest that is not too dense.
    head = tl.arange(0, HEADS)
    real = head < heads
    begin = tl.program_id(0) * heads
    x = tl.load(support + begin + head, mask=real, other=0.0)
    density = tl.load(densities + most)
    low = tl.zeros([1], tl.float64)
    high = low + most
    for _ in range(0, BISECTIONS):
        middle = (low + high) / 2
        number = tl.minimum(tl.maximum((middle * x).to(tl.int32), least), most)
        mean = tl.sum(tl.load(densities + number - 1, mask=real, other=0.0), 0) / heads
        fits = mean <= density
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    number = tl.minimum(tl.maximum((low * x).to(tl.int32), least), most)
    tl.store(counts + begin + head, number, mask=real)


@triton.jit
def _keep_kernel(
    estimated,
    counts,
    chosen,
    index,
    lengths,
    batch_stride,
    head_stride,
    row_stride,
    column_stride,
    count,
    heads,
    rows,
    columns,
    first,
    tail,
    UNIFORM: tl.constexpr,
    LOCAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % rows
    head = program // rows
    own = row + first
    column = tl.arange(0, COLUMNS)
    visible = (column <= own) & (column < columns)
    x = tl.load(
        estimated
        + (head // heads).to(tl.int64) * batch_stride
        + (head % heads).to(tl.int64) * head_stride
        + row.to(tl.int64) * row_stride
        + column * column_stride,
        mask=visible,
        other=0.0,
    )
    bits = tl.maximum(x, 0.0).to(tl.int32, bitcast=True)
    for back in tl.static_range(1, LOCAL + 1):
        # Nearer ones win where the budget does not hold all.
        bits = tl.where(column == own - back, 0x7F7FFFFF - back, bits)
    bits = tl.where(column == 0, 0x7F7FFFFF, bits)
    bits = tl.where(column == own, 0x7F800000, bits)
    bits = tl.where(visible, bits, -1)
    if UNIFORM:
        number = tl.zeros_like(row) + count
    else:
        number = tl.load(counts + head)
    kept = _highest(bits, number) | (visible & (row >= tail))
    tl.store(chosen + program.to(tl.int64) * columns + column, kept.to(tl.uint8), mask=column < columns)
    before = (kept & (column < own)).to(tl.int32)
    place = tl.cumsum(before, 0) - before
    tl.store(index + program.to(tl.int64) * columns + place, column, mask=before > 0)
    tl.store(lengths + program, 2 * tl.sum(before, 0) + 1)
