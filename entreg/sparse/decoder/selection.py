"""Which blocks of keys a decoder's blocks of queries need: estimates of attention mass, and budgets that share it out.

All scores are shared by the query heads that read one key head, because a block that is copied serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from entreg.entropy.soft_partition import entropy_of_masses
from entreg.sparse.backends.triton.entries import fused_entries
from entreg.sparse.block_scores import last_visible, pooled_block_scores
from entreg.sparse.config import DecoderSparsity
from entreg.sparse.counting import num_blocks, query_offset
from entreg.sparse.registries import SELECTIONS

# Query blocks whose estimates are computed together: their keys end at the last of them, so that little of the causal
# upper part is computed. An eighth of a prompt, within these bounds: more would not stay in a cache.
_LEAST_TOGETHER, _MOST_TOGETHER = 8, 16
LEAST_CHOICE = 3
"""Blocks per row: the sink, the row's own and one to choose."""
_FITTING_STEPS = 4
# Weight of a row's own sample beside what the mixture expects; chosen by validation text.
_OWN_SAMPLE = 0.3


@dataclass(frozen=True)
class SelectionInputs:
    """What blocks are chosen by.

    Attributes:
        q: (batch, heads, n, d).
        k: (batch, key_heads, m, d), m >= n.
        sparsity: the settings.
        block_size: of the plan.
        count: key blocks per row of the plan's uniform budget.
        visible: bool, broadcastable to the scores: pairs with an allowed entry.
        scale: factor of the logits; None for 1/sqrt(d).
        mask: (batch or 1, 1, n, m) bool of allowed entries, or None.
    """

    q: Tensor
    k: Tensor
    sparsity: DecoderSparsity
    block_size: int
    count: int
    visible: Tensor
    scale: float | None
    mask: Tensor | None

    def of_key_heads(self, scores: Tensor) -> Tensor:
        """(batch, heads, ...) as (batch, key_heads, heads that share one, ...)."""
        return scores.unflatten(1, (self.k.shape[1], -1))


class BlockSelection:
    """How a decoder's blocks of keys are chosen. A new one overrides :meth:`scores`; and :meth:`entries` if it costs.

    Attributes:
        estimates_mass: the scores are attention mass, which budgets other than ``uniform`` share out.
        single_keys: it chooses keys instead of blocks, which only the backend ``reference`` can do.
        by_place: it does not look at the keys; pages of decoding are chosen by place, too.
    """

    estimates_mass = True
    single_keys = False
    by_place = False

    def scores(self, inputs: SelectionInputs) -> Tensor:
        """Score every pair of blocks: (batch, key_heads or 1, query_blocks, key_blocks), as :func:`block_scores`."""
        raise NotImplementedError

    def entries(self, sparsity: DecoderSparsity, num_queries: int, num_keys: int) -> int:
        """Score entries per head that the scores cost, or the kernels that stand for them; by default none."""
        return 0


class Window(BlockSelection):
    """The latest blocks."""

    estimates_mass = False
    by_place = True

    def scores(self, inputs: SelectionInputs) -> Tensor:
        n, m, size = inputs.q.shape[2], inputs.k.shape[2], inputs.block_size
        rows = num_blocks(n + query_offset(n, m, size, True), size)
        columns = torch.arange(num_blocks(m, size), device=inputs.q.device, dtype=torch.float32)
        return columns.expand(len(inputs.q), 1, rows, -1)


class Oracle(BlockSelection):
    """Full attention, whose cost is not counted."""

    def scores(self, inputs: SelectionInputs) -> Tensor:
        size = inputs.block_size
        return inputs.of_key_heads(_sampled_scores(inputs.q, inputs.k, size, size, inputs.scale, inputs.mask)).mean(2)


class TopKeys(Oracle):
    """The same for single keys of single queries."""

    estimates_mass = False
    single_keys = True


