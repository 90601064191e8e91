"""Fewer tokens in the residual stream: drop them, or merge the parts of a partition into weighted representatives.

Every function takes tokens x (batch, n, c), the first ``num_prefix`` of which (class token, registers) always stay,
come first and are never changed, and returns the m remaining tokens with a :class:`TokenReduction` that says what
became of each original one. Prefix tokens aside, everything is equivariant to permutations of the tokens, except
:func:`bipartite_merge`, whose published rule alternates over positions.

The paper speaks of sparsity without saying what is skipped: reducing tokens, and everything here, is our choice,
:func:`bipartite_merge` apart, which is the rival's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from entreg.errors import InputError
from entreg.sparse.tokens.slots import Slots, choose_slots, merge_rows, nearest_anchors, rows_at, wide_dtype


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
    whose softmax the scores are, however small s is; in small trials no other form trained better, neither 1 + n (s -
    stopgrad(s)) nor shares among the kept only.) Scores must then be positive; a share below 3e-10 (float32)
    gets no gradient.

    Args:
        x: (batch, n, c), floating point.
        scores: (batch, n), floating point, without NaN; those of the prefix are not looked at.
        keep: patch tokens to keep, in [0, n - num_prefix]; one number, or (batch,) int64, one per image. In the second
            case m is num_prefix plus the largest of them and shorter images are padded with zeros.
        num_prefix: in [0, n].
        sizes: (batch, n), positive, of tokens that stand for several already; all 1 by default. No gradient passes
            through them.
        straight_through: let the gradient reach the scores as above.

    Returns:
        (batch, m, c) remaining tokens in their original order, and what became of all.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above, or an image that would be left without tokens.
    """
    keep = check_reduction(x, scores, keep, num_prefix, sizes)
    slots = choose_slots(scores, keep, num_prefix)
    kept_sizes = None if sizes is None else sizes.gather(1, slots.positions)
    reduction = TokenReduction(
        kept=slots.kept,
        assignment=slots.numbered(x.shape[1], -1),
        sizes=slots.masked(slots.ones(x) if kept_sizes is None else kept_sizes),
        scores=scores,
        valid=slots.valid,
    )
    reduced = slots.masked(rows_at(x, slots.positions))
    if straight_through:
        reduced = _straight_through(reduced, scores, slots, num_prefix)
    return reduced, reduction


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
    keep = check_reduction(x, scores, keep, num_prefix, sizes)
    if num_prefix == x.shape[1]:
        return drop_tokens(x, scores, keep, num_prefix=num_prefix, sizes=sizes)
    smallest = keep if isinstance(keep, int) else int(keep.min())
    if smallest < 1:
        raise InputError("merging needs keep of at least 1: a dropped token has no representative")
    features = x if features is None else features
    _require_tokens("features", features, x)
    slots = choose_slots(scores, keep, num_prefix)
    # Those that are anchors in every image need not look for one.
    others = slots.order[:, smallest:]
    nearest = num_prefix + nearest_anchors(features, others, slots, num_prefix)
    if slots.valid is not None:
        # In an image that keeps more than the smallest budget, some of the others are anchors themselves.
        own = slots.numbered(x.shape[1], -1).gather(1, others)
        nearest = torch.where(own < 0, nearest, own)
    merged, total = merge_rows(x, sizes, slots, others, nearest)
    reduction = TokenReduction(
        kept=slots.kept,
        assignment=slots.numbered(x.shape[1], 0).scatter(1, others, nearest),
        sizes=total,
        scores=scores,
        valid=slots.valid,
    )
    if straight_through:
        merged = _straight_through(merged, scores, slots, num_prefix)
    return merged, reduction


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
    _require_x(x, num_prefix, sizes)
    _require_tokens("metric", metric, x)
    if r < 0:
        raise InputError(f"r must be at least 0, got {r}")
    batch, n, _ = x.shape
    r = min(r, (n - num_prefix) // 2)
    positions = torch.arange(n, device=x.device)
    even, odd = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
    first, second = positions[even::2], positions[odd::2]
    if r == 0:
        kept = positions.expand(batch, n)
        total = x.new_ones(batch, n, dtype=wide_dtype(x)) if sizes is None else sizes
        return x, TokenReduction(kept=kept, assignment=kept, sizes=total)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(metric.detach().to(wide_dtype(metric)), dim=-1)
        similarity, partner = (unit[:, even::2] @ unit[:, odd::2].mT).max(-1)
        order = similarity.argsort(dim=1, descending=True, stable=True)
    rest = first[order[:, r:].sort(dim=1).values]
    prefix, second = positions[:num_prefix].expand(batch, -1), second.expand(batch, -1)
    slots = Slots(torch.cat((prefix, rest, second), 1), None, None)
    others = first[order[:, :r]]
    targets = num_prefix + rest.shape[1] + partner.gather(1, order[:, :r])
    merged, total = merge_rows(x, sizes, slots, others, targets)
    assignment = slots.numbered(n, 0).scatter(1, others, targets)
    return merged, TokenReduction(kept=slots.positions, assignment=assignment, sizes=total)


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
    batch, n = reduction.assignment.shape
    if y.dim() != 3 or y.shape[:2] != reduction.kept.shape:
        raise InputError(f"y must be of shape (*{tuple(reduction.kept.shape)}, c), got {tuple(y.shape)}")
    if fill is not None and fill.shape != (batch, n, y.shape[2]):
        raise InputError(f"fill must be of shape {(batch, n, y.shape[2])}, got {tuple(fill.shape)}")
    # What dropped tokens get stands behind the last row of y, so that one copy of rows does it all.
    behind = y.new_zeros(batch, 1, y.shape[2]) if fill is None else fill.to(y.dtype)
    places = y.shape[1] + torch.arange(behind.shape[1], device=y.device)
    assignment = reduction.assignment
    return rows_at(torch.cat((y, behind), 1), torch.where(assignment < 0, places, assignment))


def compose_reductions(first: TokenReduction, second: TokenReduction) -> TokenReduction:
    """The reduction that results from one after another, in the coordinates of the first one's original tokens.

    ``second`` must have been given ``first.sizes``; its scores, which are of other tokens, are left out.

    Raises:
        InputError: the second does not start from what the first leaves.
    """
    if second.assignment.shape != first.kept.shape:
        raise InputError(
            f"the second reduction starts from tokens {tuple(second.assignment.shape)}, "
            f"but the first leaves {tuple(first.kept.shape)}"
        )
    if first.valid is not None:
        raise InputError("a padded reduction cannot be followed by another; give every image the same budget")
    kept = first.kept.gather(1, second.kept.clamp_min(0))
    assignment = second.assignment.gather(1, first.assignment.clamp_min(0))
    return TokenReduction(
        kept=kept.masked_fill(second.kept < 0, -1),
        assignment=assignment.masked_fill(first.assignment < 0, -1),
        sizes=second.sizes,
        valid=second.valid,
    )


def _straight_through(reduced: Tensor, scores: Tensor, slots: Slots, num_prefix: int) -> Tensor:
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return reduced
    patches = scores[:, num_prefix:].to(wide_dtype(scores))
    # The gradient 1 / (share x sum) of a logarithm stays finite, products with tokens included.
    smallest = torch.finfo(patches.dtype).tiny ** 0.25
    share = patches / patches.sum(1, keepdim=True).clamp_min(smallest)
    logs = F.pad(share.clamp_min(smallest).log(), (num_prefix, 0)).gather(1, slots.positions)
    # a - a is 0, so the factor is exactly 1 and its gradient that of log share.
    factor = 1.0 + slots.masked(logs - logs.detach())
    return reduced * factor.to(reduced.dtype).unsqueeze(-1)


def check_reduction(
    x: Tensor, scores: Tensor, keep: int | Tensor, num_prefix: int, sizes: Tensor | None = None
) -> int | Tensor:
    """``keep``, if it and the tensors of a reduction fit :func:`drop_tokens`; an InputError otherwise."""
    _require_x(x, num_prefix, sizes)
    batch, n, _ = x.shape
    if not scores.is_floating_point() or scores.shape != (batch, n):
        raise InputError(
            f"scores must be floating point of shape {(batch, n)}, got {scores.dtype} {tuple(scores.shape)}"
        )
    if isinstance(keep, Tensor):
        if keep.dtype != torch.int64 or keep.shape != (batch,):
            raise InputError(
                f"keep must be an integer or int64 of shape {(batch,)}, got {keep.dtype} {tuple(keep.shape)}"
            )
        smallest, largest = int(keep.min()), int(keep.max())
    else:
        smallest = largest = keep
    if not 0 <= smallest <= largest <= n - num_prefix:
        raise InputError(f"keep must be in [0, {n - num_prefix}], the number of patch tokens, got {keep}")
    if smallest + num_prefix == 0:
        raise InputError("an image without prefix tokens must keep at least one patch token")
    return keep


def _require_x(x: Tensor, num_prefix: int, sizes: Tensor | None) -> None:
    if x.dim() != 3 or x.numel() == 0 or not x.is_floating_point():
        raise InputError(
            f"x must be a non-empty floating-point tensor of shape (batch, n, c), got {x.dtype} {tuple(x.shape)}"
        )
    if not 0 <= num_prefix <= x.shape[1]:
        raise InputError(f"num_prefix must be in [0, {x.shape[1]}], got {num_prefix}")
    if sizes is not None and (not sizes.is_floating_point() or sizes.shape != x.shape[:2]):
        raise InputError(
            f"sizes must be floating point of shape {tuple(x.shape[:2])}, got {sizes.dtype} {tuple(sizes.shape)}"
        )


def _require_tokens(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dim() != 3 or tensor.shape[:2] != x.shape[:2] or not tensor.is_floating_point():
        raise InputError(
            f"{name} must be floating point of shape ({x.shape[0]}, {x.shape[1]}, d), "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
