"""How far a soft partition entropy can be from the hard one: a guaranteed bound.

Every point's soft assignment differs from its hard one by a total variation distance that follows from the point's
margin. Distances of means are at most means of distances, so the masses of the two partitions differ by at most the
mean T of these. The sharp continuity bound of Shannon entropy for k outcomes (Fannes 1973, in Audenaert's form of
2007; for classical distributions Zhang 2007) then gives |H_soft - H_hard| <= T log(k - 1) + h(T), with h the binary
entropy, for T <= 1 - 1/k, and log k beyond.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class EntropyCertificate(NamedTuple):
    """Holds float64 tensors of one shape, in nats, with ``|soft - hard| <= bound``; unpacks in this order.

    Attributes:
        soft: entropy of the mean soft assignments.
        hard: entropy of the partition into most probable cells.
        bound: guaranteed bound on their difference; rounding errors of all three are included.
    """

    soft: Tensor
    hard: Tensor
    bound: Tensor


def entropy_continuity_bound(total_variation: Tensor, outcomes: int) -> Tensor:
    """Largest difference in Shannon entropy of two distributions at a given distance.

    Args:
        total_variation: half the L1 distance (or an upper bound on it), in [0, 1]; any shape.
        outcomes: number k of outcomes, at least 1.

    Returns:
        nats, non-decreasing in ``total_variation``: T log(k - 1) + h(T), from T = 1 - 1/k on log k.
    """
    if outcomes == 1:
        return torch.zeros_like(total_variation)
    distance = total_variation.clamp(0.0, 1.0 - 1.0 / outcomes)
    binary_entropy = torch.special.entr(distance) + torch.special.entr(1.0 - distance)
    return distance * math.log(outcomes - 1) + binary_entropy


def certify(soft_masses: Tensor, hard_masses: Tensor, mean_variation: Tensor, count: int) -> EntropyCertificate:
    """Certificate from float64 masses.

    Args:
        soft_masses: (..., k) means of soft assignments.
        hard_masses: (..., k) means of hard assignments.
        mean_variation: (...) mean over the points of a bound on the total variation distance between the soft and
            the hard assignment of a point; must include the rounding error of the margins.
        count: number of points averaged.
    """
    outcomes = soft_masses.shape[-1]
    # Means of `count` terms and normalisations over `outcomes` cells are each off by at most that many roundings;
    # the constants cover exp, log, sigmoid and the divisions generously.
    rounding = 2.0 * (count + outcomes + 64) * torch.finfo(torch.float64).eps
    variation = mean_variation * (1.0 + rounding) + rounding
    bound = entropy_continuity_bound(variation, outcomes)
    # Summing the entropies themselves, whose masses sum to one only up to rounding.
    bound = bound + (rounding * (1.0 + math.log(outcomes)) if outcomes > 1 else 0.0)
    return EntropyCertificate(
        soft=torch.special.entr(soft_masses).sum(-1), hard=torch.special.entr(hard_masses).sum(-1), bound=bound
    )
