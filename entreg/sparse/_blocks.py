"""Which pairs of blocks to compute: pooled scores, and a constant number of key blocks per query block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entreg.sparse._counting import num_blocks, query_offset
from entreg.sparse._rows import rows_of_tokens


def permuted(x: Tensor, permutation: Tensor | None) -> Tensor:
    """(batch, heads, n, d) with the tokens in the order of a (batch, n) permutation."""
    return x if permutation is None else rows_of_tokens(x, permutation)


def pooled_block_scores(
    q: Tensor, k: Tensor, block_size: int, *, scale: float | None, causal: bool, permutation: Tensor | None
) -> Tensor:
    """Attention between the mean query and the mean key of every pair of blocks (pooled estimate of block mass).

    Returns:
        (batch, heads, query_blocks, key_blocks) float32 or float64; rows sum to one over the blocks that they may see.
    """
    batch, heads, n, width = q.shape
    m = k.shape[2]
    offset = query_offset(n, m, block_size, causal)
    queries, _ = _block_means(permuted(q, permutation), block_size, offset)
    keys, sizes = _block_means(permuted(k, permutation), block_size, 0)
    factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
    grouped = (queries * factor).reshape(batch, k.shape[1], -1, width)
    # A block of few keys receives less.
    logits = (grouped @ keys.transpose(-1, -2)).view(batch, heads, -1, keys.shape[2]) + sizes.log()
    if causal:
        logits = logits.masked_fill(~visible_blocks(n, m, block_size, logits.device), -torch.inf)
    return torch.softmax(logits, dim=-1)


def visible_blocks(num_queries: int, num_keys: int, block_size: int, device: torch.device) -> Tensor:
    """(query_blocks, key_blocks) bool: causal pairs with at least one entry."""
    offset = query_offset(num_queries, num_keys, block_size, True)
    first = (num_keys - num_queries) // block_size
    rows = torch.arange(num_blocks(num_queries + offset, block_size), device=device)
    return torch.arange(num_blocks(num_keys, block_size), device=device) <= (rows + first)[:, None]


def _block_means(x: Tensor, block_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """Mean of every block, (batch, heads, blocks, d), at least float32; and (blocks,) tokens in each."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = x.shape[2]
    blocks = num_blocks(length + offset, block_size)
    padded = torch.nn.functional.pad(x, (0, 0, offset, blocks * block_size - length - offset))
    ends = torch.arange(1, blocks + 1, device=x.device) * block_size
    sizes = (ends.clamp_max(length + offset) - (ends - block_size).clamp_min(offset)).to(x.dtype)
    return padded.unflatten(2, (blocks, block_size)).sum(3) / sizes[:, None], sizes


def highest_blocks(scores: Tensor, count: int | Tensor, num_prefix_blocks: int, visible: Tensor | None) -> Tensor:
    """Mark in every row the key blocks of highest score.

    Args:
        scores: (batch, heads, query_blocks, key_blocks).
        count: key blocks per row, or int64 (batch, heads).
        num_prefix_blocks: leading key blocks that come before all others.
        visible: causal: (query_blocks, key_blocks) bool; each row's last visible block comes before all others. Rows
            that see fewer blocks than ``count`` get all that they see.

    Returns:
        bool of the shape of ``scores``.
    """
    highest = torch.finfo(scores.dtype).max
    scores = scores.clone()
    scores[..., :num_prefix_blocks] = highest
    if visible is not None:
        # False is 0, so that the count of visible blocks minus one is the last of them.
        last = visible.sum(-1, keepdim=True) - 1
        scores.scatter_(-1, last.expand(*scores.shape[:3], 1), torch.inf)
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
