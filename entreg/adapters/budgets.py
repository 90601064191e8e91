"""From plans and a model's sizes to budgets: patch tokens that each plan keeps, keys or density of each layer.

All impossible wishes are found here, before anything runs. In a combination, the sparsity of a part is relative to the
score entries of attention that the parts before it leave; what those computed for their selection scores is spent and
counts in neither. (The paper gives a sparsity without saying of what; this is our choice.)
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from entreg.errors import ConfigError
from entreg.sparse import (
    BlockSparsity,
    ColumnSparsity,
    TokenMerging,
    TokenSparsity,
    keep_for_sparsity,
    score_entries,
)
from entreg.sparse.registries import REDUCTIONS

# A budget that is a whole number of keys or tokens must not lose one to rounding.
_ROUNDING = 1e-9

Plan: TypeAlias = ColumnSparsity | BlockSparsity | TokenSparsity | TokenMerging


@dataclass(frozen=True)
class Budgets:
    """What a model's plans leave of a number of tokens.

    Attributes:
        keep: patch tokens that each token plan keeps, in the order of the plans; None where every image decides.
        attention: of each layer with sparse attention its number of keys, or the density of its score entries.
    """

    keep: tuple[int | None, ...]
    attention: Mapping[int, int | float]


def resolve_budgets(plans: Sequence[Plan], *, num_tokens: int, num_prefix: int, depth: int) -> Budgets:
    """Find the budgets of single plans, each relative to what those before it leave.

    Args:
        plans: that fit together, in order of application.
        num_tokens: n, prefix included.
        num_prefix: class and register tokens, in [0, n].
        depth: layers of the model.

    Raises:
        ConfigError: a sparsity or budget that the sizes make impossible; of a sparsity, the sentence says the largest
            possible one.
    """
    layers = _Layers(num_tokens, num_prefix, depth)
    for plan in plans:
        if isinstance(plan, TokenSparsity):
            layers.reductions.append((plan, layers.keep(plan)))
        elif isinstance(plan, TokenMerging):
            layers.merging = plan
        else:
            layers.attention.update(dict.fromkeys(layers.chosen(plan), (plan, layers.attention_budget(plan))))
    layers.require_sources()
    keep = tuple(keep for _, keep in layers.reductions)
    return Budgets(keep, {layer: budget for layer, (_, budget) in layers.attention.items()})


class _Layers:
    """The layers of a model under the plans that are resolved already."""

    def __init__(self, num_tokens: int, num_prefix: int, depth: int) -> None:
        self.num_tokens, self.num_prefix, self.depth = num_tokens, num_prefix, depth
        self.reductions: list[tuple[TokenSparsity, int | None]] = []
        self.merging: TokenMerging | None = None
        self.attention: dict[int, tuple[ColumnSparsity | BlockSparsity, int | float]] = {}

    def chosen(self, plan: ColumnSparsity | BlockSparsity) -> Sequence[int]:
        return range(self.depth) if plan.layers is None else plan.layers

    def tokens(self, reductions: Sequence[tuple[TokenSparsity, int | None]]) -> list[int]:
        """Tokens that the attention of each layer sees."""
        counts, tokens = [], self.num_tokens
        for layer in range(self.depth):
            for plan, keep in reductions:
                if plan.before_layer == layer and keep is not None:
                    tokens = min(tokens, self.num_prefix + keep)
            counts.append(tokens)
            if self.merging is not None:
                r = self.merging.r if isinstance(self.merging.r, int) else self.merging.r[layer]
                tokens -= min(r, (tokens - self.num_prefix) // 2)
        return counts

    def entries(self, reductions: Sequence[tuple[TokenSparsity, int | None]]) -> list[float]:
        """Score entries that the attention of each layer computes, per head."""
        return [self._entries(layer, tokens) for layer, tokens in enumerate(self.tokens(reductions))]

    def _entries(self, layer: int, tokens: int) -> float:
        plan, budget = self.attention.get(layer, (None, 1.0))
        if isinstance(budget, float):
            return tokens**2 * budget
        return tokens**2 if budget >= tokens else budget * tokens + self._selection(plan, tokens)

    def _selection(self, plan: TokenSparsity | ColumnSparsity, tokens: int) -> int:
        return score_entries(
            plan.score, tokens, tokens, num_prefix=self.num_prefix, num_sampled_queries=plan.num_sampled_queries
        )

    def keep(self, plan: TokenSparsity) -> int | None:
        """Patch tokens that a further token plan keeps."""
        first, counts = plan.before_layer, self.tokens(self.reductions)
        tokens = counts[first]
        fewest = 1 if self.num_prefix == 0 else REDUCTIONS[plan.reduction].fewest
        if plan.entropy_budget is not None:
            return None
        if plan.keep is not None:
            if plan.keep < fewest:
                raise ConfigError(f"keep must be at least {fewest} here, so that some token remains, got {plan.keep}")
            return plan.keep
        entries = self.entries(self.reductions)
        selection, left = self._selection(plan, tokens), sum(entries)
        if left == self.depth * self.num_tokens**2:
            return keep_for_sparsity(
                plan.sparsity,
                self.num_tokens,
                num_prefix=self.num_prefix,
                depth=self.depth,
                before_layer=first,
                selection_entries=selection,
                minimum_keep=fewest,
            )
        patches = tokens - self.num_prefix
        if plan.sparsity == 0:
            return patches

        def computed(keep: int) -> float:
            return sum(self.entries([*self.reductions, (plan, keep)])) + selection

        allowed = (1.0 - plan.sparsity + _ROUNDING) * left
        possible = range(fewest, patches + 1)
        count = bisect.bisect_right(possible, allowed, key=computed)
        if count == 0:
            raise ConfigError(
                f"sparsity {plan.sparsity:g} of what the parts before leave cannot be reached by reducing {tokens} "
                f"tokens before layer {first} of {self.depth}; the largest possible is "
                f"{_rounded_down(1.0 - computed(fewest) / left)}"
            )
        return possible[count - 1]

    def require_sources(self) -> None:
        """A score from the previous layer is one of the tokens that are still there."""
        for index, (plan, _) in enumerate(self.reductions):
            first = plan.before_layer
            earlier = [
                other
                for place, other in enumerate(self.reductions)
                if other[0].before_layer < first or (other[0].before_layer == first and place < index)
            ]
            counts = self.tokens(earlier)
            if plan.score_source == "previous" and counts[first - 1] != counts[first]:
                raise ConfigError(
                    f"score_source 'previous' needs the layer before layer {first} to see the same tokens, but another "
                    "plan reduces them in between; use 'own'"
                )

    def attention_budget(self, plan: ColumnSparsity | BlockSparsity) -> int | float:
        """Keys, or density of the score entries, in each layer that a further attention plan acts on."""
        least = max(1, self.num_prefix)
        if plan.sparsity is None:
            if plan.keys < least:
                raise ConfigError(f"keys must be at least {least}, the tokens that are always kept, got {plan.keys}")
            return plan.keys
        entries, chosen = self.entries(self.reductions), self.chosen(plan)
        # All that is to be saved is saved in the chosen layers, the same fraction in each.
        share = sum(entries) / sum(entries[layer] for layer in chosen)
        density = 1.0 - plan.sparsity * share
        counts = self.tokens(self.reductions)
        smallest = max(self._least_density(plan, counts[layer]) for layer in chosen)
        if plan.sparsity > 0 and density < smallest - _ROUNDING:
            raise ConfigError(
                f"sparsity {plan.sparsity:g} cannot be reached in {len(chosen)} of {self.depth} layers; the largest "
                f"possible is {_rounded_down(max(0.0, 1.0 - smallest) / share)}"
            )
        return density

    def _least_density(self, plan: ColumnSparsity | BlockSparsity, tokens: int) -> float:
        """Of a layer's entries, those for the choice included, what the plan computes at least."""
        if isinstance(plan, ColumnSparsity):
            return (max(1, self.num_prefix) + self._selection(plan, tokens) / tokens) / tokens
        # The key blocks of the prefix, at least one, for every query; and attention between the blocks' means.
        always = max(1, -(-self.num_prefix // plan.block_size))
        blocks = -(-tokens // plan.block_size)
        return min(1.0, always * plan.block_size / tokens) + (blocks / tokens) ** 2


def _rounded_down(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:g}"
