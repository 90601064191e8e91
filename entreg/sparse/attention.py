"""Attention over the entries of a plan, by a named backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from entreg.entropy.attention import check_attention_inputs
from entreg.errors import InputError
from entreg.sparse.backends.causal_blocks import attend_causal_blocks, keeps_own_blocks
from entreg.sparse.backends.flash import attend_flash
from entreg.sparse.backends.flex import attend_flex
from entreg.sparse.backends.gather import gather
from entreg.sparse.backends.loops import serves
from entreg.sparse.backends.page_loops import attend_chosen_pages
from entreg.sparse.backends.pages import attend_pages
from entreg.sparse.backends.reference import attend_reference
from entreg.sparse.backends.triton.entry import attend_triton
from entreg.sparse.config import BACKENDS
from entreg.sparse.plan import SegmentedPlan, SparsityPlan


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan | SegmentedPlan,
    *,
    causal: bool | None = None,
    backend: str = "gather",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which every query sees only the keys that the plan gives it.

    A query without keys gets zeros: plans of :func:`entreg.sparse.planning.make_plan` leave none without, a mask may.

    Backends, of which none ever stands in for another:

    * ``"gather"``: keys and values are gathered and handed to PyTorch's scaled_dot_product_attention (SDPA). A plan
      that leaves nothing out is handed to it as it is: bit for bit dense attention. Gradients everywhere. Without one,
      causal blocks on a CPU go by kernels of our own where these are faster: for one query compiled loops, for several
      in bfloat16 two products, which round the logits to bfloat16.
    * ``"reference"``: masked softmax over all n x m entries, in float32 or float64. The truth of the tests.
    * ``"flex"``: PyTorch's FlexAttention, compiled at the first call of each shape. It saves the tiles of 128 x 128
      entries that the plan leaves out as a whole, so it suits large blocks; on the CPU forward only.
    * ``"flash"``: gathered as above, by the flash-attn package (CUDA, float16 or bfloat16); neither masks nor biases,
      so no causal or ragged plans, and blocks only where their size divides n.
    * ``"triton"``: kernels of our own that walk through lists of key blocks (CUDA, float16 or bfloat16, forward only):
      nothing is copied, and nothing waits for the device. Causal block plans with blocks of 16, 32, 64 or 128 tokens,
      without masks and biases.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d), of q's dtype; heads is a multiple of key_heads.
        v: (batch, key_heads, m, d_v), of q's dtype.
        plan: made for these sizes. A mask of its own holds beside the one given here.
        causal: None, or whether the mask is causal, which must be as in the plan.
        backend: one of the above.
        scale: factor of the logits; default 1/sqrt(d).
        key_bias: (batch, m) added to the logits of each key, e.g. the log of the number of tokens that it stands for.
        mask: (batch, 1, n, m) bool, True where the plan's entries may be used, e.g. within packed documents; not with
            ``"flash"`` and ``"triton"``.

    Returns:
        (batch, heads, n, d_v) of q's dtype.

    Raises:
        InputError: arguments that do not fit the above or each other, an unknown backend, or one that is not installed
            or cannot do what the plan needs.
    """
    check_attention_inputs(q, k, plan.causal)
    _check(q, k, v, plan, causal, key_bias, mask)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if backend not in _BACKENDS:
        raise InputError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if isinstance(plan, SegmentedPlan):
        return _attend_segments(q, k, v, plan, factor, mask, backend)
    if plan.mask is not None:
        mask = plan.mask.expand(plan.batch, -1, -1, -1) if mask is None else plan.mask & mask
    return _BACKENDS[backend](q, k, v, plan, factor, key_bias, mask)


