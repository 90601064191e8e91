"""The ball surrogate: entropy of the soft nearest-anchor partition (paper, "Method", H_diff)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from entreg.entropy.anchors import choose_anchors
from entreg.entropy.soft_partition import SoftPartitionEntropy, population_variance
from entreg.errors import InputError


class BallEntropy(SoftPartitionEntropy):
    """Differentiable range-partition entropy with balls around anchors.

    With anchors c_j, p_ij = softmax_j(-alpha |x_i - c_j|^2) and masses m_j = mean_i p_ij, the value is
    -sum_j m_j log m_j in nats (paper, "Method"): invariant to the order of the points, and as alpha grows tending
    to the entropy of the nearest-anchor partition.

    The sharpness sets alpha. With ``sharpness_unit="data"`` (our choice; the paper fixes alpha) alpha = sharpness /
    total variance of the point set, i.e. the mean squared distance of its points from their mean: the entropy then
    stays the same when points and anchors are scaled or shifted together. A set without spread (one point, or n equal
    points) is measured at the resolution of its dtype, which amounts to a hard assignment. With ``"absolute"``, alpha
    = sharpness.

    Attributes:
        anchors: parameter of shape (num_anchors, dim), standard normal until set by :meth:`initialize_from`, loaded
            or trained.

    Args:
        num_anchors: number k of anchors, at least 1.
        dim: coordinates per point.
        sharpness: positive; 10 suits around 16 anchors chosen from low-dimensional data.
        sharpness_unit: ``"data"`` or ``"absolute"``.
        learn_anchors: whether the anchors take gradients.
        chunk_size: points per set processed at once; see :class:`SoftPartitionEntropy`.
        check_finite: whether non-finite points raise; see :class:`SoftPartitionEntropy`.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        num_anchors: int,
        dim: int,
        *,
        sharpness: float = 10.0,
        sharpness_unit: str = "data",
        learn_anchors: bool = True,
        chunk_size: int = 16384,
        check_finite: bool = True,
    ) -> None:
        super().__init__(
            dim,
            sharpness=sharpness,
            sharpness_unit=sharpness_unit,
            chunk_size=chunk_size,
            check_finite=check_finite,
        )
        if num_anchors < 1:
            raise InputError(f"num_anchors must be at least 1, got {num_anchors}")
        self.anchors = nn.Parameter(torch.randn(num_anchors, dim), requires_grad=learn_anchors)

    @property
    def num_cells(self) -> int:
        return self.anchors.shape[0]

    @torch.no_grad()
    def initialize_from(self, points: Tensor, method: str = "kmeans++", seed: int = 0) -> BallEntropy:
        """Place the anchors on points of the data; the same seed gives the same anchors.

        Args:
            points: (..., n, dim) with at least num_anchors points; leading axes are merged.
            method: ``"kmeans++"`` (each next anchor drawn with probability proportional to its squared distance from
                the nearest so far), ``"farthest"`` (the farthest point instead) or ``"random"``.
            seed: of the random choices.

        Returns:
            self.

        Raises:
            InputError: wrong shape, non-finite points, unknown method, or too few (distinct) points.
        """
        self._require_points(points)
        chosen = choose_anchors(points.reshape(-1, self.dim), self.num_cells, method, seed)
        self.anchors.copy_(chosen.to(self.anchors))
        return self

    def _parameters_of(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self.anchors.to(dtype),)

    @torch.no_grad()
    def _scale(self, points: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        (anchors,) = parameters
        variance, mean = population_variance(
            lambda: (chunk.to(anchors.dtype) for chunk in self._chunks(points)), points.shape[-2], (-2, -1)
        )
        precision = torch.finfo(anchors.dtype)
        magnitude = mean.square().sum(-1) + anchors.square().sum(-1).amax()
        # Coordinates are only known to eps times their size: a smaller spread than that is noise. The last term
        # keeps 1 / scale finite for a set of zeros.
        resolution = precision.eps**2 * magnitude + math.sqrt(precision.tiny)
        return torch.maximum(variance, resolution)

    def _mass_sum(self, points: Tensor, sharpness: Tensor | float, parameters: tuple[Tensor, ...]) -> Tensor:
        (anchors,) = parameters
        # |x - c|^2 = |x - m|^2 - 2 x.(c - m) + 2 m.(c - m) + |c - m|^2 for any m. The first term is the same for
        # every anchor and leaves the softmax, so that one matrix product replaces all differences x - c. With m
        # the anchors' mean, nothing large cancels when data and anchors lie far from the origin.
        center = anchors.detach().mean(0)
        centered = anchors - center
        offset = (centered * (2.0 * center + centered)).sum(-1)
        logits = torch.nn.functional.linear(points.to(anchors.dtype), 2.0 * centered, -offset)
        if isinstance(sharpness, Tensor):
            sharpness = sharpness[..., None, None]
        return torch.softmax(sharpness * logits, dim=-1).sum(-2)

    def _certificate_values_per_point(self) -> int:
        return self.dim + 3 * self.num_cells

    def _certify_chunk(
        self, points: Tensor, sharpness: Tensor | float, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        (anchors,) = parameters
        distances = torch.stack([(points - anchor).square().sum(-1) for anchor in anchors], dim=-1)
        alpha = sharpness[..., None] if isinstance(sharpness, Tensor) else sharpness
        logits = (-alpha[..., None] if isinstance(alpha, Tensor) else -alpha) * distances
        soft = torch.softmax(logits, dim=-1).sum(-2)
        nearest = distances.argmin(-1)
        if self.num_cells == 1:
            return soft, nearest, torch.zeros_like(distances[..., 0])
        first, second = torch.topk(distances, 2, dim=-1, largest=False).values.unbind(-1)
        # A computed squared distance (and its product with alpha) is off by at most (dim + 4) roundings.
        relative = 2.0 * (self.dim + 8) * torch.finfo(torch.float64).eps
        margin = second * (1.0 - relative) - first * (1.0 + relative)
        # The nearest anchor's probability is at least 1 / (1 + (k - 1) exp(-alpha margin)).
        return soft, nearest, torch.sigmoid(math.log(self.num_cells - 1) - alpha * margin)
