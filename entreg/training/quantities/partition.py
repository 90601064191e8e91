"""Entropies of a soft partition of keys or tokens, with anchors that are trained along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entreg.entropy import BallEntropy, HalfspaceEntropy
from entreg.entropy.soft_partition import entropy_of_masses
from entreg.errors import ConfigError
from entreg.training.quantities.quantity import QUANTITIES, Quantity

if TYPE_CHECKING:
    from entreg.training.penalties import PenaltySettings


class Ball(Quantity):
    """Entropy of the ball surrogate."""

    with_anchors = True

    def make_anchors(self, settings: PenaltySettings, width: int) -> nn.Module:
        return BallEntropy(settings.num_cells, width, sharpness=settings.sharpness)

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        return anchors(points_of(settings, source))


class Halfspace(Ball):
    """Entropy of the halfspace surrogate."""

    def make_anchors(self, settings: PenaltySettings, width: int) -> nn.Module:
        return HalfspaceEntropy(settings.num_cells.bit_length() - 1, width, sharpness=settings.sharpness)


class RateDistortion(Ball):
    """Entropy of the partition plus what it costs to replace every point by its anchor.

    The distortion is the mean squared distance to the anchor, relative to the total variance of the points, so that
    putting all points into one part (which makes the entropy alone zero) costs about 1. Anchors move with it.
    """

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        points = points_of(settings, source)
        squared = torch.cdist(points, anchors.anchors.expand(len(points), -1, -1)).square()
        variance = points.var(dim=1, correction=0).sum(-1).clamp_min(torch.finfo(points.dtype).tiny)
        weights = torch.softmax(-settings.sharpness * squared / variance[:, None, None], dim=-1)
        distortion = (weights * squared).sum(-1).mean(-1) / variance
        return entropy_of_masses(weights.mean(1)) + settings.distortion * distortion


QUANTITIES.register("ball", Ball())
QUANTITIES.register("halfspace", Halfspace())
QUANTITIES.register("rate_distortion", RateDistortion())


def points_of(settings: PenaltySettings, source: Any) -> Tensor:
    """(batch, n, d) float32 points that a penalty partitions."""
    if settings.points == "tokens":
        return source.tokens.float()
    if source.key_mask is not None:
        raise ConfigError(f"the penalty {settings.quantity} needs batches without padding, got a mask of the keys")
    return source.keys.transpose(1, 2).flatten(2).float()
