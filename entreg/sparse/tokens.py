"""Fewer tokens in the residual stream: drop them, or merge the parts of a partition into weighted representatives.

Every function takes tokens x (batch, n, c), the first ``num_prefix`` of which (class token, registers) always stay,
come first and are never changed, and returns the m remaining tokens with a :class:`TokenReduction` that says what
became of each original one. Prefix tokens aside, everything is equivariant to permutations of the tokens, except
:func:`bipartite_merge`, whose published rule alternates over positions.

The paper speaks of sparsity without saying what is skipped: reducing tokens, and everything here, is our choice,
:func:`bipartite_merge` apart, which is the rival's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from entreg.errors import InputError


@dataclass(frozen=True, eq=False)
class TokenReduction:
    """What became of n tokens when m of them stayed.

    Attributes:
        kept: (batch, m) int64, original position of each remaining token, prefix first, ascending (after
            :func:`bipartite_merge` in its own order); -1 where padded.
        assignment: (batch, n) int64, which of the m remaining tokens stands for each original one; -1 if dropped.
        sizes: (batch, m) floating point, number of original tokens that each remaining one stands for; 0 where padded.
        scores: (batch, n), those that decided, with their gradient; None if there were none.
        valid: (batch, m) bool, False where padded, because other images of the batch keep more; None if nothing is.
    """

    kept: Tensor
    assignment: Tensor
    sizes: Tensor
    scores: Tensor | None = None
    valid: Tensor | None = None

    @property
    def key_bias(self) -> Tensor:
        """(batch, m) bias of the attention logits per key: log size, -inf where padded.

        With it, attention over merged tokens equals attention over their members if these have equal keys and values
        (proportional attention of token merging).
        """
        return self.sizes.log()


def drop_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int | Tensor,
    *,
    num_prefix: int,
    sizes: Tensor | None = None,
    straight_through: bool = False,
) -> tuple[Tensor, TokenReduction]:
    """Keep the patch tokens with the largest scores; among equal scores the first positions.

    With ``straight_through`` each kept patch token is multiplied by s / stopgrad(s), where s is its share of the
    patch tokens' scores: the value does not change, and with G_i = <gradient of token i, token i>

        d loss / d score_j = [j kept] G_j / score_j - (sum over kept i of G_i) / (sum over patch tokens l of score_l).

    So a token's score rises if the loss wants more of it than of the others. (The gradient of log s is O(1) in logits
    whose softmax the scores are, however small s is; in trials it trained as well as or better than 1 + n (s -
    stopgrad(s)) and than shares among the kept only.) Scores must then be positive; shares below the square root of
    the smallest float get no gradient.

    Args:
        x: (batch, n, c), floating point.
        scores: (batch, n), floating point, without NaN; those of the prefix are not looked at.
        keep: patch tokens to keep, in [0, n - num_prefix]; one number, or (batch,) int64, one per image. In the second
            case m is num_prefix plus the largest of them and shorter images are padded with zeros.
        num_prefix: in [0, n].
        sizes: (batch, n), positive, of tokens that stand for several already; all 1 by default.
        straight_through: let the gradient reach the scores as above.

    Returns:
        (batch, m, c) remaining tokens in their original order, and what became of all.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above, or an image that would be left without tokens.
    """
    raise NotImplementedError


def merge_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int | Tensor,
    *,
    num_prefix: int,
    features: Tensor | None = None,
    sizes: Tensor | None = None,
    straight_through: bool = False,
) -> tuple[Tensor, TokenReduction]:
    """Merge the patch tokens into representatives: a ball partition with the highest-scoring tokens as anchors.

    The ``keep`` patch tokens with the largest scores are the anchors; every other patch token joins the anchor whose
    feature is nearest to its own (Euclidean; among equal distances the first), and each part becomes the mean of its
    members weighted by their sizes. The sum of size x token is preserved.

    Args:
        x, scores, num_prefix, sizes: as in :func:`drop_tokens`.
        keep: as in :func:`drop_tokens`, but at least 1 for every image if there are patch tokens at all.
        features: (batch, n, d), floating point, in which distances are measured, e.g. the mean keys of the next
            layer's heads, which are cheaper than the default, x itself. No gradient passes through them.
        straight_through: as in :func:`drop_tokens`, with the merged tokens in place of the kept ones.

    Returns:
        (batch, m, c) anchors' parts in the anchors' original order, and what became of all tokens.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above.
    """
    raise NotImplementedError


def bipartite_merge(
    x: Tensor, metric: Tensor, r: int, *, num_prefix: int, sizes: Tensor | None = None
) -> tuple[Tensor, TokenReduction]:
    """Bipartite soft matching of token merging (Bolya et al., ICLR 2023, section 3), from its description.

    Tokens at even positions form one set, those at odd positions another, prefix tokens in neither. Each of the first
    set is joined to the most similar one of the second, by cosine; the r most similar pairs are merged into means
    weighted by sizes. The result is, as published, the prefix, the rest of the first set, then the second set.

    Args:
        x: (batch, n, c), floating point.
        metric: (batch, n, d), floating point, whose cosine is the similarity: the keys' mean over the heads.
        r: tokens to merge away, at least 0; at most half of the patch tokens are.
        num_prefix: in [0, n].
        sizes: (batch, n), positive, of tokens that stand for several already; all 1 by default.

    Returns:
        (batch, n - r, c), and what became of all tokens.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above.
    """
    raise NotImplementedError


def unmerge(y: Tensor, reduction: TokenReduction, *, fill: Tensor | None = None) -> Tensor:
    """Give every original token the value of the one that stands for it, for dense outputs.

    Args:
        y: (batch, m, c).
        reduction: of the tokens that y comes from.
        fill: (batch, n, c), values of dropped tokens; zeros by default.

    Returns:
        (batch, n, c).

    Raises:
        InputError: shapes that do not fit.
    """
    raise NotImplementedError


def compose_reductions(first: TokenReduction, second: TokenReduction) -> TokenReduction:
    """The reduction that results from one after another, in the coordinates of the first one's original tokens.

    ``second`` must have been given ``first.sizes``; its scores, which are of other tokens, are left out.

    Raises:
        InputError: the second does not start from what the first leaves.
    """
    raise NotImplementedError
