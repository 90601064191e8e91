"""Attention in bfloat16 on a CPU, as two products and a softmax over some rows at a time.

PyTorch's fused kernel multiplies small tiles and converts them in between. Where the processor multiplies bfloat16
itself, products of whole rows run at more than twice its rate, and the logits of some rows stay in the cache between
them. Logits are rounded to bfloat16, as in the unfused attention of transformers; sums are of float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from entreg.sparse.backends.recording import record_kernel

# Logits that are held at once: 2 MiB. Fewer are fewer rows per product, more do not stay in a cache.
_MOST_LOGITS = 1 << 20
# Rows per product of dense causal attention: half a block of so many squared is computed in vain.
_CAUSAL_ROWS = 128


def serves(*tensors: Tensor) -> bool:
    """Whether products are the faster way: bfloat16, no gradient, and a processor with instructions for it."""
    return (
        all(one.device.type == "cpu" and one.dtype == torch.bfloat16 for one in tensors)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
        and _multiplies_bfloat16()
    )


@functools.cache
def _multiplies_bfloat16() -> bool:
    # Older PyTorch cannot be asked; the fused kernel is right in any case.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))


def groups_at_once(rows: int, keys: int) -> int:
    """How many groups :func:`attend_groups` should be given at a time."""
    return max(1, _MOST_LOGITS // (rows * keys))


def attend_groups(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    """Attention of each group's queries to the group's keys.

    Args:
        q: (groups, rows, d).
        k: (groups, keys, d).
        v: (groups, keys, d_v).
        scale: factor of the logits.
        allowed: bool, broadcastable to (groups, rows, columns): of the last ``columns`` keys, those that are attended
            to; None for all. What a row without any gets is arbitrary, but finite.

    Returns:
        (groups, rows, d_v).
    """
    record_kernel("products")
    logits = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0.0, alpha=scale)
    if allowed is not None:
        logits[:, :, -allowed.shape[-1] :].masked_fill_(~allowed, torch.finfo(logits.dtype).min)
    return torch.bmm(torch.softmax(logits, dim=-1, out=logits), v)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Dense causal attention, the last query aligned with the last key.

    Args:
        q: (batch, heads, n, d).
        k: (batch, key_heads, m, d), m >= n; heads is a multiple of key_heads.
        v: (batch, key_heads, m, d_v).
        scale: factor of the logits.

    Returns:
        (batch, heads, n, d_v).
    """
    batch, heads, n, width = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    share = heads // key_heads
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    out = q.new_empty(batch, heads, n, v.shape[-1])
    triangle = torch.ones(_CAUSAL_ROWS, _CAUSAL_ROWS, dtype=torch.bool, device=q.device).tril()
    for start in range(0, n, _CAUSAL_ROWS):
        end = min(start + _CAUSAL_ROWS, n)
        rows, keys = end - start, m - n + end
        groups = q[:, :, start:end].reshape(batch * key_heads, share * rows, width)
        allowed = triangle[:rows, :rows].repeat(share, 1)
        parts = [
            attend_groups(groups[place], k[place, :keys], v[place, :keys], scale, allowed)
            for place in torch.arange(len(k)).split(groups_at_once(share * rows, keys))
        ]
        out[:, :, start:end] = torch.cat(parts).view(batch, heads, rows, -1)
    return out
