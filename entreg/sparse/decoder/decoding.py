"""Sparse attention of causal decoders: blocks of keys for a prompt, pages of keys for a token that is written.

One function, :func:`decoder_attention`, goes from the budget to the output; what an adapter must keep between calls is
a :class:`PageSummaries` per layer and cache. The choice has no gradient, attention itself has.

What is chosen, the estimators and their defaults are our choice: the paper gives a sparsity for its language models and
neither a plan nor a kernel. ``window`` follows StreamingLLM (attention sink + local window), page means follow the
block-sparse literature; entropy enters as a budget: exp(H) of a head's distribution over blocks is the number of
blocks that it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from entreg.errors import InputError
from entreg.sparse.attention import dense_attention, sparse_attention
from entreg.sparse.backends import page_loops
from entreg.sparse.backends.loops import serves
from entreg.sparse.backends.triton.entry import (
    FUSED_SELECTIONS,
    chosen_by_kernels,
    estimated_by_kernels,
    pages_by_kernels,
    require_kernels,
)
from entreg.sparse.block_scores import highest_blocks, visible_blocks, visible_from_mask
from entreg.sparse.config import DecoderSparsity
from entreg.sparse.counting import block_entries, dense_entries, mask_entries
from entreg.sparse.decoder.masks import MaskForm, Segment, mask_form
from entreg.sparse.decoder.selection import (
    LEAST_CHOICE,
    block_scores,
    blocks_by_mass,
    counts_by_entropy,
    selection_entries,
    with_kept_blocks,
)
from entreg.sparse.plan import BlockLists, SegmentedPlan, SparsityPlan
from entreg.sparse.planning import block_densities, blocks_within, densities_of_entries
from entreg.sparse.registries import SELECTIONS

MOST_WRITTEN = 32
"""Queries up to which a pass that continues a cache is decoding; transformers' assistants guess 10 to 20 tokens."""

# Leading components of a key that tell it from others.
_COMPARED = 8
# The sink's block and the query's own.
_LEAST_BLOCKS = 2


def is_decoding(num_queries: int, num_keys: int) -> bool:
    """Whether a pass writes tokens, and does not read (a chunk of) a prompt.

    One query does, and so do up to :data:`MOST_WRITTEN` that continue a cache: speculative decoding verifies guessed
    tokens so, and gives what decoding step by step gives only if every one of them is served as in a step of its own.

    Args:
        num_queries: n.
        num_keys: m, the queries' own among them.
    """
    return num_queries == 1 or (num_queries <= MOST_WRITTEN and num_queries < num_keys)


