"""Sparse attention of causal decoders: blocks of keys for a prompt, pages of keys for a token that is written.

One function, :func:`decoder_attention`, goes from the budget to the output; what an adapter must keep between calls is
a :class:`PageSummaries` per layer and cache. The choice has no gradient, attention itself has.

What is chosen, the estimators and their defaults are our choice: the paper gives a sparsity for its language models and
neither a plan nor a kernel. ``window`` follows StreamingLLM (attention sink + local window), page means follow the
block-sparse literature; entropy enters as a budget: exp(H) of a head's distribution over blocks is the number of
blocks that it uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse._block_scores import (
    block_scores,
    joint_blocks,
    pages_from_summaries,
    row_scores,
    support_counts,
    visible_from_mask,
)
from entreg.sparse._blocks import highest_blocks, visible_blocks
from entreg.sparse._counting import dense_entries
from entreg.sparse.attention import dense_attention, sparse_attention
from entreg.sparse.config import DecoderSparsity
from entreg.sparse.plan import SparsityPlan
from entreg.sparse.planning import blocks_for_density

# The sink's block and the query's own.
_LEAST_BLOCKS = 2


class PageSummaries:
    """Means of the complete pages of one layer's key cache, brought up to date as the cache grows.

    A cache may be cropped, reordered or replaced between calls: the last key of every page is kept and compared, and
    what differs is computed anew.

    Args:
        page_size: keys per page, at least 1.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._means: Tensor | None = None
        self._last_keys: Tensor | None = None

    def update(self, k: Tensor) -> Tensor:
        """Means of all complete pages of k (batch, key_heads, m, d): (batch, key_heads, pages, d), in k's dtype."""
        size = self.page_size
        pages = k.shape[2] // size
        last_keys = k[:, :, size - 1 : pages * size : size]
        known = self._known_pages(last_keys)
        if known < pages:
            new = k[:, :, known * size : pages * size].unflatten(2, (pages - known, size)).mean(3)
            self._means = new if known == 0 else torch.cat((self._means[:, :, :known], new), dim=2)
            self._last_keys = last_keys.clone()
        return self._means[:, :, :pages] if pages else k[:, :, :0]

    def _known_pages(self, last_keys: Tensor) -> int:
        kept = self._last_keys
        if kept is None or kept.dtype != last_keys.dtype or kept.shape[:2] != last_keys.shape[:2]:
            return 0
        both = min(kept.shape[2], last_keys.shape[2])
        same = (kept[:, :, :both] == last_keys[:, :, :both]).all(-1).all(1).all(0)
        return int(same.to(torch.int64).cumprod(0).sum())


def decoder_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparsity: DecoderSparsity,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    pages: PageSummaries | None = None,
) -> tuple[Tensor, SparsityPlan | None]:
    """Causal attention of a decoder layer under a budget.

    Args:
        q: (batch, heads, n, d), floating point, positions already applied. One query (n = 1) is a decoding step, more
            are (a chunk of) a prompt.
        k: (batch, key_heads, m, d) of all tokens so far, m >= n; heads is a multiple of key_heads.
        v: (batch, key_heads, m, d_v).
        sparsity: see the class.
        scale: factor of the logits; default 1/sqrt(d).
        mask: (batch, 1, n, m) bool, True where attention is allowed, causality included (padding, packed documents,
            sliding windows); None: query i sees the keys 0 ... i + m - n.
        pages: summaries of this layer's cache from the steps before; None computes them anew.

    Returns:
        (batch, heads, n, d_v), and the plan, or None where the sequence is so short that the budget leaves no choice
        and attention is dense. Rows that are allowed no key at all are arbitrary, but finite.

    Raises:
        InputError: arguments that do not fit the above.
    """
    n, m = q.shape[2], k.shape[2]
    if n > m:
        raise InputError(f"causal attention needs at least as many keys as queries, got {m} < {n}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(q), 1, n, m)):
        raise InputError(f"mask must be bool of shape {(len(q), 1, n, m)}, got {mask.dtype} {tuple(mask.shape)}")
    with torch.no_grad():
        if n == 1:
            plan = _page_plan(q, k, sparsity, scale, mask, pages)
        else:
            plan = _prompt_plan(q, k, sparsity, scale, mask)
    if plan is None:
        return dense_attention(q, k, v, causal=True, scale=scale, mask=mask), None
    return sparse_attention(q, k, v, plan, scale=scale, mask=mask, backend=sparsity.backend), plan


def _prompt_plan(
    q: Tensor, k: Tensor, sparsity: DecoderSparsity, scale: float | None, mask: Tensor | None
) -> SparsityPlan | None:
    if sparsity.sparsity == 0:
        return None
    n, m = q.shape[2], k.shape[2]
    size = 1 if sparsity.selection == "topk" else sparsity.block_size
    scored = row_scores(q, k, sparsity, size)
    count = blocks_for_density(n, m, size, 1.0 - sparsity.sparsity - scored.entries / dense_entries(n, m, True))
    if count < _LEAST_BLOCKS:
        return None
    visible = visible_blocks(n, m, size, q.device) if mask is None else visible_from_mask(mask, size)
    scores = block_scores(q, k, sparsity, size, scale, mask, visible)
    if sparsity.budget == "mass":
        chosen = joint_blocks(scores, count, n, m, size, visible)
    else:
        counts = count
        if sparsity.budget == "entropy":
            counts = support_counts(scores, count, n, m, size)
        chosen = highest_blocks(scores, counts, 1, visible)
    return SparsityPlan(
        "blocks",
        num_queries=n,
        num_keys=m,
        num_heads=q.shape[1],
        causal=True,
        block_mask=chosen,
        block_size=size,
        selection_entries=scored.entries,
    )


def _page_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    scale: float | None,
    mask: Tensor | None,
    pages: PageSummaries | None,
) -> SparsityPlan | None: ...
