"""Weighted representatives of a soft partition of the tokens, coupled to the attention that the tokens receive.

Each patch token i has a mass w_i, its share of the selection scores (of the attention, say). k anchors are chosen
among the tokens; with cosine similarities s_ij of features,

    p_ij = softmax_j(sharpness * s_ij),    M_j = sum_i w_i p_ij,    y_j = (sum_i w_i p_ij x_i) / M_j,

and token j attracts attention in proportion to its mass, as if it were k M_j tokens. This is the ball surrogate's
assignment (paper, "Method") with attention for the measure: parts that nobody looks at weigh nothing, the entropy of
M is the number of nats that the choice of a token costs, and every score has a gradient, also those of tokens that
were not chosen as anchors. Coupling parts to attention mass is our choice; the paper leaves open how a partition of
low entropy narrows the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from entreg.errors import InputError
from entreg.sparse.config import ANCHORS
from entreg.sparse.tokens.reduction import TokenReduction, check_reduction
from entreg.sparse.tokens.slots import rows_at, wide_dtype


def partition_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    *,
    num_prefix: int,
    features: Tensor | None = None,
    sharpness: float = 10.0,
    anchors: str = "residual",
) -> tuple[Tensor, TokenReduction]:
    """Replace the patch tokens by the weighted means of a soft partition, see the module.

    Args:
        x: (batch, n, c), floating point.
        scores: (batch, n), non-negative; those of the prefix are not looked at. Gradients pass through them.
        keep: number k of representatives, in [1, n - num_prefix]; all images have the same.
        num_prefix: in [0, n).
        features: (batch, n, d), whose cosines are the similarities, e.g. the mean keys of the next layer's heads; x
            itself by default. Gradients pass through them.
        sharpness: above 0; as it grows the partition becomes that of the most similar anchor.
        anchors: ``top``, the tokens of largest mass; or ``residual``, one after the other that of the largest mass not
            yet explained, where an anchor explains the share exp(sharpness (s - 1)) of a token of similarity s.

    Returns:
        (batch, num_prefix + k, c) prefix and representatives, in the order in which the anchors were chosen, and what
        became of all tokens: ``sizes`` are k M_j, so that ``key_bias`` is log(k M_j); ``assignment`` is each token's
        most probable part.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above.
    """
    check_reduction(x, scores, keep, num_prefix)
    if keep < 1:
        raise InputError("a partition needs keep of at least 1: a dropped token has no representative")
    if not sharpness > 0:
        raise InputError(f"sharpness must be above 0, got {sharpness}")
    if anchors not in ANCHORS:
        raise InputError(f"anchors must be one of {', '.join(ANCHORS)}, got '{anchors}'")
    features = x if features is None else features
    if features.shape[:2] != x.shape[:2]:
        raise InputError(f"features must be of shape {(*x.shape[:2], 'd')}, got {tuple(features.shape)}")
    dtype = wide_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        # Scores that are all zero make equal masses, with finite gradients.
        mass = scores[:, num_prefix:].to(dtype).clamp_min(0.0) + torch.finfo(dtype).tiny ** 0.25
        mass = mass / mass.sum(-1, keepdim=True)
        unit = F.normalize(features[:, num_prefix:].to(dtype), dim=-1)
        with torch.no_grad():
            chosen = _residual_anchors(mass, unit, keep, sharpness) if anchors == "residual" else _top(mass, keep)
        logits = sharpness * (unit @ rows_at(unit, chosen).mT)
        weighted = mass.unsqueeze(-1) * logits.softmax(-1)
        masses = weighted.sum(1)
        patches = x[:, num_prefix:].to(dtype)
        smallest = torch.finfo(dtype).tiny ** 0.5
        means = (weighted.mT @ patches) / masses.clamp_min(smallest).unsqueeze(-1)
    ones = mass.new_ones(len(x), num_prefix)
    prefix = torch.arange(num_prefix, device=x.device).expand(len(x), -1)
    reduction = TokenReduction(
        kept=torch.cat((prefix, chosen + num_prefix), 1),
        assignment=torch.cat((prefix, logits.detach().argmax(-1) + num_prefix), 1),
        sizes=torch.cat((ones, (keep * masses).clamp_min(smallest)), 1),
        scores=scores,
    )
    return torch.cat((x[:, :num_prefix], means.to(x.dtype)), 1), reduction


def fuse_tokens(x: Tensor, scores: Tensor, keep: int, *, num_prefix: int) -> tuple[Tensor, TokenReduction]:
    """Keep the ``keep - 1`` patch tokens of largest score and fuse all others into one mean weighted by their scores.

    The rule of EViT (Liang et al., ICLR 2022, "Not All Patches are What You Need", section 3), from its description:
    a rival. The fused token comes last; as published, it attracts attention like any other.

    Args:
        x, scores, num_prefix: as in :func:`partition_tokens`.
        keep: patch tokens that result, in [1, n - num_prefix].

    Raises:
        InputError: shapes, dtypes or values that do not fit the above.
    """
    check_reduction(x, scores, keep, num_prefix)
    if keep < 1:
        raise InputError("fusing needs keep of at least 1, the fused token")
    patches = scores[:, num_prefix:]
    chosen = _top(patches.detach(), keep - 1).sort(dim=1).values
    rest = torch.ones_like(patches).scatter(1, chosen, 0.0)
    weights = patches.clamp_min(0.0) * rest
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    fused = weights.to(x.dtype).unsqueeze(1) @ x[:, num_prefix:]
    prefix = torch.arange(num_prefix, device=x.device).expand(len(x), -1)
    places = torch.full_like(patches, keep - 1, dtype=torch.int64)
    places = places.scatter(1, chosen, torch.arange(keep - 1, device=x.device).expand(len(x), -1))
    # The fused token is nobody's own: it stands at its heaviest member's place.
    heaviest = weights.detach().argmax(-1, keepdim=True)
    reduction = TokenReduction(
        kept=torch.cat((prefix, chosen + num_prefix, heaviest + num_prefix), 1),
        assignment=torch.cat((prefix, places + num_prefix), 1),
        sizes=x.new_ones(len(x), num_prefix + keep, dtype=wide_dtype(x)),
        scores=scores,
    )
    kept = rows_at(x, torch.cat((prefix, chosen + num_prefix), 1))
    return torch.cat((kept, fused), 1), reduction


def _top(mass: Tensor, keep: int) -> Tensor:
    return mass.argsort(dim=-1, descending=True, stable=True)[:, :keep]


def _residual_anchors(mass: Tensor, unit: Tensor, keep: int, sharpness: float) -> Tensor:
    """(batch, keep) greedy choice of the largest mass that the anchors before do not explain."""
    unexplained = 1.0 - (sharpness * (unit @ unit.mT - 1.0)).exp()
    left = mass.clone()
    chosen = []
    for _ in range(keep):
        index = left.argmax(-1, keepdim=True)
        chosen.append(index)
        shares = unexplained.gather(1, index.unsqueeze(-1).expand(-1, -1, left.shape[1])).squeeze(1)
        # Chosen once: -1 is below every mass that is left.
        left = (left * shares.clamp_min(0.0)).scatter(1, torch.cat(chosen, 1), -1.0)
    return torch.cat(chosen, 1)
