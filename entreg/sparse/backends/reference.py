"""The plain meaning of sparse attention: a softmax over the entries that the plan keeps. Slow, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.sparse.plan import SparsityPlan


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan,
    scale: float,
    key_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """(batch, heads, n, d_v); holds all n x m entries, at least in float32."""
    groups = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (k, v))
    logits = q.to(dtype) @ keys.transpose(-1, -2) * scale
    if key_bias is not None:
        logits = logits + key_bias.to(dtype)[:, None, None]
    kept = plan.to_mask() if mask is None else plan.to_mask() & mask
    # A finite fill and a product, not -inf: the softmax of a row without keys would be NaN, here it is zero.
    probabilities = torch.softmax(logits.masked_fill(~kept, torch.finfo(dtype).min), dim=-1) * kept
    return (probabilities @ values).to(q.dtype)
