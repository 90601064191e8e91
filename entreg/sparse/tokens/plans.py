"""The reductions that a token plan chooses among by name: what each may use, and what it asks of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from entreg.sparse.registries import REDUCTIONS
from entreg.sparse.tokens.reduction import TokenReduction, drop_tokens, merge_tokens
from entreg.sparse.tokens.soft_partition import fuse_tokens, partition_tokens

if TYPE_CHECKING:
    from entreg.sparse.config import TokenSparsity


@dataclass(frozen=True)
class ReductionInputs:
    """What a reduction starts from.

    Attributes:
        x: (batch, n, c) tokens.
        scores: (batch, n), of which those of the prefix do not count.
        keep: patch tokens to keep; a number, or (batch,) int64 if the reduction has ``own_budgets``.
        num_prefix: leading tokens that stay.
        sizes: (batch, n) tokens that each stands for; None while every one stands for itself.
        keys: (batch, heads, n, d) keys of the layer that the score looks at, if the reduction ``uses_keys``.
        plan: of this reduction.
    """

    x: Tensor
    scores: Tensor
    keep: int | Tensor
    num_prefix: int
    sizes: Tensor | None
    keys: Tensor | None
    plan: TokenSparsity


class Reduction:
    """A way to have fewer tokens in the residual stream. A new one overrides :meth:`reduce`.

    Attributes:
        uses_keys: it is given the keys.
        weighted: what stays has sizes by which it may attract attention.
        own_budgets: each image of a batch may keep another number of tokens.
        fewest: patch tokens that must stay beside a prefix.
    """

    uses_keys = False
    weighted = False
    own_budgets = False
    fewest = 1

    def reduce(self, inputs: ReductionInputs) -> tuple[Tensor, TokenReduction]:
        """Reduce the tokens: (batch, m, c) that stay, and what became of all."""
        raise NotImplementedError


class Drop(Reduction):
    """:func:`drop_tokens`."""

    own_budgets = True
    fewest = 0

    def reduce(self, inputs: ReductionInputs) -> tuple[Tensor, TokenReduction]:
        return drop_tokens(
            inputs.x,
            inputs.scores,
            inputs.keep,
            num_prefix=inputs.num_prefix,
            sizes=inputs.sizes,
            straight_through=inputs.plan.straight_through,
        )


class Merge(Reduction):
    """:func:`merge_tokens` by the keys of all heads."""

    uses_keys = weighted = own_budgets = True

    def reduce(self, inputs: ReductionInputs) -> tuple[Tensor, TokenReduction]:
        return merge_tokens(
            inputs.x,
            inputs.scores,
            inputs.keep,
            num_prefix=inputs.num_prefix,
            features=inputs.keys.transpose(1, 2).flatten(2),
            sizes=inputs.sizes,
            straight_through=inputs.plan.straight_through,
        )


class Partition(Reduction):
    """:func:`partition_tokens` by the mean keys of the heads."""

    uses_keys = weighted = True

    def reduce(self, inputs: ReductionInputs) -> tuple[Tensor, TokenReduction]:
        return partition_tokens(
            inputs.x,
            inputs.scores,
            inputs.keep,
            num_prefix=inputs.num_prefix,
            features=inputs.keys.mean(1),
            sharpness=inputs.plan.sharpness,
            anchors=inputs.plan.anchors,
        )


class Fuse(Reduction):
    """:func:`fuse_tokens`."""

    def reduce(self, inputs: ReductionInputs) -> tuple[Tensor, TokenReduction]:
        return fuse_tokens(inputs.x, inputs.scores, inputs.keep, num_prefix=inputs.num_prefix)


REDUCTIONS.register("drop", Drop())
REDUCTIONS.register("merge", Merge())
REDUCTIONS.register("partition", Partition())
REDUCTIONS.register("fuse", Fuse())
