"""How many score entries dense attention has, and where they lie in blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that cover ``length`` places, the last one possibly in part."""
    return -(-length // block_size)


def dense_entries(num_queries: int, num_keys: int, causal: bool) -> int:
    """Score entries of one head of dense attention; causal: query i sees num_keys - num_queries + i + 1 keys."""
    if not causal:
        return num_queries * num_keys
    return num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2


def query_offset(num_queries: int, num_keys: int, block_size: int, causal: bool) -> int:
    """Empty places before the first query in its block: causal query blocks are those of the keys at their place."""
    return (num_keys - num_queries) % block_size if causal else 0


def block_entries(num_queries: int, num_keys: int, block_size: int, causal: bool, device: torch.device) -> Tensor:
    """Score entries of dense attention in every pair of blocks: (query_blocks, key_blocks) float64, 0 if never seen."""
    offset = query_offset(num_queries, num_keys, block_size, causal)
    rows = torch.arange(num_queries, device=device)
    seen = rows + (num_keys - num_queries + 1) if causal else torch.full_like(rows, num_keys)
    starts = torch.arange(0, num_keys, block_size, device=device)
    sizes = (num_keys - starts).clamp_max(block_size)
    per_row = (seen[:, None] - starts).clamp_min(0).minimum(sizes).double()
    entries = per_row.new_zeros(num_blocks(num_queries + offset, block_size), len(starts))
    return entries.index_add_(0, (rows + offset) // block_size, per_row)


def mask_entries(mask: Tensor, block_size: int) -> Tensor:
    """Allowed entries in every pair of blocks: (batch, 1, query_blocks, key_blocks) float64.

    Args:
        mask: (batch, 1, n, m) bool, causal.
        block_size: tokens per block.
    """
    n, m = mask.shape[2:]
    offset = query_offset(n, m, block_size, True)
    rows, columns = num_blocks(n + offset, block_size), num_blocks(m, block_size)
    padded = pad(mask, (0, columns * block_size - m, offset, rows * block_size - n - offset))
    per_row = padded.unflatten(3, (columns, block_size)).sum(-1, dtype=torch.int32)
    return per_row.unflatten(2, (rows, block_size)).sum(3).double()
