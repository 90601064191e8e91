"""Sparse attention by PyTorch's FlexAttention."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from entreg.errors import InputError
from entreg.sparse.block_scores import permuted
from entreg.sparse.plan import SparsityPlan

_MOST_SHAPES = 64


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan,
    scale: float,
    key_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """(batch, heads, n, d_v); with a permutation, attention runs in the order in which blocks are contiguous."""
    needs_gradient = any(x.requires_grad for x in (q, k, v)) or (key_bias is not None and key_bias.requires_grad)
    if q.device.type == "cpu" and torch.is_grad_enabled() and needs_gradient:
        raise InputError("FlexAttention has no gradient on the CPU; use the backend 'gather' there")
    if q.device.type == "cpu" and q.dtype == torch.float64:
        raise InputError("FlexAttention on the CPU takes float32, bfloat16 or float16; use the backend 'reference'")
    order = plan.permutation if plan.kind == "blocks" else None
    if order is not None and key_bias is not None:
        key_bias = key_bias.gather(1, order)
    if order is not None and mask is not None:
        mask = mask[torch.arange(len(mask), device=mask.device)[:, None, None], 0, order[:, :, None], order[:, None]]
        mask = mask.unsqueeze(1)
    q, k, v = (permuted(x, order) for x in (q, k, v))
    block_mask = create_block_mask(
        _mask_function(plan, mask),
        B=plan.batch,
        H=plan.num_heads if plan.plan_heads > 1 else 1,
        Q_LEN=plan.num_queries,
        KV_LEN=plan.num_keys,
        device=str(q.device),
    )

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + key_bias[b, j]

    out = _flex_attention(
        q,
        k,
        v,
        score_mod=None if key_bias is None else add_bias,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out if order is None else permuted(out, order.argsort(-1))


def _mask_function(plan: SparsityPlan, allowed: Tensor | None) -> Any:
    share = plan.num_heads // plan.plan_heads
    later = plan.num_keys - plan.num_queries
    if plan.kind == "columns":
        kept = plan.kept_keys()

        def chosen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return kept[b, h // share, j]
    else:
        mask, size, offset = plan.block_mask, plan.block_size, plan.query_offset
        first = torch.tensor(plan.first_keys or (0,) * plan.batch, device=mask.device)

        def chosen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            place = j - first[b]
            return mask[b, h // share, (i + offset) // size, place.clamp_min(0) // size] & (place >= 0)

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = chosen(b, h, i, j)
        if plan.causal:
            kept = kept & (j <= i + later)
        return kept if allowed is None else kept & allowed[b, 0, i, j]

    return within


def _flex_attention(*tensors: Tensor, **arguments: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return flex_attention(*tensors, **arguments)
    try:
        # Above its usual limit of 8 shapes the compiler would silently run the uncompiled code instead, which holds
        # all n x m entries: the limit is raised, and with fullgraph reaching it is an error.
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            return _compiled()(*tensors, **arguments)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise InputError(
            f"FlexAttention is compiled anew for every shape, and {_MOST_SHAPES} are the most in one process; "
            "use the backend 'gather' for many different lengths"
        ) from error


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
