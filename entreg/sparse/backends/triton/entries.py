"""How many score entries the fused estimates of the backend ``triton`` compute, by the tiles that they are cut into."""

from __future__ import annotations

from entreg.sparse.counting import num_blocks, query_offset

ROWS_PER_TILE = 128
"""Sampled queries, or pools of queries, that look at keys together."""
KEYS_PER_TILE = 128
"""Keys, or pools of keys, that they look at together, at the most."""
KEYS_PER_PROGRAM = 2048
"""How far one program goes."""


def fused_entries(num_queries: int, num_keys: int, block_size: int, parts: int, pool: int) -> int:
    """Score entries per head between rows and the keys that the last row of each tile sees.

    Args:
        num_queries: n.
        num_keys: m, at least n.
        block_size: of the plan.
        parts: rows per block of queries.
        pool: tokens of which a row and a key are the mean; 1: they are tokens.
    """
    first = (num_keys - num_queries) // block_size
    offset = query_offset(num_queries, num_keys, block_size, True)
    rows = num_blocks(num_queries + offset, block_size) * parts
    per_block = block_size // pool
    entries = 0
    for start in range(0, rows, ROWS_PER_TILE):
        end = min(start + ROWS_PER_TILE, rows)
        # The block in which the last row stands.
        keys = (first + num_blocks(end, parts)) * per_block
        entries += (end - start) * min(num_blocks(keys, KEYS_PER_TILE) * KEYS_PER_TILE, num_blocks(num_keys, pool))
    return entries
