"""Budgets that every image sets by its own entropy, scaled so that their mean sparsity is a given one.

Only at equal mean sparsity does a comparison with equal budgets for all images say whether it pays to give easy images
fewer tokens. The multiplier is fitted on images that measure nothing. Our choice; the paper sets no budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from entreg import distributed
from entreg.adapters import SparsifyHandle, sparsify
from entreg.errors import ConfigError
from entreg.experiments.vision.classification import evaluate
from entreg.sparse import TokenSparsity, entropy_budget, score_entries, token_sparsity

_HALVINGS = 60

# By how much, relatively, the multiplier stays below the edge at which an image changes its budget: more than exp(H) of
# float32 scores changes with the order in which another batch size or processor adds them up (some 2^-20).
_FROM_THE_EDGE = 2.0**-16


def sparsity_by_budget(plan: TokenSparsity, *, num_tokens: int, num_prefix: int, depth: int) -> Tensor:
    """Sparsity of an image that keeps 0, 1, ... patch tokens under a plan, run alone, without padding.

    Args:
        plan: how the tokens are reduced and scored; its budget is not looked at.
        num_tokens: of the dense model, prefix included.
        num_prefix: tokens that always stay.
        depth: layers of the model.

    Returns:
        (num_tokens - num_prefix + 1,) float64, falling.
    """
    entries = score_entries(
        plan.score, num_tokens, num_tokens, num_prefix=num_prefix, num_sampled_queries=plan.num_sampled_queries
    )
    before, after = plan.before_layer, depth - plan.before_layer
    counts = range(num_prefix, num_tokens + 1)
    values = [
        token_sparsity([num_tokens] * before + [count] * after, num_tokens, selection_entries=entries)
        for count in counts
    ]
    return torch.tensor(values, dtype=torch.float64)


def match_sparsity(
    model: nn.Module, dataset: Dataset, plan: TokenSparsity, sparsity: float, **loader: Any
) -> TokenSparsity:
    """The plan with the largest multiplier whose mean sparsity over these images is at least the given one.

    Largest but for a few in a million, so that roundings do not decide whether the sparsity is reached.

    Args:
        model: stock timm model, on its device.
        dataset: images to fit the multiplier on.
        plan: with an entropy budget, whose multiplier is not looked at.
        sparsity: mean over the images, in (0, 1).
        loader: see :func:`entreg.experiments.vision.classification.evaluate`.

    Raises:
        ConfigError: even the smallest budgets that the plan allows do not reach the sparsity.
    """
    scores: list[Tensor] = []
    generator = torch.Generator()
    with sparsify(model, plan, record=True, generator=generator) as handle:
        evaluate(
            model,
            dataset,
            observe=lambda batch: scores.append(handle.selections[0].scores.cpu()),
            generator=generator,
            **loader,
        )
    joined = torch.cat(distributed.in_order(scores))
    by_budget = sparsity_by_budget(
        plan, num_tokens=joined.shape[1], num_prefix=model.num_prefix_tokens, depth=len(model.blocks)
    )

    def mean(multiplier: float) -> float:
        budget = replace(plan.entropy_budget, multiplier=multiplier)
        return by_budget[entropy_budget(joined, budget, num_prefix=model.num_prefix_tokens)].mean().item()

    # exp(H) is at least 1 and at most the number of tokens: no image's budget changes beyond these.
    low, high = 0.1 / joined.shape[1], 2.0 * joined.shape[1]
    if mean(low) < sparsity:
        raise ConfigError(
            f"a mean sparsity of {sparsity:g} cannot be reached by entropy budgets before layer {plan.before_layer}; "
            f"the largest possible is {mean(low):.4f}"
        )
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean(middle) >= sparsity else (low, middle)
    return replace(plan, entropy_budget=replace(plan.entropy_budget, multiplier=low * (1.0 - _FROM_THE_EDGE)))


def kept_per_image(handle: SparsifyHandle, num_prefix: int) -> Tensor:
    """(batch,) patch tokens that each image of the last forward pass kept; the handle must record."""
    return (handle.selections[0].kept >= 0).sum(1).cpu() - num_prefix


def describe_budgets(kept: Tensor, plan: TokenSparsity, *, num_tokens: int, depth: int, num_prefix: int) -> Mapping:
    """Numbers for a record: what the images kept, its tail included, and the mean sparsity.

    Args:
        kept: (images,) patch tokens that each image kept.
        plan: with the multiplier that was used.
        num_tokens, depth, num_prefix: see :func:`sparsity_by_budget`.
    """
    by_budget = sparsity_by_budget(plan, num_tokens=num_tokens, num_prefix=num_prefix, depth=depth)
    values = kept.numpy()
    return {
        "sparsity": by_budget[kept].mean().item(),
        "multiplier": plan.entropy_budget.multiplier,
        "budget_mean": values.mean().item(),
        "budget_median": float(np.median(values)),
        "budget_p95": float(np.quantile(values, 0.95)),
        "budget_max": int(values.max()),
    }