class Pooled(BlockSelection):
    """Attention between means of queries and keys."""

    def scores(self, inputs: SelectionInputs) -> Tensor:
        q, k, pool = inputs.q, inputs.k, inputs.sparsity.pool_size
        parts = _chunks(inputs.block_size, q.shape[2], k.shape[2])
        pooled = pooled_block_scores(
            q,
            k,
            inputs.block_size,
            scale=inputs.scale,
            causal=True,
            permutation=None,
            pool_size=pool,
            parts=parts,
            mask=inputs.mask,
        )
        return inputs.of_key_heads(pooled).mean(2)

    def entries(self, sparsity: DecoderSparsity, num_queries: int, num_keys: int) -> int:
        size, pools = sparsity.block_size, sparsity.block_size // sparsity.pool_size
        if sparsity.backend == "triton":
            return fused_entries(num_queries, num_keys, size, pools, sparsity.pool_size)
        chunks = _chunks(size, num_queries, num_keys)
        return sum((end - start) * pools * num_blocks(keys, size) * pools for start, end, keys in chunks)


class Sampled(BlockSelection):
    """Attention of sampled queries to all keys, shared with neighbours."""

    def estimates(self, inputs: SelectionInputs) -> tuple[Tensor, Tensor]:
        """The samples' own attention mass, and the same with that of the neighbours."""
        sparsity = inputs.sparsity
        number = sparsity.num_sampled_queries
        sampled = inputs.of_key_heads(
            _sampled_scores(inputs.q, inputs.k, number, inputs.block_size, inputs.scale, inputs.mask)
        )
        sampled = sampled.mean(2) if sparsity.group_reduction == "mean" else sampled.amax(2)
        return sampled, _shared_along(_shared_along(sampled, sparsity.diagonal_radius, 1), sparsity.column_radius, 0)

    def scores(self, inputs: SelectionInputs) -> Tensor:
        return self.estimates(inputs)[1]

    def entries(self, sparsity: DecoderSparsity, num_queries: int, num_keys: int) -> int:
        size, number = sparsity.block_size, sparsity.num_sampled_queries
        if sparsity.backend == "triton":
            return fused_entries(num_queries, num_keys, size, number, 1)
        return sum((end - start) * number * keys for start, end, keys in _chunks(size, num_queries, num_keys))


class Mixture(BlockSelection):
    """Both estimates, with the weights that make the samples most likely."""

    pooled, sampled = Pooled(), Sampled()

    def scores(self, inputs: SelectionInputs) -> Tensor:
        pooled, (sampled, neighbours) = self.pooled.scores(inputs), self.sampled.estimates(inputs)
        return self.chosen(sampled, neighbours, pooled, inputs)

    def chosen(self, sampled: Tensor, neighbours: Tensor, pooled: Tensor, inputs: SelectionInputs) -> Tensor:
        """One estimate of the two."""
        return _mixture(sampled, neighbours, pooled, inputs.sparsity.validation_radius, inputs.visible)

    def entries(self, sparsity: DecoderSparsity, num_queries: int, num_keys: int) -> int:
        return sum(one.entries(sparsity, num_queries, num_keys) for one in (self.pooled, self.sampled))


class Validated(Mixture):
    """The estimate that predicts the samples better."""

    def chosen(self, sampled: Tensor, neighbours: Tensor, pooled: Tensor, inputs: SelectionInputs) -> Tensor:
        return _validated(sampled, neighbours, pooled, inputs.sparsity, inputs.count, inputs.visible)


SELECTIONS.register("validated", Validated())
SELECTIONS.register("mixture", Mixture())
SELECTIONS.register("pooled", Pooled())
SELECTIONS.register("sampled", Sampled())
SELECTIONS.register("oracle", Oracle())
SELECTIONS.register("window", Window())
SELECTIONS.register("topk", TopKeys())


def selection_entries(sparsity: DecoderSparsity, num_queries: int, num_keys: int) -> int:
    """Score entries per head that :func:`block_scores`, or the kernels that stand for it with the backend ``triton``,
    compute; 0 for ``window``, and for ``oracle`` by definition.
    """
    return SELECTIONS[sparsity.selection].entries(sparsity, num_queries, num_keys)