def _attend_segments(
    q: Tensor, k: Tensor, v: Tensor, plan: SegmentedPlan, scale: float, mask: Tensor | None, backend: str
) -> Tensor:
    """Every segment as a sequence of its own; zeros for queries in none."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for segment, part in plan.parts:
        inputs = segment.of_queries(q), segment.of_keys(k), segment.of_keys(v)
        allowed = None if mask is None else segment.of_mask(mask)
        if part is None:
            if segment.mask is not None:
                allowed = segment.mask if allowed is None else segment.mask & allowed
            found = dense_attention(*inputs, causal=segment.mask is None, scale=scale, mask=allowed)
        else:
            found = sparse_attention(*inputs, part, scale=scale, mask=allowed, backend=backend)
        segment.put_queries(out, found)
    return out


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """SDPA with this project's conventions: causal masks aligned at the last query, and a bias per key.

    Arguments as in :func:`sparse_attention`; the mask is applied beside causality.
    """
    n, m = q.shape[2], k.shape[2]
    # PyTorch aligns its own causal mask at the first query, which is the same only for n = m.
    is_causal = causal and n == m > 1 and key_bias is None and mask is None
    allowed = mask
    if causal and not is_causal and n > 1:
        triangle = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        allowed = triangle if mask is None else mask & triangle
    if key_bias is not None:
        bias = key_bias.to(q.dtype)[:, None, None]
        allowed = bias.expand(-1, 1, n, -1) if allowed is None else torch.where(allowed, bias, -torch.inf)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attend_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan,
    scale: float,
    key_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    if plan.first_keys is None and plan.dense:
        return dense_attention(q, k, v, causal=plan.causal, scale=scale, key_bias=key_bias, mask=mask)
    if plan.num_queries == 1 and plan.kind == "blocks" and key_bias is None and mask is None and serves(q, k, v):
        return attend_chosen_pages(q, k, v, plan.block_mask, plan.block_size, scale, plan.first_keys)
    if plan.first_keys is not None:
        return attend_pages(q, k, v, plan, scale, mask)
    if key_bias is None and keeps_own_blocks(plan):
        attend = attend_pages if plan.num_queries == 1 else attend_causal_blocks
        return attend(q, k, v, plan, scale, mask)
    gathered = gather(q, k, v, plan, key_bias, mask)
    out = scaled_dot_product_attention(gathered.q, gathered.k, gathered.v, attn_mask=gathered.mask, scale=scale)
    return gathered.scatter(out)


_Attend = Callable[[Tensor, Tensor, Tensor, SparsityPlan, float, Tensor | None, Tensor | None], Tensor]

_BACKENDS: dict[str, _Attend] = {
    "reference": attend_reference,
    "gather": _attend_gather,
    "flex": attend_flex,
    "flash": attend_flash,
    "triton": attend_triton,
}


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan | SegmentedPlan,
    causal: bool | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    if not isinstance(v, Tensor) or v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise InputError(f"v must have shape {tuple(k.shape[:3])} + (d_v,), got {tuple(getattr(v, 'shape', ()))}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if causal is not None and bool(causal) != plan.causal:
        raise InputError(f"causal={causal} contradicts the plan, which was made with causal={plan.causal}")
    sizes = (plan.batch, plan.num_heads, plan.num_queries, plan.num_keys)
    if sizes != (q.shape[0], q.shape[1], q.shape[2], k.shape[2]):
        raise InputError(
            f"the plan was made for batch, heads, queries and keys {sizes}, got "
            f"{(q.shape[0], q.shape[1], q.shape[2], k.shape[2])}"
        )
    segmented = isinstance(plan, SegmentedPlan)
    if key_bias is not None and (segmented or plan.first_keys is not None):
        raise InputError("plans of segments and of sequences that begin at different keys take no key_bias")
    if not segmented and plan.plan_heads not in (1, k.shape[1]):
        raise InputError(f"a plan with {plan.plan_heads} sets of choices does not fit {k.shape[1]} key heads")
    if key_bias is not None and (not key_bias.is_floating_point() or key_bias.shape != (k.shape[0], k.shape[2])):
        raise InputError(f"key_bias must be floating point of shape {(k.shape[0], k.shape[2])}")
    wanted = (q.shape[0], 1, q.shape[2], k.shape[2])
    if mask is not None and (mask.dtype != torch.bool or mask.shape != wanted):
        raise InputError(f"mask must be bool of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}")