class PageSummaries:
    """Means of the complete pages of one layer's key cache, brought up to date as the cache grows.

    A cache may be cropped and written on: pages with keys that the current pass has written are computed anew. It may
    also be reordered or replaced between calls: part of one head's last key of every page is kept and compared, and
    what differs is computed anew. (In a model's first layer, where a key knows nothing of the tokens before it, a page
    that was rewritten by a pass that is not served here and ends in the same token is taken for the old one. That
    concerns which pages are chosen there, never what is read from them.)

    Args:
        page_size: keys per page, at least 1.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._means: Tensor | None = None
        self._last_keys: Tensor | None = None
        self._first_keys: tuple[int, ...] | None = None
        self._filled = np.zeros(0, np.int64)
        self.buffers: tuple[Tensor, Tensor] | None = None
        """Of the backend ``triton``: means and parts of last keys, with room for more pages; its kernel compares."""

    def update(self, k: Tensor, first_keys: tuple[int, ...] | None = None) -> Tensor:
        """Means of all complete pages.

        Args:
            k: (batch, key_heads, m, d).
            first_keys: where the pages of each sequence begin; None for 0.

        Returns:
            (batch, key_heads, pages, d) in k's dtype, valid until the next call. Of a sequence with fewer pages than
            others, those behind its own mean nothing.
        """
        size, k = self.page_size, k.detach()
        complete = self._pages_before(k.shape[2], first_keys)
        pages = (k.shape[2] - min(first_keys or (0,))) // size
        self._make_room(k, pages, first_keys)
        known = self._known_pages(k, np.minimum(self._filled, complete))
        if (known < complete).any():
            if first_keys is None:
                low = int(known.min())
                new = k[:, :, low * size : pages * size].unflatten(2, (pages - low, size))
                self._means[:, :, low:pages] = new.mean(3)
                self._last_keys[:, :, low:pages] = new[:, :1, :, -1, : self._last_keys.shape[3]]
            else:
                self._add_pages(k, known, complete)
            self._filled[:] = complete
        return self._means[:, :, :pages]

    def forget(self, num_old: int) -> None:
        """Trust no page any more that has a key behind so many of the cache."""
        self._filled = np.minimum(self._filled, self._pages_before(num_old, self._first_keys))
        if self.buffers is not None:
            # Which no key equals.
            self.buffers[1][:, :, num_old // self.page_size :] = torch.nan

    def _pages_before(self, end: int, first_keys: tuple[int, ...] | None) -> int | np.ndarray:
        """Pages that are complete before a key, of all sequences or (batch,) int64."""
        if first_keys is None:
            return end // self.page_size
        return (end - np.array(first_keys, np.int64)).clip(0) // self.page_size

    def _make_room(self, k: Tensor, pages: int, first_keys: tuple[int, ...] | None) -> None:
        """Buffers for so many pages, with what is known, if it is of such keys and pages."""
        means = self._means
        fits = (
            means is not None
            and (means.dtype, means.device) == (k.dtype, k.device)
            and (means.shape[:2], means.shape[3]) == (k.shape[:2], k.shape[3])
            and self._first_keys == first_keys
        )
        if fits and means.shape[2] >= pages:
            return
        room = pages + pages // 4 + 1
        old = means, self._last_keys
        self._means = k.new_zeros(*k.shape[:2], room, k.shape[3])
        self._last_keys = k.new_zeros(len(k), 1, room, min(_COMPARED, k.shape[3]))
        if fits:
            for buffer, kept in zip((self._means, self._last_keys), old, strict=True):
                buffer[:, :, : kept.shape[2]] = kept
        else:
            self._first_keys, self._filled = first_keys, np.zeros(len(k), np.int64)

    def _known_pages(self, k: Tensor, pages: np.ndarray) -> np.ndarray:
        """(batch,) leading pages, out of so many, that are as they were."""
        if serves(k):
            return page_loops.known_pages(k[:, :1], self._last_keys, self.page_size, pages, self._first_keys)
        most = int(pages.max(initial=0))
        ends = torch.arange(1, most + 1, device=k.device) * self.page_size - 1
        ends = ends + torch.tensor(self._first_keys or (0,) * len(k), device=k.device)[:, None]
        found = k[torch.arange(len(k), device=k.device)[:, None], 0, ends.clamp_max(k.shape[2] - 1)]
        same = (found[..., : self._last_keys.shape[3]] == self._last_keys[:, 0, :most]).all(-1)
        return np.minimum(same.to(torch.int64).cumprod(1).sum(1).cpu().numpy(), pages)

    def _add_pages(self, k: Tensor, known: np.ndarray, complete: np.ndarray) -> None:
        """Means of the pages between two numbers for each sequence, which do not begin at the same places."""
        pages = np.arange(complete.max())
        sequences, new = np.nonzero((pages >= known[:, None]) & (pages < complete[:, None]))
        starts = np.array(self._first_keys)[sequences] + new * self.page_size
        sequences, new, starts = (torch.from_numpy(one).to(k.device) for one in (sequences, new, starts))
        places = starts[:, None] + torch.arange(self.page_size, device=k.device)
        # (new pages, page size, key_heads, d).
        keys = k.transpose(1, 2)[sequences[:, None], places]
        self._means[sequences, :, new] = keys.mean(1)
        self._last_keys[sequences, 0, new] = keys[:, -1, 0, : self._last_keys.shape[3]]


def decoder_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparsity: DecoderSparsity,
    *,
    scale: float | None = None,
    mask: Tensor | MaskForm | None = None,
    pages: PageSummaries | None = None,
    num_guessed: int = 0,
) -> tuple[Tensor, SparsityPlan | SegmentedPlan | None]:
    """Causal attention of a decoder layer under a budget.

    Args:
        q: (batch, heads, n, d), floating point, positions already applied. Whether they are written or read (a chunk
            of a prompt) says :func:`is_decoding`.
        k: (batch, key_heads, m, d) of all tokens so far, m >= n; heads is a multiple of key_heads.
        v: (batch, key_heads, m, d_v).
        sparsity: see the class.
        scale: factor of the logits; default 1/sqrt(d).
        mask: (batch, 1, n, m) bool, True where attention is allowed, causality included (padding, packed documents,
            sliding windows), or its :func:`~entreg.sparse.decoder.masks.mask_form`, which layers can share;
            None: query i sees the keys 0 ... i + m - n. What it hides decides nothing: every sequence of the batch,
            and every document within one, is planned with its own budget as if it stood alone.
        pages: summaries of this layer's cache from the steps before; None computes them anew.
        num_guessed: of the queries of a prompt, so many at the end, fewer than n, that an assistant has guessed and
            that are verified in the same pass: they are written, the others read.

    Returns:
        (batch, heads, n, d_v), and the plan, or None where all sequences are so short that the budget leaves no choice
        and attention is dense. What queries of padding get is arbitrary, but finite.

    Raises:
        InputError: arguments that do not fit the above, or a mask that allows later keys.
    """
    form = _checked_form(q, k, mask)
    plan = decoder_plan(q, k, sparsity, scale=scale, mask=form, pages=pages, num_guessed=num_guessed)
    if plan is None:
        allowed = None if form is None else form.mask
        return dense_attention(q, k, v, causal=True, scale=scale, mask=allowed), None
    return sparse_attention(q, k, v, plan, scale=scale, backend=sparsity.backend), plan


@torch.no_grad()
def decoder_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    *,
    scale: float | None = None,
    mask: Tensor | MaskForm | None = None,
    pages: PageSummaries | None = None,
    num_guessed: int = 0,
) -> SparsityPlan | SegmentedPlan | None:
    """What :func:`decoder_attention` chooses; the plan, or None where attention is dense.

    Arguments and errors as there.
    """
    form = _checked_form(q, k, mask)
    if pages is not None:
        pages.forget(k.shape[2] - q.shape[2])
    n, m = q.shape[2], k.shape[2]
    if not 0 <= num_guessed < n:
        raise InputError(f"num_guessed must be in [0, {n}), fewer than there are queries, got {num_guessed}")
    if num_guessed == 0 or is_decoding(n, m):
        return _form_plan(q, k, sparsity, scale, form, pages)
    read, parts = n - num_guessed, []
    for first, last, plan_of in ((0, read, _form_plan), (read, n, _written_plan)):
        end = m - n + last
        part = None if form is None else form.part(first, last)
        plan = plan_of(q[:, :, first:last], k[:, :, :end], sparsity, scale, part, pages)
        parts.append((_segment_of(part, len(q), slice(first, last), slice(0, end)), plan))
    return _joined(q, k, parts)


def _form_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    scale: float | None,
    form: MaskForm | None,
    pages: PageSummaries | None,
) -> SparsityPlan | SegmentedPlan | None:
    """The plan of a batch under a mask."""
    n, m = q.shape[2], k.shape[2]
    if form is not None and sparsity.backend == "triton":
        written = is_decoding(n, m)
        if (_written_sparsity(sparsity) if written else sparsity.sparsity) == 0:
            return None
        require_kernels(q, k, k, sparsity.page_size if written else sparsity.block_size, 1.0, form.mask)
    if form is None or form.plain:
        return _sequence_plan(q, k, sparsity, scale, None, pages)
    if is_decoding(n, m) and (n > 1 or form.first_keys is not None):
        return _sequence_plan(q, k, sparsity, scale, form, pages)
    parts = []
    for segment in form.segments:
        if not segment.owned:
            parts.append((segment, None))
            continue
        within = None
        if segment.mask is not None:
            within = MaskForm(segment.mask.expand(len(segment.sequences), -1, -1, -1), False, None, ())
        plan = _sequence_plan(segment.of_queries(q), segment.of_keys(k), sparsity, scale, within, None)
        if plan is not None and segment.sizes == (n, m) and len(segment.sequences) == len(q):
            return plan
        parts.append((segment, plan))
    return _joined(q, k, parts)


def _checked_form(q: Tensor, k: Tensor, mask: Tensor | MaskForm | None) -> MaskForm | None:
    n, m = q.shape[2], k.shape[2]
    if n > m:
        raise InputError(f"causal attention needs at least as many keys as queries, got {m} < {n}")
    if mask is None:
        return None
    given, wanted = mask.mask if isinstance(mask, MaskForm) else mask, (len(q), 1, n, m)
    if given.dtype != torch.bool or given.shape != wanted:
        raise InputError(f"mask must be bool of shape {wanted}, got {given.dtype} {tuple(given.shape)}")
    return mask if isinstance(mask, MaskForm) else mask_form(mask)


def _joined(
    q: Tensor, k: Tensor, parts: Sequence[tuple[Segment, SparsityPlan | SegmentedPlan | None]]
) -> SegmentedPlan | None:
    """One plan of all parts; None if all are dense."""
    if all(plan is None for _, plan in parts):
        return None
    return SegmentedPlan(len(q), q.shape[2], k.shape[2], q.shape[1], tuple(parts))


def _sequence_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    scale: float | None,
    form: MaskForm | None,
    pages: PageSummaries | None,
) -> SparsityPlan | SegmentedPlan | None:
    """The plan of sequences with the same places, whose mask, if they have one, is no more than one segment."""
    n, m = q.shape[2], k.shape[2]
    if n == 1 and (form is None or form.first_keys is not None):
        return _page_plan(q, k, sparsity, scale, None if form is None else form.first_keys, pages)
    if is_decoding(n, m):
        return _written_plan(q, k, sparsity, scale, form, pages)
    return None if sparsity.sparsity == 0 else _prompt_plan(q, k, sparsity, scale, None if form is None else form.mask)


def _written_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    scale: float | None,
    form: MaskForm | None,
    pages: PageSummaries | None,
) -> SegmentedPlan | None:
    """Tokens that are written together, each as in a step of its own."""
    if _written_sparsity(sparsity) == 0:
        return None
    batch, _, n, _ = q.shape
    pages = PageSummaries(sparsity.page_size) if pages is None else pages
    parts = []
    for query in range(n):
        end = k.shape[2] - n + query + 1
        step = None if form is None else form.part(query, query + 1)
        plan = _form_plan(q[:, :, query : query + 1], k[:, :, :end], sparsity, scale, step, pages)
        parts.append((_segment_of(step, batch, slice(query, query + 1), slice(0, end)), plan))
    return _joined(q, k, parts)


def _segment_of(form: MaskForm | None, batch: int, queries: slice, keys: slice) -> Segment:
    """Some queries of all sequences, with the keys up to the last one's."""
    return Segment(tuple(range(batch)), queries, keys, None if form is None or form.plain else form.mask)


