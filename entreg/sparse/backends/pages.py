"""Attention of one query over pages of a key cache: the step in which a decoder writes a token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from entreg.sparse.backends.rows import rows_of_heads
from entreg.sparse.plan import SparsityPlan


def attend_pages(q: Tensor, k: Tensor, v: Tensor, plan: SparsityPlan, scale: float, mask: Tensor | None) -> Tensor:
    """Attention of one query over whole pages, the plan's blocks.

    Args:
        q: (batch, heads, 1, d).
        k: (batch, key_heads, m, d).
        v: (batch, key_heads, m, d_v).
        plan: causal blocks, the query's own among them, see
            :func:`entreg.sparse.backends.causal_blocks.keeps_own_blocks`; with ``first_keys`` any.
        scale: factor of the logits.
        mask: (batch, 1, 1, m) bool, True where attention is allowed, or None.

    Returns:
        (batch, heads, 1, d_v).
    """
    batch, heads, _, width = q.shape
    key_heads, size, m = k.shape[1], plan.block_size, plan.num_keys
    chosen = plan.block_mask[:, :, 0].expand(batch, key_heads, -1)
    counts = chosen.sum(-1)
    most = int(counts.max())
    # Stable, so that the chosen pages come last and in order; the query's own is the very last.
    index = chosen.to(torch.int8).argsort(dim=-1, stable=True)[..., -most:]
    allowed = None
    if int(counts.min()) < most:
        real = torch.arange(most, device=q.device) >= (most - counts)[..., None]
        allowed = real.repeat_interleave(size, dim=-1)
    if plan.first_keys is None:
        # What lies behind the newest key in it is cut off, for all alike.
        length = most * size - (plan.key_blocks * size - m)
        keys, values = (_copied_pages(x, index, size, length) for x in (k, v))
        places = None if mask is None else _places(index, size)[..., :length]
        allowed = None if allowed is None else allowed[..., :length]
    else:
        places = _places(index, size) + torch.tensor(plan.first_keys, device=q.device)[:, None, None]
        real = places < m
        allowed = real if allowed is None else allowed & real
        places = places.clamp_max(m - 1)
        keys, values = rows_of_heads(k, places), rows_of_heads(v, places)
    if mask is not None:
        seen = mask[:, :, 0].expand(-1, key_heads, -1).gather(2, places)
        allowed = seen if allowed is None else allowed & seen
    grouped = q.reshape(batch, key_heads, heads // key_heads, width)
    out = _attend(grouped, keys, values, None if allowed is None else allowed[:, :, None], scale)
    return out.reshape(batch, heads, 1, -1)


def _places(index: Tensor, size: int) -> Tensor:
    """(batch, heads, number * size) keys of the pages (batch, heads, number), counted from the first page."""
    return (index[..., None] * size + torch.arange(size, device=index.device)).flatten(2)


def _copied_pages(x: Tensor, index: Tensor, size: int, length: int) -> Tensor:
    """The pages (batch, heads, number) of x (batch, heads, m, d), one after the other and cut to a length."""
    batch, heads, m, width = x.shape
    page = size * width
    room = x.stride(1) // page
    # Pages can be copied whole where every head's keys begin a whole number of pages behind the last head's, and the
    # last page lies within the memory even where it is not full.
    whole = (
        x.stride()[2:] == (width, 1)
        and x.stride(1) % page == 0
        and room * size >= m
        and (batch == 1 or x.stride(0) == heads * x.stride(1))
        and x.storage_offset() + batch * heads * room * page <= x.untyped_storage().nbytes() // x.element_size()
        and not x.requires_grad
    )
    if not whole:
        return rows_of_heads(x, _places(index, size)[..., :length])
    pages = x.as_strided((batch * heads * room, page), (page, 1))
    first = torch.arange(0, batch * heads * room, room, device=x.device).view(batch, heads, 1)
    return pages.index_select(0, (index + first).flatten()).view(batch, heads, -1, width)[:, :, :length]


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    if q.device.type != "cpu":
        return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    # For a handful of rows plain products are several times faster on a CPU than the fused kernel. Logits in at least
    # float32, as there: a product that ends in bfloat16 would double the error.
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(dtype).min)
    return torch.softmax(logits, dim=-1).to(v.dtype) @ v
