"""Budgets: how many tokens a wanted sparsity, or an image's own entropy, leaves.

Arithmetic of token plans: a layer with m of n tokens computes m^2 of the n^2 score entries of each head, so that a
model of L layers has sparsity 1 - (sum of m_l^2 + entries computed only for selection scores) / (L n^2). (Our
definition; the paper gives a sparsity without saying of what.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from entreg.entropy.soft_partition import entropy_of_masses
from entreg.errors import ConfigError, InputError
from entreg.sparse.config import SCORES, EntropyBudget


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
    raise NotImplementedError


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
    raise NotImplementedError


def score_entries(score: str, num_tokens: int, *, num_prefix: int, num_sampled_queries: int | None) -> int:
    """Entries of a head's score matrix that are computed only to obtain a selection score, in one layer.

    Raises:
        ConfigError: not one of :data:`~entreg.sparse.config.SCORES`.
    """
    raise NotImplementedError


def token_sparsity(tokens: Sequence[int], num_tokens: int, *, selection_entries: int = 0) -> float:
    """Realised sparsity of a token plan.

    Args:
        tokens: tokens that attention sees, of each layer of the model, prefix included.
        num_tokens: n of the dense model.
        selection_entries: per head, over all layers (:func:`score_entries`).

    Raises:
        InputError: no layers, or counts below 0.
    """
    raise NotImplementedError


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
    raise NotImplementedError


def merged_token_counts(r: int | Sequence[int], num_tokens: int, *, num_prefix: int, depth: int) -> list[int]:
    """Tokens that each layer's attention sees under token merging, which merges after a layer's attention.

    Raises:
        ConfigError: r given per layer for another number of layers.
    """
    raise NotImplementedError
