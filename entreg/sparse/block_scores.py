"""Which pairs of blocks to compute: pooled scores, and a constant number of key blocks per query block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from entreg.sparse.backends.rows import rows_of_tokens
from entreg.sparse.counting import num_blocks, query_offset


def permuted(x: Tensor, permutation: Tensor | None) -> Tensor:
    """(batch, heads, n, d) with the tokens in the order of a (batch, n) permutation."""
    return x if permutation is None else rows_of_tokens(x, permutation)


def pooled_block_scores(
    q: Tensor,
    k: Tensor,
    block_size: int,
    *,
    scale: float | None,
    causal: bool,
    permutation: Tensor | None,
    pool_size: int | None = None,
    parts: Sequence[tuple[int, int, int]] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention between the mean query and the mean key of every pair of blocks (pooled estimate of block mass).

    With a ``pool_size``, a divisor of the block size, the means are those of as many consecutive tokens; a block of
    keys has the sum of their attention, a block of queries their mean.

    Args:
        q, k, block_size, scale, causal, permutation, pool_size: as above.
        parts: of causal scores: first and last (exclusive) query block of those that are computed together, and how
            many keys the last of them sees; None: all at once. All other pairs have 0.
        mask: of causal scores: (batch or 1, 1, n, m) bool, the allowed entries; pools see those that they have an
            allowed entry with, and their own.

    Returns:
        (batch, heads, query_blocks, key_blocks) float32 or float64; rows sum to one over the blocks that they may see.
    """
    batch, heads, n, width = q.shape
    m = k.shape[2]
    pool = block_size if pool_size is None else pool_size
    per_block = block_size // pool
    offset = query_offset(n, m, block_size, causal)
    queries, rows = _pool_means(permuted(q, permutation), pool, block_size, offset)
    keys, sizes = _pool_means(permuted(k, permutation), pool, block_size, 0)
    factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
    queries = (queries * factor).unflatten(1, (k.shape[1], -1))
    # A pool of few keys receives less, an empty one nothing.
    sizes, weights = sizes.log(), rows.view(-1, per_block, 1)
    first = (m - n) // block_size * per_block
    seen_pools = None if mask is None else visible_from_mask(mask, block_size, pool)
    scores = queries.new_zeros(batch, heads, len(weights), num_blocks(m, block_size))
    for start, end, seen in parts or [(0, len(weights), m)]:
        most = num_blocks(seen, block_size) * per_block
        group = queries[:, :, :, start * per_block : end * per_block].flatten(2, 3)
        logits = (group @ keys[:, :, :most].transpose(-1, -2)).view(batch, heads, -1, most) + sizes[:most]
        if seen_pools is not None:
            hidden = ~seen_pools[:, :, start * per_block : end * per_block, :most]
            logits.masked_fill_(hidden, -torch.inf)
        elif causal:
            own = torch.arange(start * per_block, end * per_block, device=q.device) + first
            logits.masked_fill_(torch.arange(most, device=q.device) > own[:, None], -torch.inf)
        mass = torch.softmax(logits, dim=-1)
        if per_block > 1:
            mass = mass.unflatten(-1, (-1, per_block)).sum(-1).unflatten(2, (-1, per_block))
            mass = (mass * weights[start:end]).sum(3) / weights[start:end].sum(1)
        scores[:, :, start:end, : mass.shape[-1]] = mass
    return scores


def visible_blocks(num_queries: int, num_keys: int, block_size: int, device: torch.device) -> Tensor:
    """(query_blocks, key_blocks) bool: causal pairs with at least one entry."""
    offset = query_offset(num_queries, num_keys, block_size, True)
    first = (num_keys - num_queries) // block_size
    rows = torch.arange(num_blocks(num_queries + offset, block_size), device=device)
    return torch.arange(num_blocks(num_keys, block_size), device=device) <= (rows + first)[:, None]


def visible_from_mask(mask: Tensor, block_size: int, pool_size: int | None = None) -> Tensor:
    """(batch, 1, query_blocks, key_blocks) bool: pairs of blocks with an allowed entry; each row's own block always.

    Args:
        mask: (batch, 1, n, m) bool, causal.
        block_size: tokens per block.
        pool_size: a divisor of it: pairs of so many tokens instead, in whole blocks.
    """
    n, m = mask.shape[2:]
    size = block_size if pool_size is None else pool_size
    offset = query_offset(n, m, block_size, True)
    rows = num_blocks(n + offset, block_size) * (block_size // size)
    columns = num_blocks(m, block_size) * (block_size // size)
    padded = pad(mask, (0, columns * size - m, offset, rows * size - n - offset))
    seen = padded.unflatten(3, (columns, size)).any(-1).unflatten(2, (rows, size)).any(3)
    own = torch.arange(rows, device=mask.device)
    seen[..., own, own + (m - n) // block_size * (block_size // size)] = True
    return seen


def _pool_means(x: Tensor, pool_size: int, block_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """Means of pools of consecutive tokens in whole blocks, and how many tokens each has.

    Returns:
        (batch, heads, pools, d), at least float32; (pools,) of the same dtype.
    """
    length, wide = x.shape[2], torch.promote_types(x.dtype, torch.float32)
    places = num_blocks(length + offset, block_size) * block_size
    if places > length:
        x = pad(x, (0, 0, offset, places - length - offset))
    ends = torch.arange(pool_size, places + 1, pool_size, device=x.device)
    sizes = ends.clamp_max(length + offset) - (ends - pool_size).clamp_min(offset)
    sizes = sizes.clamp_min(0).to(wide)
    # Widened within the sum: a copy of all that is summed would take far longer than the sum.
    return x.unflatten(2, (-1, pool_size)).sum(3, dtype=wide) / sizes.clamp_min(1)[:, None], sizes


def last_visible(visible: Tensor) -> Tensor:
    """(..., query_blocks, 1) number of the last key block that each row of blocks sees; every row sees one."""
    places = torch.arange(visible.shape[-1], device=visible.device)
    return torch.where(visible, places, -1).amax(-1, keepdim=True)


def highest_blocks(scores: Tensor, count: int | Tensor, num_prefix_blocks: int, visible: Tensor | None) -> Tensor:
    """Mark in every row the key blocks of highest score.

    Args:
        scores: (batch, heads, query_blocks, key_blocks).
        count: key blocks per row, or int64 (batch, heads).
        num_prefix_blocks: leading key blocks that come before all others, the first ones first.
        visible: causal: bool, broadcastable to the scores; each row's last visible block comes before all others. Rows
            that see fewer blocks than ``count`` get all that they see.

    Returns:
        bool of the shape of ``scores``.
    """
    highest = torch.finfo(scores.dtype).max
    scores = scores.clone()
    for block in range(num_prefix_blocks):
        # Where the budget does not hold all of them, the causal row's own block and the first ones are kept.
        scores[..., block] = highest / (block + 1)
    if visible is not None:
        scores.scatter_(-1, last_visible(visible).expand(*scores.shape[:3], 1), torch.inf)
        scores = scores.masked_fill(~visible, -torch.inf)
    if isinstance(count, int):
        order = scores.topk(count, dim=-1).indices
        kept = torch.ones_like(order, dtype=torch.bool)
    else:
        order = scores.topk(int(count.max()), dim=-1).indices
        kept = torch.arange(order.shape[-1], device=order.device) < count[..., None, None]
        kept = kept.expand_as(order)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, kept)
    return mask if visible is None else mask & visible
