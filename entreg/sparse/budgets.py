"""Budgets: how many tokens a wanted sparsity, or an image's own entropy, leaves.

Arithmetic of token plans: a layer with m of n tokens computes m^2 of the n^2 score entries of each head, so that a
model of L layers has sparsity 1 - (sum of m_l^2 + entries computed only for selection scores) / (L n^2). (Our
definition; the paper gives a sparsity without saying of what.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from entreg.entropy.soft_partition import entropy_of_masses
from entreg.errors import ConfigError, InputError
from entreg.sparse.config import EntropyBudget


def entropy_budget(scores: Tensor, budget: EntropyBudget, *, num_prefix: int) -> Tensor:
    """Tokens that each image needs by its own entropy: round(multiplier x exp(H)), within the budget's limits.

    H, in nats, is the entropy of the patch tokens' shares of the scores.

    Args:
        scores: (..., n), non-negative.
        budget: its maximum, if None, is the number of patch tokens; a minimum above that number is lowered to it.
        num_prefix: tokens that are left out, in [0, n - 1].

    Returns:
        (...) int64.

    Raises:
        InputError: no patch tokens.
    """
    patches = scores.shape[-1] - num_prefix
    if num_prefix < 0 or patches < 1:
        raise InputError(f"num_prefix must be in [0, {scores.shape[-1] - 1}], got {num_prefix}")
    wide = scores.detach()[..., num_prefix:].double()
    total = wide.sum(-1, keepdim=True)
    # Scores that are all zero prefer no token to another: equal shares.
    shares = torch.where(total > 0, wide / total, 1.0 / patches)
    wanted = (budget.multiplier * entropy_of_masses(shares).exp()).round()
    maximum = patches if budget.maximum is None else min(budget.maximum, patches)
    return wanted.clamp(min(budget.minimum, maximum), maximum).long()


def bucket_by_budget(budgets: Tensor, num_buckets: int) -> list[Tensor]:
    """Groups of images of similar budget, so that an easy image is not padded to the length of the hardest.

    Of all divisions into at most ``num_buckets`` groups, one with the least padding: the sum over the groups of size x
    largest budget is minimal.

    Args:
        budgets: (batch,) int64.
        num_buckets: at least 1.

    Returns:
        At most ``num_buckets`` non-empty (group,) int64 tensors of positions in the batch, on the budgets' device,
        cheapest group first; each position once.

    Raises:
        InputError: not a non-empty (batch,) int64 tensor, or num_buckets below 1.
    """
    if budgets.dim() != 1 or budgets.numel() == 0 or budgets.dtype != torch.int64:
        raise InputError(
            f"budgets must be a non-empty (batch,) int64 tensor, got {budgets.dtype} {tuple(budgets.shape)}"
        )
    if num_buckets < 1:
        raise InputError(f"num_buckets must be at least 1, got {num_buckets}")
    ordered, order = budgets.sort(stable=True)
    cuts = _least_padding(ordered.cpu().numpy(), num_buckets)
    return [order[start:end] for start, end in itertools.pairwise(cuts)]


def token_sparsity(tokens: Sequence[int], num_tokens: int, *, selection_entries: int = 0) -> float:
    """Realised sparsity of a token plan.

    Args:
        tokens: tokens that attention sees, of each layer of the model, prefix included.
        num_tokens: n of the dense model.
        selection_entries: per head, over all layers (:func:`entreg.sparse.scores.score_entries`).

    Raises:
        InputError: no layers, or counts below 0.
    """
    if not tokens or num_tokens < 1 or min(tokens) < 0 or selection_entries < 0:
        raise InputError(
            "token_sparsity needs the tokens of at least one layer and no count below 0, "
            f"got {list(tokens)} of {num_tokens} and {selection_entries} selection entries"
        )
    computed = sum(count * count for count in tokens) + selection_entries
    return 1.0 - computed / (len(tokens) * num_tokens**2)


def keep_for_sparsity(
    sparsity: float,
    num_tokens: int,
    *,
    num_prefix: int,
    depth: int,
    before_layer: int,
    selection_entries: int = 0,
    minimum_keep: int = 0,
) -> int:
    """The most patch tokens that may be kept so that the realised sparsity is at least the wanted one.

    The inverse of :func:`token_sparsity` for a plan that reduces once.

    Args:
        sparsity: in [0, 1); 0 keeps all, without any selection.
        num_tokens: n, prefix included.
        num_prefix: in [0, n].
        depth: layers of the model.
        before_layer: index from 0 of the first layer that runs on the reduced tokens.
        selection_entries: as in :func:`token_sparsity`.
        minimum_keep: fewest patch tokens that the plan can keep (1 for merging).

    Raises:
        ConfigError: before_layer beyond the last layer, or a sparsity that cannot be reached; the sentence says the
            largest possible one.
    """
    patches = num_tokens - num_prefix
    if not 0 <= before_layer < depth:
        raise ConfigError(f"before_layer must be in [0, {depth - 1}] for a model of {depth} layers, got {before_layer}")
    if sparsity == 0:
        return patches
    # Attention over no token at all does not exist.
    fewest = max(minimum_keep, 0 if num_prefix else 1)
    layers = [num_tokens] * before_layer + [num_prefix + fewest] * (depth - before_layer)
    largest = token_sparsity(layers, num_tokens, selection_entries=selection_entries)
    dense = depth * num_tokens**2
    left = (1.0 - sparsity) * dense - before_layer * num_tokens**2 - selection_entries
    # A rounding error must not cost a token when the sparsity is that of a whole number of tokens.
    per_layer = math.floor((left + 1e-12 * dense) / (depth - before_layer))
    keep = min(math.isqrt(max(per_layer, 0)) - num_prefix, patches)
    if keep < fewest:
        raise ConfigError(
            f"sparsity {sparsity:g} cannot be reached by reducing {num_tokens} tokens before layer {before_layer} of "
            f"{depth}; the largest possible is {math.floor(largest * 1e4) / 1e4:g}"
        )
    return keep


def merged_token_counts(r: int | Sequence[int], num_tokens: int, *, num_prefix: int, depth: int) -> list[int]:
    """Tokens that each layer's attention sees under token merging, which merges after a layer's attention.

    Raises:
        ConfigError: r given per layer for another number of layers.
    """
    merged = [r] * depth if isinstance(r, int) else list(r)
    if len(merged) != depth:
        raise ConfigError(f"r must be one number or one for each of {depth} layers, got {len(merged)}")
    counts, tokens = [], num_tokens
    for number in merged:
        counts.append(tokens)
        tokens -= min(number, (tokens - num_prefix) // 2)
    return counts


def _least_padding(budgets: np.ndarray, num_buckets: int) -> list[int]:
    """Where to cut ascending budgets: the exact optimum, by dynamic programming over the end of the last group."""
    count = len(budgets)
    ends, starts = np.arange(1, count + 1)[:, None], np.arange(count)[None, :]
    cost = np.where(starts < ends, budgets[:, None] * (ends - starts), np.inf)
    best, origins = cost[:, 0], []
    groups = min(num_buckets, len(np.unique(budgets)))
    for _ in range(groups - 1):
        # best[start - 1] groups the images before start.
        total = cost[:, 1:] + best[:-1]
        origins.append(total.argmin(1) + 1)
        best = total.min(1)
    cuts = [count]
    for origin in reversed(origins):
        cuts.append(int(origin[cuts[-1] - 1]))
    return [0, *reversed(cuts)]
