"""Copies of whole rows from the tensors of attention heads."""

from __future__ import annotations

from torch import Tensor

from entreg.sparse.tokens.slots import rows_at


def rows_of_heads(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (batch, heads, n, d) by (batch, heads or 1, length)."""
    batch, heads = x.shape[:2]
    return rows_at(x.flatten(0, 1), rows.expand(batch, heads, -1).flatten(0, 1)).unflatten(0, (batch, heads))


def rows_of_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (batch, heads, n, d) by (batch or 1, length), the same for all heads."""
    if len(rows) == 1:
        return x.index_select(2, rows[0])
    return rows_of_heads(x, rows.unsqueeze(1))