def block_scores(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    block_size: int,
    count: int,
    visible: Tensor,
    *,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    """Estimate the attention mass of every pair of blocks, the same for the query heads that share a key head.

    Arguments as in :class:`SelectionInputs`; the ``selection`` of ``sparsity`` says how.

    Returns:
        (batch, key_heads or 1, query_blocks, key_blocks) float32 or float64. What no query may see has any value.
    """
    inputs = SelectionInputs(q, k, sparsity, block_size, count, visible, scale, mask)
    return SELECTIONS[sparsity.selection].scores(inputs)


def _validated(
    sampled: Tensor, neighbours: Tensor, pooled: Tensor, sparsity: DecoderSparsity, count: int, visible: Tensor
) -> Tensor:
    """For every head and stretch of rows the estimate that predicts the samples better.

    ``neighbours`` without a row's own sample and ``pooled`` each choose as many blocks as the budget leaves; the
    sampled attention that falls into them, summed over the rows of the stretch, is how well they predict.
    """
    free = _free(sampled, visible)
    # The sink and the row's own block are kept in any case.
    number = min(max(count - 2, 1), sampled.shape[-1])

    def predicted(scores: Tensor) -> Tensor:
        chosen = scores.masked_fill(~free, -1.0).topk(number, dim=-1).indices
        hits = sampled.masked_fill(~free, 0.0).gather(-1, chosen).sum(-1)
        return _over_stretches(hits, sparsity.validation_radius)

    better = predicted(neighbours - sampled) > sparsity.validation_margin * predicted(pooled)
    return torch.where(better.unsqueeze(-1), neighbours, pooled + sampled)


def _mixture(sampled: Tensor, neighbours: Tensor, pooled: Tensor, radius: int, visible: Tensor) -> Tensor:
    """Both estimates as distributions over blocks, mixed for every head and row as the samples ask for.

    The weights are those of the most likely mixture of ``neighbours`` without a row's own sample and ``pooled`` (least
    cross-entropy of the sampled attention, over the rows of a stretch), by expectation maximisation from one half. What
    is kept in any case, the sink and the row's own block, takes no part.
    """
    free = _free(sampled, visible)
    tiny = torch.finfo(sampled.dtype).tiny

    def distribution(scores: Tensor) -> Tensor:
        scores = scores.masked_fill(~free, 0.0).clamp_min(0.0)
        return scores / scores.sum(-1, keepdim=True).clamp_min(tiny)

    observed = sampled.masked_fill(~free, 0.0)
    # A floor: one sample that an estimate finds impossible does not decide.
    held_out, wide = distribution(neighbours - sampled) + 1e-6, distribution(pooled)
    total = _over_stretches(observed.sum(-1), radius).clamp_min(tiny)
    weight = torch.full_like(total, 0.5)
    for _ in range(_FITTING_STEPS):
        share = weight.unsqueeze(-1) * held_out
        explained = observed * share / (share + (1.0 - weight.unsqueeze(-1)) * (wide + 1e-6))
        weight = (_over_stretches(explained.sum(-1), radius) / total).clamp(0.0, 1.0)
    weight = weight.unsqueeze(-1)
    return weight * distribution(neighbours) + (1.0 - weight) * wide + _OWN_SAMPLE * distribution(sampled)


def _free(scores: Tensor, visible: Tensor) -> Tensor:
    """Pairs of blocks among which there is a choice: neither the sink nor the row's own block."""
    free = visible.expand_as(scores).scatter(-1, last_visible(visible).expand(*scores.shape[:3], 1), False)
    return free.scatter(-1, _first_visible(scores, visible), False)


def _over_stretches(values: Tensor, radius: int) -> Tensor:
    """Sums, but for a factor, of (batch, heads, rows) over ``radius`` rows before and after each."""
    # The mean with zeros beyond the ends, in proportion to the sum.
    return avg_pool1d(pad(values, (radius, radius)), 2 * radius + 1, stride=1)


def _shared_along(scores: Tensor, radius: int, slope: int) -> Tensor:
    """Every pair plus its neighbours (row + i, column + slope * i), weighted 1 - |i| / (radius + 1)."""
    rows, columns = scores.shape[-2:]
    total = scores.clone() if radius else scores
    for shift in range(1, min(radius, rows - 1, columns - 1 if slope else rows) + 1):
        weight, across = 1.0 - shift / (radius + 1), shift * slope
        total[..., shift:, across:] += weight * scores[..., : rows - shift, : columns - across]
        total[..., : rows - shift, : columns - across] += weight * scores[..., shift:, across:]
    return total


def with_kept_blocks(scores: Tensor, visible: Tensor, local_blocks: int) -> Tensor:
    """The scores with what is always kept above all others: each row's first visible block and those before its own.

    The first one is the attention sink of the row's document. The row's own block is marked by those who choose.
    """
    own = last_visible(visible)
    scores = scores.clone()
    for back in range(1, local_blocks + 1):
        before = (own - back).clamp_min(0).expand(*scores.shape[:3], 1)
        # Nearer blocks win where the budget does not hold all.
        scores.scatter_(-1, before, torch.finfo(scores.dtype).max / (back + 1))
    return scores.scatter(-1, _first_visible(scores, visible), torch.finfo(scores.dtype).max)


def counts_by_entropy(
    scores: Tensor, least: int, density: float, visible: Tensor, densities: Sequence[float]
) -> Tensor:
    """Key blocks per row and head in proportion to exp(H), whose mean density is the largest up to a given one.

    H is the entropy in nats of a row's estimated distribution over blocks, the attention sink's left out; exp(H) is
    averaged over the rows.

    Args:
        scores: (batch, key_heads, query_blocks, key_blocks), non-negative.
        least: fewest blocks per row, at least 1.
        density: that is not exceeded, unless by ``least`` blocks for all.
        visible: bool, broadcastable to the scores.
        densities: for 1, 2, ... key blocks per row the density that they have.

    Returns:
        (batch, key_heads) int64, each at least ``least``.
    """
    mass = scores.masked_fill(~visible, 0.0).scatter(-1, _first_visible(scores, visible), 0.0)
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    support = entropy_of_masses(mass).exp().mean(-1).double().cpu()
    table = torch.tensor(densities, dtype=torch.float64)
    most = len(densities)
    # The density grows with the factor in steps, where a head's count is a whole number.
    factors = (torch.arange(1, most + 1, dtype=torch.float64) / support[..., None]).flatten(1).sort(-1).values
    # Just beyond the step, whatever the rounding.
    products = factors[:, :, None] * (1.0 + 1e-12) * support[:, None]
    counts = products.floor().long().clamp(least, most)
    fitting = (table[counts - 1].mean(-1) <= density).sum(-1)
    images = torch.arange(len(counts))
    chosen = torch.where((fitting > 0)[:, None], counts[images, (fitting - 1).clamp_min(0)], least)
    return chosen.to(scores.device)


def blocks_by_mass(scores: Tensor, total: float, visible: Tensor, entries: Tensor) -> Tensor:
    """The pairs of highest score over all heads and rows of a layer.

    Args:
        scores: (batch, key_heads, query_blocks, key_blocks) of :func:`with_kept_blocks`; the largest number marks what
            is kept whatever it costs.
        total: score entries per head that may be computed.
        visible: bool, broadcastable to the scores; every row's last visible block is kept.
        entries: (query_blocks, key_blocks) float64 score entries of each pair.

    Returns:
        bool of the shape of the scores.
    """
    visible = visible.expand_as(scores)
    ranked = scores.scatter(-1, last_visible(visible), torch.inf).masked_fill(~visible, -torch.inf).flatten(1)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    cost = entries.expand_as(scores).flatten(1).gather(1, order)
    forced = ranked.gather(1, order) >= torch.finfo(scores.dtype).max
    kept = (cost.cumsum(1) <= total * scores.shape[1] + 0.5) | forced
    chosen = torch.zeros_like(kept).scatter(1, order, kept).view_as(scores)
    return chosen & visible


def _first_visible(scores: Tensor, visible: Tensor) -> Tensor:
    """(batch, key_heads, query_blocks, 1) number of the first key block that each row of blocks sees."""
    return visible.to(torch.int8).argmax(-1, keepdim=True).expand(*scores.shape[:3], 1)


def _chunks(block_size: int, num_queries: int, num_keys: int) -> list[tuple[int, int, int]]:
    """First and last (exclusive) query block of those computed together, and how many keys the last of them sees."""
    rows = num_blocks(num_queries + query_offset(num_queries, num_keys, block_size, True), block_size)
    first = (num_keys - num_queries) // block_size
    together = min(max(rows // 8, _LEAST_TOGETHER), _MOST_TOGETHER)
    starts = range(0, rows, together)
    ends = [min(start + together, rows) for start in starts]
    return [(start, end, min((first + end) * block_size, num_keys)) for start, end in zip(starts, ends, strict=True)]


def _sampled_scores(
    q: Tensor, k: Tensor, number: int, block_size: int, scale: float | None, mask: Tensor | None
) -> Tensor:
    """(batch, heads, query_blocks, key_blocks): mean attention of evenly spaced queries of each block to key blocks."""
    batch, heads, n, width = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
    blocks = num_blocks(m, block_size)
    if k.device.type == "cpu" and k.stride(2) != width:
        # Each head's keys in one piece, for the products.
        k = k.contiguous()
    within = ((torch.arange(number, device=q.device) + 0.5) * block_size / number).long()
    parts = []
    for start, end, keys in _chunks(block_size, n, m):
        block = torch.arange(start, end, device=q.device)
        # Blocks that are cut short by the first or last query repeat their nearest row.
        rows = (block[:, None] * block_size + within - query_offset(n, m, block_size, True)).clamp(0, n - 1).flatten()
        chosen = (q.index_select(2, rows) * factor).reshape(batch, key_heads, -1, width)
        logits = _products(chosen, k[:, :, :keys]).view(batch, heads, -1, keys)
        mass = _masses(logits, rows, start, block_size, n, m, mask)
        mass = mass.unflatten(2, (end - start, number)).mean(3)
        parts.append(pad(mass, (0, blocks - mass.shape[-1])))
    return torch.cat(parts, dim=2)


def _masses(
    logits: Tensor, rows: Tensor, first_block: int, block_size: int, n: int, m: int, mask: Tensor | None
) -> Tensor:
    """Softmax over the keys that each row may see, summed over blocks of them; float32 or float64."""
    keys, wide = logits.shape[-1], torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype != torch.bfloat16:
        # A key's mass may lie below the range of float16.
        logits = logits.to(wide)
    # All rows see the keys before their first block.
    seen = 0 if mask is not None else min((first_block + (m - n) // block_size) * block_size, keys)
    if mask is None:
        allowed = torch.arange(seen, keys, device=logits.device) <= (rows + (m - n))[:, None]
    else:
        allowed = mask[:, :, :, :keys].index_select(2, rows)
    logits[..., seen:].masked_fill_(~allowed, torch.finfo(logits.dtype).min)
    mass = torch.softmax(logits, dim=-1)
    ragged = -keys % block_size
    mass = pad(mass, (0, ragged)) if ragged else mass
    return mass.unflatten(-1, (-1, block_size)).sum(-1, dtype=wide)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T of (batch, heads, n, d) and (batch, heads, m, d)."""
    if q.device.type != "cpu" or q.requires_grad or k.requires_grad:
        return q @ k.transpose(-1, -2)
    # One product per head: a batched one packs all keys anew for a few rows of queries, which takes far longer.
    out = q.new_empty(*q.shape[:3], k.shape[2])
    for batch in range(len(q)):
        for head in range(q.shape[1]):
            torch.mm(q[batch, head], k[batch, head].t(), out=out[batch, head])
    return out
