"""Sparse attention as dense attention over gathered keys: what columns and blocks have in common.

Queries form groups that share a list of keys: one group of all queries for columns, one per query block for blocks.
Query heads that share a key head join their group's rows, so that every key is gathered once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entreg.sparse.backends.rows import rows_of_heads, rows_of_tokens
from entreg.sparse.plan import SparsityPlan


@dataclass(frozen=True)
class Gathered:
    """Groups of queries with the keys and values that each attends to.

    Attributes:
        q: (batch, key_heads * groups, rows, d), rows = heads / key_heads * queries per group.
        k: (batch, key_heads * groups, length, d).
        v: (batch, key_heads * groups, length, d_v).
        mask: what to hand to attention beside them: None, bool (True attends) or additive of q's dtype, broadcastable
            to (batch, key_heads * groups, rows, length).
        places: (batch or 1, n) place of each query among its head's rows of all groups, in order.
        heads: query heads.
        key_heads: key heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    places: Tensor | None
    heads: int
    key_heads: int

    def scatter(self, out: Tensor) -> Tensor:
        """Attention's output of the groups (like ``q``, with d_v) as (batch, heads, n, d_v)."""
        batch, share, width = len(out), self.heads // self.key_heads, out.shape[-1]
        out = out.reshape(batch, self.key_heads, -1, share, out.shape[2] // share, width)
        out = out.transpose(2, 3).reshape(batch, self.heads, -1, width)
        return out if self.places is None else rows_of_tokens(out, self.places)


def gather(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsityPlan, key_bias: Tensor | None, allowed: Tensor | None = None
) -> Gathered:
    """Lay out queries in groups and gather each group's keys and values."""
    batch, heads, n, width = q.shape
    key_heads, share = k.shape[1], heads // k.shape[1]
    if plan.kind == "columns":
        # One group; the indices carry no block axis.
        index, valid = plan.keys.unsqueeze(2), None if plan.key_valid is None else plan.key_valid.unsqueeze(2)
        rows = places = None
        grouped = q.reshape(batch, key_heads, share * n, width)
    else:
        index, valid = _keys_of_blocks(plan)
        rows, places = _rows_of_blocks(plan, q.device)
        grouped = rows_of_tokens(q, rows).reshape(batch, key_heads, share, plan.query_blocks, -1, width)
        grouped = grouped.transpose(2, 3).reshape(batch, key_heads * plan.query_blocks, -1, width)
    mask = _mask(plan, index, valid, rows, share, key_bias, allowed, q.dtype)
    if mask is not None:
        mask = mask.expand(batch, key_heads, -1, -1, -1).flatten(1, 2)
    flat = index.flatten(2)
    return Gathered(
        q=grouped,
        k=rows_of_heads(k, flat).reshape(batch, grouped.shape[1], -1, width),
        v=rows_of_heads(v, flat).reshape(batch, grouped.shape[1], -1, v.shape[-1]),
        mask=mask,
        places=places,
        heads=heads,
        key_heads=key_heads,
    )


def _rows_of_blocks(plan: SparsityPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """(batch or 1, query_blocks * rows) query at every place, and (batch or 1, n) place of every query.

    Places before the first and behind the last query repeat these, so that no row is empty.
    """
    size, blocks = plan.block_size, plan.query_blocks
    places = torch.arange(blocks * size, device=device) - plan.query_offset
    rows = places.clamp(0, plan.num_queries - 1).unsqueeze(0)
    back = torch.arange(plan.num_queries, device=device).unsqueeze(0) + plan.query_offset
    if plan.permutation is None:
        return rows, back
    return plan.permutation[:, rows[0]], plan.permutation.argsort(-1)


def _keys_of_blocks(plan: SparsityPlan) -> tuple[Tensor, Tensor | None]:
    """(batch, plan_heads, query_blocks, length) positions of each query block's keys; and which are not padding."""
    counts = plan.block_mask.sum(-1)
    most = int(counts.max())
    # Stable, so that chosen blocks come first and in order.
    order = plan.block_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    kept = torch.arange(most, device=order.device) < counts.unsqueeze(-1)
    index = order.unsqueeze(-1) * plan.block_size + torch.arange(plan.block_size, device=order.device)
    valid = (kept.unsqueeze(-1) & (index < plan.num_keys)).flatten(3)
    index = index.flatten(3).clamp_max(plan.num_keys - 1)
    if plan.permutation is not None:
        flat = plan.permutation[:, None].expand(-1, index.shape[1], -1).gather(2, index.flatten(2))
        index = flat.view_as(index)
    return index, None if bool(valid.all()) else valid


def _mask(
    plan: SparsityPlan,
    index: Tensor,
    valid: Tensor | None,
    rows: Tensor | None,
    share: int,
    key_bias: Tensor | None,
    allowed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """(batch, plan_heads, groups, rows or 1, length) bool, additive in ``dtype``, or None where all attend to all."""
    mask = None if valid is None else valid.unsqueeze(3)
    rows = torch.arange(plan.num_queries, device=index.device)[None] if rows is None else rows
    if plan.causal:
        last = rows.view(len(rows), 1, index.shape[2], -1, 1) + (plan.num_keys - plan.num_queries)
        seen = (index.unsqueeze(3) <= last).repeat(1, 1, 1, share, 1)
        mask = seen if mask is None else mask & seen
    if allowed is not None:
        images = torch.arange(len(index), device=index.device).view(-1, 1, 1, 1, 1)
        seen = allowed[images, 0, rows.view(len(rows), 1, index.shape[2], -1, 1), index.unsqueeze(3)]
        seen = seen.repeat(1, 1, 1, share, 1)
        mask = seen if mask is None else mask & seen
    if key_bias is None:
        return mask
    bias = key_bias[:, None].expand(-1, index.shape[1], -1).gather(2, index.flatten(2)).view_as(index)
    bias = bias.to(dtype).unsqueeze(3)
    return bias if mask is None else torch.where(mask, bias, -torch.inf)