def _written_sparsity(sparsity: DecoderSparsity) -> float:
    return sparsity.sparsity if sparsity.decode_sparsity is None else sparsity.decode_sparsity


def _prompt_plan(
    q: Tensor, k: Tensor, sparsity: DecoderSparsity, scale: float | None, mask: Tensor | None
) -> SparsityPlan | None:
    n, m = q.shape[2], k.shape[2]
    kernels = sparsity.backend == "triton"
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if kernels:
        require_kernels(q, k, k, sparsity.block_size, factor, mask)
    size = 1 if SELECTIONS[sparsity.selection].single_keys else sparsity.block_size
    entries = selection_entries(sparsity, n, m)
    if mask is None:
        allowed, total = None, dense_entries(n, m, True)
        densities = block_densities(n, m, size, True, sparsity.dense_tail_blocks)
    else:
        # The same for all sequences of a segment.
        mask = mask[:1]
        allowed = mask_entries(mask, size)[0, 0]
        total = float(allowed.sum())
        densities = densities_of_entries(allowed, (m - n) // size, sparsity.dense_tail_blocks)
    # What heads do not use of it, others may; a budget that is alike for all is rounded down to whole blocks.
    density = 1.0 - sparsity.sparsity - entries / total
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
        allowed = block_entries(n, m, size, True, q.device) if allowed is None else allowed
        chosen = blocks_by_mass(scores, density * total, visible, allowed)
    else:
        counts = count
        if sparsity.budget == "entropy":
            counts = counts_by_entropy(estimated, min(count, LEAST_CHOICE), density, visible, densities)
        chosen = highest_blocks(scores, counts, 0, visible) | (visible & tail[:, None])
    return _block_plan(q, k, chosen, None, size, entries, mask=mask)


@dataclass(frozen=True, eq=False)
class _PageBudget:
    """Numbers of pages, (batch,) int64 or (1,) for all alike, and entries of choosing, the mean over the batch.

    Attributes:
        total: pages, the incomplete one included.
        complete: complete pages.
        count: pages that are attended to.
        entries: score entries per head.
    """

    total: np.ndarray
    complete: np.ndarray
    count: np.ndarray
    entries: float


# The same in all layers of a step.
@lru_cache(maxsize=16)
def _page_budget(
    num_keys: int, first_keys: tuple[int, ...] | None, size: int, sparsity: float, free: bool
) -> _PageBudget | None:
    """Pages within a budget, every sequence by itself; None where it leaves no choice to any.

    Args:
        num_keys: m.
        first_keys: where the pages of each sequence begin; None for 0.
        size: keys per page.
        sparsity: wanted, of the keys from there on.
        free: whether choosing computes no score entries.
    """
    lengths = num_keys - np.array(first_keys or (0,))
    total, complete = -(-lengths // size), lengths // size
    entries = np.zeros_like(complete) if free else complete
    # Whole pages, though the newest may be shorter: the budget is never exceeded.
    count = (((1.0 - sparsity) * lengths - entries) // size).astype(np.int64)
    choice = (count >= _LEAST_BLOCKS) & (count < total)
    if sparsity == 0 or not choice.any():
        return None
    return _PageBudget(total, complete, np.where(choice, count, total), float((entries * choice).mean()))


def _page_plan(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    scale: float | None,
    first_keys: tuple[int, ...] | None,
    pages: PageSummaries | None,
) -> SparsityPlan | None:
    key_heads, m, size = k.shape[1], k.shape[2], sparsity.page_size
    by_place = SELECTIONS[sparsity.selection].by_place
    budget = _page_budget(m, first_keys, size, _written_sparsity(sparsity), by_place)
    if budget is None:
        return None
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    summaries = PageSummaries(size) if pages is None else pages
    if sparsity.backend == "triton":
        require_kernels(q, k, k, size, factor, None)
        if not by_place:
            count = int(budget.count[0])
            chosen, lists, summaries.buffers = pages_by_kernels(q, k, summaries.buffers, sparsity, count, factor)
            return _block_plan(q, k, chosen, lists, size, budget.entries)
    if not by_place and serves(q, k):
        maximum = sparsity.group_reduction == "max"
        means = summaries.update(k, first_keys)
        chosen = page_loops.choose_pages(q, means, budget.total, budget.count, factor, maximum, budget.complete)
        return _block_plan(q, k, chosen, None, size, budget.entries, first_keys=first_keys)
    total, complete, count = (
        torch.from_numpy(one).to(q.device)[:, None, None, None] for one in (budget.total, budget.complete, budget.count)
    )
    page = torch.arange(int(budget.total.max()), device=q.device)
    scores = page.float().expand(len(q), key_heads, 1, -1)
    if not by_place:
        means = summaries.update(k, first_keys)
        logits = q.reshape(len(q), key_heads, -1, q.shape[3]) @ means.transpose(-1, -2)
        # The incomplete page, if there is one, is the query's own and kept whatever it scores.
        logits = pad(logits.to(torch.promote_types(logits.dtype, torch.float32)), (0, len(page) - means.shape[2]))
        mass = torch.softmax((logits * factor).masked_fill(page >= complete, torch.finfo(logits.dtype).min), dim=-1)
        scores = mass.mean(2, keepdim=True) if sparsity.group_reduction == "mean" else mass.amax(2, keepdim=True)
    visible = page < total
    count = int(budget.count[0]) if len(count) == 1 else count[:, :, 0, 0].expand(-1, key_heads)
    chosen = highest_blocks(with_kept_blocks(scores, visible, local_blocks=1), count, 0, visible)
    return _block_plan(q, k, chosen, None, size, budget.entries, first_keys=first_keys)


def _block_plan(
    q: Tensor,
    k: Tensor,
    chosen: Tensor,
    lists: BlockLists | None,
    size: int,
    entries: float,
    *,
    first_keys: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
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
        first_keys=first_keys,
        mask=mask,
    )
