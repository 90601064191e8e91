"""Causal block plans on gathered blocks: the path that decoders take.

Every query block attends to some key blocks before its own and, up to the diagonal, to its own. Three things make that
cheap where a general gather is not: whole blocks are copied, not rows; the leading rows that see all there is run as
ordinary dense causal attention; and with each row's own block put last, one small triangular mask serves all rows.
Rows of different numbers of blocks are padded within a few buckets of similar number. What is gathered is attended to
by PyTorch's fused kernel, or by :mod:`entreg.sparse.backends.products` where that is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from entreg.sparse.backends import products
from entreg.sparse.block_scores import visible_blocks
from entreg.sparse.budgets import bucket_by_budget
from entreg.sparse.plan import SparsityPlan

# Numbers of keys copied at once, times their width: 8 MiB of bfloat16, so that a copy is read while it is in a cache.
_CHUNK_ELEMENTS = 2**22
_MOST_BUCKETS = 4


def keeps_own_blocks(plan: SparsityPlan) -> bool:
    """Whether this is a causal block plan in which every query block keeps the key block at its own place."""
    if plan.kind != "blocks" or not plan.causal:
        return False
    rows = torch.arange(plan.query_blocks, device=plan.block_mask.device)
    own = rows + (plan.num_keys - plan.num_queries) // plan.block_size
    return bool(plan.block_mask[..., rows, own].all())


def attend_causal_blocks(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsityPlan, scale: float, mask: Tensor | None
) -> Tensor:
    """Attention over the plan's blocks.

    Args:
        q: (batch, heads, n, d).
        k: (batch, key_heads, m, d).
        v: (batch, key_heads, m, d_v).
        plan: see :func:`keeps_own_blocks`.
        scale: factor of the logits.
        mask: (batch, 1, n, m) bool, True where attention is allowed, or None for all that is causal.

    Returns:
        (batch, heads, n, d_v).
    """
    leading = _leading_dense_blocks(plan)
    rows = min(max(leading * plan.block_size - plan.query_offset, 0), plan.num_queries)
    parts = []
    if rows > 0:
        keys = min(plan.num_keys, plan.num_keys - plan.num_queries + rows)
        parts.append(_dense_rows(q[:, :, :rows], k[:, :, :keys], v[:, :, :keys], mask, scale))
    if rows < plan.num_queries:
        parts.append(_block_rows(q[:, :, rows:], k, v, plan, leading, scale, mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _leading_dense_blocks(plan: SparsityPlan) -> int:
    """Query blocks from the first on in which no head leaves out anything that it could see."""
    mask = plan.block_mask
    visible = visible_blocks(plan.num_queries, plan.num_keys, plan.block_size, mask.device)
    whole = (mask | ~visible).all(-1).all(1).all(0)
    return int(whole.to(torch.int64).cumprod(0).sum())


def _dense_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    if mask is None and products.serves(q, k, v):
        return products.attend_causal(q, k, v, scale)
    allowed = None
    if mask is not None:
        allowed = mask[:, :, :n, :m]
    elif n < m:
        allowed = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _block_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsityPlan, leading: int, scale: float, mask: Tensor | None
) -> Tensor:
    """The query blocks from number ``leading`` on; q holds their rows only."""
    batch, heads, n, width = q.shape
    key_heads, size = k.shape[1], plan.block_size
    share, blocks = heads // key_heads, plan.query_blocks - leading
    before = plan.query_offset if leading == 0 else 0
    groups = pad(q, (0, 0, before, blocks * size - before - n)).view(batch, key_heads, share, blocks, size, width)
    groups = groups.transpose(2, 3).reshape(-1, share * size, width)
    k_blocks, v_blocks = (_as_blocks(x, plan.key_blocks, size) for x in (k, v))
    chosen = plan.block_mask[:, :, leading:].expand(batch, key_heads, -1, -1).flatten(0, 2)
    counts = chosen.sum(-1)
    # Stable, so that the chosen blocks come last and in order: each row's own block is the very last.
    order = chosen.to(torch.int8).argsort(dim=-1, stable=True)
    first_block = torch.arange(batch * key_heads, device=q.device).repeat_interleave(blocks) * plan.key_blocks
    triangle = torch.ones(size, size, dtype=torch.bool, device=q.device).tril().repeat(share, 1)
    attend = products.attend_groups if products.serves(q, k, v) else _fused
    pieces, places = [], []
    for bucket in _buckets(counts):
        most = int(counts[bucket].max())
        step = max(1, _CHUNK_ELEMENTS // (most * size * width))
        if attend is not _fused:
            step = min(step, products.groups_at_once(share * size, most * size))
        for part in bucket.split(step):
            index = order[part, -most:]
            flat = (index + first_block[part, None]).flatten()
            keys = k_blocks.index_select(0, flat).view(len(part), most * size, width)
            values = v_blocks.index_select(0, flat).view(len(part), most * size, -1)
            allowed = _allowed(triangle, most, counts[part])
            if mask is not None:
                allowed = pad(allowed, (most * size - allowed.shape[-1], 0), value=True)
                allowed = allowed & _gathered_mask(mask, plan, part, index, key_heads, blocks, leading, share)
            piece = attend(groups.index_select(0, part), keys, values, scale, allowed)
            # Without a mask every query sees itself.
            pieces.append(piece if mask is None else piece * allowed.any(-1, keepdim=True))
            places.append(part)
    out = torch.cat(pieces).index_select(0, torch.cat(places).argsort())
    out = out.view(batch, key_heads, blocks, share, size, -1).transpose(2, 3).reshape(batch, heads, blocks * size, -1)
    return out[:, :, before : before + n]


def _as_blocks(x: Tensor, blocks: int, size: int) -> Tensor:
    """(batch * heads * blocks, size * d), the last block of each head filled up with zeros."""
    return pad(x, (0, 0, 0, blocks * size - x.shape[2])).reshape(-1, size * x.shape[3])


def _buckets(counts: Tensor) -> list[Tensor]:
    if int(counts.min()) == int(counts.max()):
        return [torch.arange(len(counts), device=counts.device)]
    return bucket_by_budget(counts, _MOST_BUCKETS)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """As :func:`entreg.sparse.backends.products.attend_groups`, by SDPA."""
    allowed = pad(allowed, (k.shape[1] - allowed.shape[-1], 0), value=True)
    return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=allowed, scale=scale)[0]


def _allowed(triangle: Tensor, most: int, counts: Tensor) -> Tensor:
    """Bool mask of the last gathered keys: (rows, size), or all keys' where some groups have fewer blocks.

    The latter is (groups, rows, keys).
    """
    size = triangle.shape[1]
    missing = most - counts
    if not bool((missing > 0).any()):
        return triangle
    real = torch.arange(most, device=counts.device) >= missing[:, None]
    return pad(triangle, ((most - 1) * size, 0), value=True) & real.repeat_interleave(size, dim=1)[:, None]


def _gathered_mask(
    mask: Tensor,
    plan: SparsityPlan,
    part: Tensor,
    index: Tensor,
    key_heads: int,
    blocks: int,
    leading: int,
    share: int,
) -> Tensor:
    """(groups, share * size, keys) entries of a (batch, 1, n, m) mask."""
    size = plan.block_size
    image = part // (key_heads * blocks)
    first = (part % blocks + leading) * size - plan.query_offset
    places = torch.arange(size, device=part.device)
    rows = (first[:, None] + places).clamp(0, plan.num_queries - 1)
    keys = (index[..., None] * size + places).flatten(1).clamp_max(plan.num_keys - 1)
    allowed = mask[image[:, None, None], 0, rows[:, :, None], keys[:, None, :]]
    return allowed.repeat(1, share, 1)
