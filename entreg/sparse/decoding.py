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
from entreg.sparse import _pages_cpu
from entreg.sparse._blocks import highest_blocks, visible_blocks
from entreg.sparse._counting import block_entries, dense_entries, num_blocks
from entreg.sparse._decoder_selection import (
    LEAST_CHOICE,
    block_scores,
    blocks_by_mass,
    counts_by_entropy,
    selection_entries,
    visible_from_mask,
    with_kept_blocks,
)
from entreg.sparse._kernels import (
    FUSED_SELECTIONS,
    chosen_by_kernels,
    estimated_by_kernels,
    pages_by_kernels,
    require_kernels,
)
from entreg.sparse._loops import serves
from entreg.sparse.attention import dense_attention, sparse_attention
from entreg.sparse.config import DecoderSparsity
from entreg.sparse.plan import BlockLists, SparsityPlan
from entreg.sparse.planning import block_densities, blocks_within

# Leading components of a key that tell it from others.
_COMPARED = 8
# The sink's block and the query's own.
_LEAST_BLOCKS = 2


class PageSummaries:
    """Means of the complete pages of one layer's key cache, brought up to date as the cache grows.

    A cache may be cropped, reordered or replaced between calls: part of one head's last key of every page is kept
    and compared, and what differs is computed anew. (In a model's first layer, where a key knows nothing of the tokens
    before it, a page that was rewritten and ends in the same token is taken for the old one. That concerns which pages
    are chosen there, never what is read from them.)

    Args:
        page_size: keys per page, at least 1.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._means: Tensor | None = None
        self._last_keys: Tensor | None = None
        self.buffers: tuple[Tensor, Tensor] | None = None
        """Of the backend ``triton``: means and parts of last keys, with room for more pages; its kernel compares."""

    def update(self, k: Tensor) -> Tensor:
        """Means of all complete pages of k (batch, key_heads, m, d): (batch, key_heads, pages, d), in k's dtype."""
        size = self.page_size
        pages = k.shape[2] // size
        known = self._known_pages(k, pages)
        if known < pages:
            new = k[:, :, known * size : pages * size].unflatten(2, (pages - known, size)).mean(3)
            self._means = new if known == 0 else torch.cat((self._means[:, :, :known], new), dim=2)
            self._last_keys = self._ends(k, pages).clone()
        return self._means[:, :, :pages] if pages else k[:, :, :0]

    def _ends(self, k: Tensor, pages: int) -> Tensor:
        return k[:, :1, self.page_size - 1 : pages * self.page_size : self.page_size, :_COMPARED]

    def _known_pages(self, k: Tensor, pages: int) -> int:
        kept, means = self._last_keys, self._means
        if kept is None or means.dtype != k.dtype or means.shape[:2] != k.shape[:2]:
            return 0
        both = min(kept.shape[2], pages)
        if serves(k):
            return _pages_cpu.known_pages(k[:, :1], kept[:, :, :both], self.page_size)
        same = (kept[:, :, :both] == self._ends(k, both)).all(-1).all(1).all(0)
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
    plan = decoder_plan(q, k, sparsity, scale=scale, mask=mask, pages=pages)
    if plan is None:
        return dense_attention(q, k, v, causal=True, scale=scale, mask=mask), None
    return sparse_attention(q, k, v, plan, scale=scale, mask=mask, backend=sparsity.backend), plan


