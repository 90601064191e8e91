"""From queries, keys and a budget to a plan."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from entreg.entropy.attention import check_attention_inputs
from entreg.errors import InputError
from entreg.names import require_choice, require_known
from entreg.sparse.ball_partition import token_parts
from entreg.sparse.block_scores import highest_blocks, pooled_block_scores, visible_blocks
from entreg.sparse.counting import block_entries, dense_entries, num_blocks, query_offset
from entreg.sparse.plan import KINDS, SparsityPlan
from entreg.sparse.scores import score_entries, selection_scores

_DEFAULT_PARTS = 8
# A budget of 0.2 of 195 keys is 39 keys, although 0.2 * 195 is a rounding below it.
_ROUNDING = 1e-9


def make_plan(
    q: Tensor, k: Tensor, budget: int | float | Tensor, *, kind: str = "columns", **options: Any
) -> SparsityPlan:
    """Choose which score entries to compute, by the function for that kind of plan.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d); heads is a multiple of key_heads.
        budget: what a query may attend to, see the functions.
        kind: ``"columns"``, :func:`make_column_plan`, or ``"blocks"``, :func:`make_block_plan`.
        options: further arguments of that function.

    Returns:
        a :class:`~entreg.sparse.plan.SparsityPlan`.

    Raises:
        InputError: no such kind, an argument that plans of this kind do not take, or what the function refuses.
    """
    require_choice("kind", kind, KINDS, InputError)
    require_known(options, _OPTIONS[kind], "argument", f"make_plan for plans of kind '{kind}'", InputError)
    return _MAKERS[kind](q, k, budget, **options)


def make_column_plan(
    q: Tensor,
    k: Tensor,
    budget: int | float | Tensor,
    *,
    score: str | Tensor = "mixed",
    num_prefix: int = 0,
    num_sampled_queries: int | None = 16,
    scale: float | None = None,
    values: Tensor | None = None,
    features: Tensor | None = None,
    causal: bool = False,
    share_heads: bool = False,
    selection_entries: int = 0,
    generator: torch.Generator | None = None,
) -> SparsityPlan:
    """Choose keys for all queries of a head: those of highest score, the prefix always among them.

    The choice has no gradient. So that no query is left without keys, causal columns always keep the first key. A plan
    that keeps everything computes no scores.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d); heads is a multiple of key_heads.
        budget: what a query may attend to. An int: keys, the prefix included; m or more keeps everything. A float in
            (0, 1]: density of the whole path, the entries computed for the selection included, rounded down; 1.0 keeps
            everything. (Under a causal mask, where the cost depends on where columns lie, the density that columns
            spread evenly would have.) An int64 tensor (batch,) or (batch, key_heads or 1): keys for each image or
            head; smaller ones are padded.
        score: a name, see :func:`entreg.sparse.scores.selection_scores`, or a tensor (batch, heads or key_heads or 1,
            m). Scores are averaged over the query heads that share a choice, so equal sums per head are meant.
        num_prefix: leading class and register tokens, 0 to m; always kept.
        num_sampled_queries: query rows from which the score is estimated; None for all.
        scale: factor of the logits; default 1/sqrt(d).
        values: (batch, key_heads, m, d_v), for the score ``"magnitude"``.
        features: (batch, m, c) tokens, for the scores ``"magnitude"`` and ``"part"``.
        causal: query i sees the keys 0 ... i + m - n only; needs m >= n.
        share_heads: one choice for all heads instead of one per key head.
        selection_entries: score entries per head that a given ``score`` tensor has cost; they count in the plan's
            sparsity. See :func:`entreg.sparse.scores.score_entries`.
        generator: source of sampled queries, see :func:`entreg.sparse.scores.selection_scores`.

    Returns:
        a :class:`~entreg.sparse.plan.SparsityPlan`.

    Raises:
        InputError: arguments that do not fit the above, or a budget too small for what is always kept; the sentence
            then says the smallest possible one.
    """
    shape = _checked_shape(q, k, num_prefix, causal)
    if isinstance(score, str):
        of_score = {"num_prefix": num_prefix, "num_sampled_queries": num_sampled_queries, "causal": causal}
        selection_entries = score_entries(score, q.shape[2], k.shape[2], **of_score)
    # The first key is the only one that every query of a causal plan sees.
    always = max(num_prefix, 1) if causal else num_prefix
    count = _key_budget(budget, q, k, always, selection_entries, share_heads)
    if isinstance(count, int) and count == k.shape[2]:
        return SparsityPlan("columns", keys=torch.arange(count, device=k.device).expand(len(k), 1, -1), **shape)
    if isinstance(score, str):
        with torch.no_grad():
            score = selection_scores(
                q, k, score, scale=scale, values=values, features=features, generator=generator, **of_score
            )
    keys, valid = _highest_keys(_shared_scores(score, q, k, share_heads, (k.shape[2],)), count, always)
    return SparsityPlan("columns", keys=keys, key_valid=valid, selection_entries=selection_entries, **shape)


def make_block_plan(
    q: Tensor,
    k: Tensor,
    budget: int | float | Tensor,
    *,
    score: str | Tensor = "pooled",
    num_prefix: int = 0,
    scale: float | None = None,
    causal: bool = False,
    share_heads: bool = False,
    block_size: int = 16,
    num_parts: int | None = None,
    parts: Tensor | None = None,
    selection_entries: int = 0,
) -> SparsityPlan:
    """Choose for each query block the key blocks of highest score, those with prefix tokens always among them.

    The choice has no gradient. So that no query is left without keys, causal plans always keep each query block's own
    and, where the budget allows two, the first. A plan that keeps everything computes no scores.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d); heads is a multiple of key_heads.
        budget: as in :func:`make_column_plan`, rounded down to whole blocks.
        score: ``"pooled"``, attention between the mean query and the mean key of two blocks, or a tensor (batch, heads
            or key_heads or 1, query_blocks, key_blocks). Scores are averaged over the query heads that share a choice,
            so equal sums per head are meant.
        num_prefix: leading class and register tokens, 0 to m; always kept.
        scale: factor of the logits; default 1/sqrt(d).
        causal: query i sees the keys 0 ... i + m - n only; needs m >= n.
        share_heads: one choice for all heads instead of one per key head.
        block_size: tokens per block, at least 1.
        num_parts: number of parts of a k-means partition of the keys by which the tokens are sorted first, so that a
            block holds tokens that are alike; 1 keeps their order. Default 8, or 1 where tokens cannot be permuted:
            under a causal mask, or with other queries than keys.
        parts: (batch, m) int64 part of each token, instead of such a partition.
        selection_entries: score entries per head that a given ``score`` tensor has cost; they count in the plan's
            sparsity.

    Returns:
        a :class:`~entreg.sparse.plan.SparsityPlan`.

    Raises:
        InputError: as :func:`make_column_plan`.
    """
    shape = _checked_shape(q, k, num_prefix, causal)
    given = isinstance(score, Tensor)
    if not given and score != "pooled":
        raise InputError(f"blocks are chosen by the score 'pooled' or by a tensor, got {score!r}")
    if block_size < 1:
        raise InputError(f"block_size must be at least 1, got {block_size}")
    n, m = q.shape[2], k.shape[2]
    grid = (num_blocks(n + query_offset(n, m, block_size, causal), block_size), num_blocks(m, block_size))
    if not given:
        selection_entries = grid[0] * grid[1]
    visible = visible_blocks(n, m, block_size, k.device) if causal else None
    always = num_blocks(max(num_prefix, 1) if causal else num_prefix, block_size)
    count = _block_budget(budget, q, k, block_size, causal, num_prefix, selection_entries, share_heads)
    permutation = _block_order(k, n, causal, num_prefix, num_parts, parts)
    if isinstance(count, int) and count == grid[1]:
        mask = torch.ones(grid, dtype=torch.bool, device=k.device) if visible is None else visible
        return SparsityPlan("blocks", block_mask=mask.expand(len(k), 1, -1, -1), block_size=block_size, **shape)
    if not given:
        with torch.no_grad():
            score = pooled_block_scores(q, k, block_size, scale=scale, causal=causal, permutation=permutation)
    shared = _shared_scores(score, q, k, share_heads, grid)
    return SparsityPlan(
        "blocks",
        block_mask=highest_blocks(shared, count, always, visible),
        block_size=block_size,
        permutation=permutation,
        selection_entries=selection_entries,
        **shape,
    )


_MAKERS = {"columns": make_column_plan, "blocks": make_block_plan}
_OPTIONS = {kind: list(inspect.signature(make).parameters)[3:] for kind, make in _MAKERS.items()}


def _checked_shape(q: Tensor, k: Tensor, num_prefix: int, causal: bool) -> dict[str, Any]:
    """What a plan says of the attention that it is for."""
    check_attention_inputs(q, k, causal)
    if not 0 <= num_prefix <= k.shape[2]:
        raise InputError(f"num_prefix must be between 0 and the number of keys, {k.shape[2]}, got {num_prefix}")
    return {"num_queries": q.shape[2], "num_keys": k.shape[2], "num_heads": q.shape[1], "causal": causal}


def _shared_scores(score: Tensor, q: Tensor, k: Tensor, share_heads: bool, sizes: tuple[int, ...]) -> Tensor:
    """Mean of the scores over the query heads that share a choice: (batch, key_heads or 1, *sizes)."""
    heads, key_heads = q.shape[1], k.shape[1]
    if not isinstance(score, Tensor) or score.dim() != 2 + len(sizes) or score.shape[2:] != sizes:
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise InputError(f"score must be a tensor of shape (batch, heads, {', '.join(map(str, sizes))}), got {found}")
    if len(score) != len(q) or score.shape[1] not in (1, heads, key_heads) or not score.is_floating_point():
        raise InputError(
            f"score must be floating point with batch {len(q)} and 1, {key_heads} or {heads} heads, "
            f"got {score.dtype} {tuple(score.shape)}"
        )
    score = score.detach()
    if share_heads:
        return score.mean(1, keepdim=True)
    if score.shape[1] in (1, key_heads):
        return score
    return score.unflatten(1, (key_heads, heads // key_heads)).mean(2)


def _key_budget(
    budget: int | float | Tensor, q: Tensor, k: Tensor, always: int, selection_entries: int, share_heads: bool
) -> int | Tensor:
    """Keys per query, at most all of them; at least one and what is always kept."""
    least = max(1, always)
    if isinstance(budget, Tensor):
        return _tensor_budget(budget, k, share_heads, least).clamp_max(k.shape[2])
    if isinstance(budget, Integral) and not isinstance(budget, bool):
        if budget < least:
            raise InputError(f"the budget must be at least {least} key(s), got {budget}")
        return min(int(budget), k.shape[2])
    if _checked_density(budget) == 1.0:
        return k.shape[2]
    cost = selection_entries / q.shape[2]
    keys = int(budget * k.shape[2] - cost + _ROUNDING)
    if keys < least:
        smallest = (least + cost) / k.shape[2]
        raise InputError(
            f"a density of {budget} leaves too few of {k.shape[2]} keys: the smallest possible is {smallest:.4f}, "
            f"for {least} key(s) and the selection"
        )
    return keys


def _block_budget(
    budget: int | float | Tensor,
    q: Tensor,
    k: Tensor,
    block_size: int,
    causal: bool,
    num_prefix: int,
    selection_entries: int,
    share_heads: bool,
) -> int | Tensor:
    """Key blocks per query block, at most all of them; at least one and those of the prefix."""
    blocks = num_blocks(k.shape[2], block_size)
    least = max(1, num_blocks(num_prefix, block_size))
    if isinstance(budget, Tensor):
        counts = _tensor_budget(budget, k, share_heads, min(k.shape[2], least * block_size))
        return torch.where(counts >= k.shape[2], blocks, counts // block_size)
    if isinstance(budget, Integral) and not isinstance(budget, bool):
        if budget >= k.shape[2]:
            return blocks
        if budget < least * block_size:
            raise InputError(f"the budget must be at least {least} block(s) of {block_size} keys, got {budget}")
        return int(budget) // block_size
    density = _checked_density(budget)
    if density == 1.0:
        return blocks
    densities = block_densities(q.shape[2], k.shape[2], block_size, causal)
    cost = selection_entries / dense_entries(q.shape[2], k.shape[2], causal)
    count = blocks_within(densities, density - cost)
    if count < least:
        raise InputError(
            f"a density of {budget} leaves too few of {blocks} key blocks: the smallest possible is "
            f"{densities[least - 1] + cost:.4f}, for {least} block(s) of {block_size} keys and the selection"
        )
    return count


def blocks_within(densities: Sequence[float], density: float) -> int:
    """The most key blocks per query block, out of 1, 2, ..., whose density is not above the given one; perhaps 0."""
    return bisect.bisect_right(densities, density + _ROUNDING)


@lru_cache(maxsize=256)
def block_densities(
    num_queries: int, num_keys: int, block_size: int, causal: bool, dense_tail_blocks: int = 0
) -> tuple[float, ...]:
    """For 1, 2, ... key blocks per query block the largest density of entries that they can have.

    The last ``dense_tail_blocks`` query blocks keep everything whatever the number.
    """
    entries = block_entries(num_queries, num_keys, block_size, causal, torch.device("cpu"))
    first = (num_keys - num_queries) // block_size if causal else None
    return densities_of_entries(entries, first, dense_tail_blocks)


def densities_of_entries(entries: Tensor, first: int | None, dense_tail_blocks: int = 0) -> tuple[float, ...]:
    """As :func:`block_densities`, of given numbers of entries.

    Args:
        entries: (query_blocks, key_blocks) float64 score entries of dense attention in every pair of blocks.
        first: causal: the key block of the first query block; None otherwise.
        dense_tail_blocks: as there.
    """
    if first is not None:
        # A row's own block is always kept.
        own = first + torch.arange(len(entries), device=entries.device)[:, None]
        always = entries.gather(-1, own)
        others = entries.scatter(-1, own, 0.0).sort(-1, descending=True).values[:, :-1]
        per_row = torch.cat((always, others), dim=-1).cumsum(-1)
    else:
        per_row = entries.sort(-1, descending=True).values.cumsum(-1)
    if dense_tail_blocks:
        per_row[-dense_tail_blocks:] = entries[-dense_tail_blocks:].sum(-1, keepdim=True)
    return tuple((per_row.sum(0) / entries.sum()).tolist())


def _checked_density(budget: float) -> float:
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0.0 < budget <= 1.0:
        raise InputError(f"the budget must be a whole number of keys or a density in (0, 1], got {budget!r}")
    return float(budget)


def _tensor_budget(budget: Tensor, k: Tensor, share_heads: bool, least: int) -> Tensor:
    """(batch, key_heads or 1) int64, all at least ``least``."""
    heads = (1,) if share_heads else (1, k.shape[1])
    shaped = budget.unsqueeze(1) if budget.dim() == 1 else budget
    if budget.dtype != torch.int64 or shaped.dim() != 2 or len(shaped) != len(k) or shaped.shape[1] not in heads:
        raise InputError(
            f"a budget tensor must be int64 of shape ({len(k)},) or ({len(k)}, {' or '.join(map(str, heads))}), "
            f"got {budget.dtype} {tuple(budget.shape)}"
        )
    if int(budget.min()) < least:
        raise InputError(f"every budget must be at least {least} key(s), got {int(budget.min())}")
    return shaped.to(k.device)


def _highest_keys(scores: Tensor, count: int | Tensor, always: int) -> tuple[Tensor, Tensor | None]:
    """Positions of the highest scores, ascending, the first ``always`` among them; and which are not padding."""
    scores = scores.clone()
    scores[..., :always] = torch.inf
    if isinstance(count, int):
        return scores.topk(count, dim=-1).indices.sort(-1).values, None
    largest, smallest = int(count.max()), int(count.min())
    scores = scores.expand(-1, max(scores.shape[1], count.shape[1]), -1)
    order = scores.topk(largest, dim=-1).indices
    if largest == smallest:
        return order.sort(-1).values, None
    # Padding sorts behind every key, then repeats the last one.
    beyond = scores.shape[-1]
    padded = torch.where(torch.arange(largest, device=order.device) < count.unsqueeze(-1), order, beyond)
    keys = padded.sort(-1).values
    return keys.clamp_max(beyond - 1), keys < beyond


def _block_order(
    k: Tensor, num_queries: int, causal: bool, num_prefix: int, num_parts: int | None, parts: Tensor | None
) -> Tensor | None:
    """(batch, m) tokens sorted by part, the prefix first, otherwise in their own order; None for no change."""
    possible = not causal and num_queries == k.shape[2]
    if parts is None and (num_parts == 1 or (num_parts is None and not possible)):
        return None
    if not possible:
        raise InputError(
            "tokens can be sorted by parts only where queries and keys are the same tokens and none is later; "
            "use num_parts=1"
        )
    if parts is None:
        count = _DEFAULT_PARTS if num_parts is None else num_parts
        parts = token_parts(k.transpose(1, 2).flatten(2), count, num_prefix=num_prefix)
    elif parts.dtype != torch.int64 or parts.shape != (len(k), k.shape[2]):
        raise InputError(f"parts must be int64 of shape {(len(k), k.shape[2])}, got {parts.dtype} {tuple(parts.shape)}")
    parts = parts.clone()
    parts[:, :num_prefix] = torch.iinfo(torch.int64).min
    return parts.argsort(dim=-1, stable=True)