@torch.no_grad()
def decoder_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    pages: PageSummaries | None = None,
) -> SparsityPlan | None:
    """What :func:`decoder_attention` chooses; the plan, or None where attention is dense.

    Arguments and errors as there.
    """
    n, m = q.shape[2], k.shape[2]
    if n > m:
        raise InputError(f"causal attention needs at least as many keys as queries, got {m} < {n}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(q), 1, n, m)):
        raise InputError(f"mask must be bool of shape {(len(q), 1, n, m)}, got {mask.dtype} {tuple(mask.shape)}")
    if n == 1:
        return _page_plan(q, k, sparsity, scale, mask, pages)
    return None if sparsity.sparsity == 0 else _prompt_plan(q, k, sparsity, scale, mask)


def _prompt_plan(
    q: Tensor, k: Tensor, sparsity: DecoderSparsity, scale: float | None, mask: Tensor | None
) -> SparsityPlan | None:
    n, m = q.shape[2], k.shape[2]
    kernels = sparsity.backend == "triton"
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if kernels:
        require_kernels(q, k, k, sparsity.block_size, factor, mask)
    size = 1 if sparsity.selection == "topk" else sparsity.block_size
    entries = selection_entries(sparsity, n, m)
    densities = block_densities(n, m, size, True, sparsity.dense_tail_blocks)
    # What heads do not use of it, others may; a budget that is alike for all is rounded down to whole blocks.
    density = 1.0 - sparsity.sparsity - entries / dense_entries(n, m, True)
    count = blocks_within(densities, density)
    if count < _LEAST_BLOCKS or count == len(densities):
        return None
    kernels = kernels and sparsity.selection in FUSED_SELECTIONS
    if kernels and sparsity.budget != "mass":
        return _block_plan(q, k, *chosen_by_kernels(q, k, sparsity, count, density, densities, factor), size, entries)
    visible = visible_blocks(n, m, size, q.device) if mask is None else visible_from_mask(mask, size)
    if kernels:
        estimated = estimated_by_kernels(q, k, sparsity, count, factor)
    else:
        estimated = block_scores(q, k, sparsity, size, count, visible, scale=scale, mask=mask)
    scores = with_kept_blocks(estimated, visible, sparsity.local_blocks)
    tail = torch.arange(scores.shape[2], device=q.device) >= scores.shape[2] - sparsity.dense_tail_blocks
    if sparsity.budget == "mass":
        scores = scores.masked_fill(tail[:, None], torch.finfo(scores.dtype).max)
        total = density * dense_entries(n, m, True)
        chosen = blocks_by_mass(scores, total, visible, block_entries(n, m, size, True, q.device))
    else:
        counts = count
        if sparsity.budget == "entropy":
            counts = counts_by_entropy(estimated, min(count, LEAST_CHOICE), density, visible, densities)
        chosen = highest_blocks(scores, counts, 0, visible) | (visible & tail[:, None])
    return _block_plan(q, k, chosen, None, size, entries)


def _page_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    scale: float | None,
    mask: Tensor | None,
    pages: PageSummaries | None,
) -> SparsityPlan | None:
    wanted = sparsity.sparsity if sparsity.decode_sparsity is None else sparsity.decode_sparsity
    key_heads, m, size = k.shape[1], k.shape[2], sparsity.page_size
    total, complete = num_blocks(m, size), m // size
    entries = 0 if sparsity.selection == "window" else complete
    # Whole pages, though the newest may be shorter: the budget is never exceeded.
    count = int(((1.0 - wanted) * m - entries) // size)
    if wanted == 0 or count < _LEAST_BLOCKS or count >= total:
        return None
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    summaries = PageSummaries(size) if pages is None else pages
    if sparsity.backend == "triton":
        require_kernels(q, k, k, size, factor, mask)
        if sparsity.selection != "window":
            chosen, lists, summaries.buffers = pages_by_kernels(q, k, summaries.buffers, sparsity, count, factor)
            return _block_plan(q, k, chosen, lists, size, entries)
    if sparsity.selection != "window" and mask is None and serves(q, k):
        maximum = sparsity.group_reduction == "max"
        chosen = _pages_cpu.choose_pages(q, summaries.update(k), total, count, factor, maximum)
        return _block_plan(q, k, chosen, None, size, entries)
    scores = torch.arange(total, device=q.device, dtype=torch.float32).expand(len(q), key_heads, 1, -1)
    if sparsity.selection != "window":
        logits = q.reshape(len(q), key_heads, -1, q.shape[3]) @ summaries.update(k).transpose(-1, -2)
        # The incomplete page, if there is one, is the query's own and kept whatever it scores.
        mass = torch.softmax(logits.float() * factor, dim=-1)
        mass = mass.mean(2, keepdim=True) if sparsity.group_reduction == "mean" else mass.amax(2, keepdim=True)
        scores = torch.nn.functional.pad(mass, (0, total - complete))
    visible = torch.ones(1, total, dtype=torch.bool, device=q.device)
    if mask is not None:
        visible = visible_from_mask(mask, size)
    chosen = highest_blocks(with_kept_blocks(scores, visible, local_blocks=1), count, 0, visible)
    return _block_plan(q, k, chosen, None, size, entries)


def _block_plan(
    q: Tensor, k: Tensor, chosen: Tensor, lists: BlockLists | None, size: int, entries: int
) -> SparsityPlan:
    return SparsityPlan(
        "blocks",
        num_queries=q.shape[2],
        num_keys=k.shape[2],
        num_heads=q.shape[1],
        causal=True,
        block_mask=chosen,
        block_size=size,
        selection_entries=entries,
        block_lists=lists,
    )
