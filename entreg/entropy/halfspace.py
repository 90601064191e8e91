"""The halfspace surrogate: entropy of the soft cells of an arrangement of halfspaces (paper, "Method", H_soft)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from entreg.entropy.anchors import choose_halfspaces
from entreg.entropy.soft_partition import SoftPartitionEntropy, population_variance
from entreg.errors import InputError

MAX_HALFSPACES = 16


class HalfspaceEntropy(SoftPartitionEntropy):
    """Differentiable range-partition entropy with cells cut out by halfspaces.

    With soft indicators s_t(x) = sigmoid((w_t . x - b_t) / tau) (paper, "Method"), the cells are all 2^T sign patterns
    of the T halfspaces; the probability of a cell is the product of s_t or 1 - s_t over t. These products sum to one
    over the cells, so "normalised" needs no further step. The value is the entropy in nats of the mean cell
    probabilities.

    The patterns are computed as a product of two halves: each point has 2^(T/2) products of the first half of the
    halfspaces and as many of the second, and one matrix product over the points gives all 2^T masses. Memory is
    O(chunk_size x 2^(T/2) + 2^T), which is why T is limited to 16 (our choice; 65,536 cells).

    The sharpness is 1/tau. With ``sharpness_unit="data"`` (our choice; the paper fixes tau) the projections w_t . x
    of each halfspace are measured in units of their own standard deviation over the point set, so that the entropy
    does not change when points and offsets, or a normal and its offset, are scaled together. A set without spread is
    measured at the resolution of its dtype, which amounts to hard indicators. With ``"absolute"``, tau = 1/sharpness.

    Attributes:
        normals: parameter (num_halfspaces, dim), the w_t; random unit vectors at first.
        offsets: parameter (num_halfspaces,), the b_t; zero at first.

    Args:
        num_halfspaces: T, 1 to 16.
        dim: coordinates per point.
        sharpness: 1/tau, positive.
        sharpness_unit: ``"data"`` or ``"absolute"``.
        learn_halfspaces: whether normals and offsets take gradients.
        chunk_size: points per set processed at once; see :class:`SoftPartitionEntropy`.
        check_finite: whether non-finite points raise; see :class:`SoftPartitionEntropy`.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        num_halfspaces: int,
        dim: int,
        *,
        sharpness: float = 10.0,
        sharpness_unit: str = "data",
        learn_halfspaces: bool = True,
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
        if not 1 <= num_halfspaces <= MAX_HALFSPACES:
            raise InputError(
                f"num_halfspaces must be 1 to {MAX_HALFSPACES} (2^T cells are computed), got {num_halfspaces}"
            )
        normals = nn.functional.normalize(torch.randn(num_halfspaces, dim), dim=-1)
        self.normals = nn.Parameter(normals, requires_grad=learn_halfspaces)
        self.offsets = nn.Parameter(torch.zeros(num_halfspaces), requires_grad=learn_halfspaces)

    @property
    def num_halfspaces(self) -> int:
        return self.normals.shape[0]

    @property
    def num_cells(self) -> int:
        """2^T; bit T - 1 - t of a cell's index tells whether its points lie in halfspace t."""
        return 2**self.num_halfspaces

    @torch.no_grad()
    def initialize_from(self, points: Tensor, method: str = "principal", seed: int = 0) -> HalfspaceEntropy:
        """Place the halfspaces so that they cut the data evenly; the same seed gives the same halfspaces.

        Args:
            points: (..., n, dim), n at least 1; leading axes are merged.
            method: ``"principal"`` (quantiles along the principal directions) or ``"random"`` (medians along random
                directions); see :func:`~entreg.entropy.anchors.choose_halfspaces`.
            seed: of the random choices.

        Returns:
            self.

        Raises:
            InputError: wrong shape, non-finite points or unknown method.
        """
        self._require_points(points)
        normals, offsets = choose_halfspaces(points.reshape(-1, self.dim), self.num_halfspaces, method, seed)
        self.normals.copy_(normals.to(self.normals))
        self.offsets.copy_(offsets.to(self.offsets))
        return self

    def _parameters_of(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.normals.to(dtype), self.offsets.to(dtype)

    @torch.no_grad()
    def _scale(self, points: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        normals, offsets = parameters
        variance, mean = population_variance(
            lambda: (chunk.to(normals.dtype) @ normals.t() for chunk in self._chunks(points)),
            points.shape[-2],
            (-2,),
        )
        precision = torch.finfo(normals.dtype)
        # As for balls: a spread below the resolution of the projections is noise, and zero would divide.
        resolution = precision.eps * (mean.abs() + offsets.abs()) + math.sqrt(precision.tiny)
        return torch.maximum(variance.sqrt(), resolution)

    def _mass_sum(self, points: Tensor, sharpness: Tensor | float, parameters: tuple[Tensor, ...]) -> Tensor:
        normals, offsets = parameters
        margins = nn.functional.linear(points.to(normals.dtype), normals, -offsets)
        if isinstance(sharpness, Tensor):
            sharpness = sharpness.unsqueeze(-2)
        margins = sharpness * margins
        # sigmoid(-u) instead of 1 - sigmoid(u): full relative accuracy at both ends.
        indicators = torch.stack((torch.sigmoid(-margins), torch.sigmoid(margins)), dim=-1)
        half = self.num_halfspaces // 2
        right = _pattern_products(indicators[..., half:, :])
        if half == 0:
            return right.sum(-2)
        left = _pattern_products(indicators[..., :half, :])
        return (left.transpose(-1, -2) @ right).flatten(-2)

    def _certificate_values_per_point(self) -> int:
        return self.dim + 8 * self.num_halfspaces + 4 * 2 ** ((self.num_halfspaces + 1) // 2)

    def _certify_chunk(
        self, points: Tensor, sharpness: Tensor | float, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        normals, offsets = parameters
        soft = self._mass_sum(points, sharpness, parameters)
        if isinstance(sharpness, Tensor):
            sharpness = sharpness.unsqueeze(-2)
        margins = nn.functional.linear(points, normals, -offsets)
        inside = margins >= 0
        weights = 2 ** torch.arange(self.num_halfspaces - 1, -1, -1, device=points.device)
        cells = (inside * weights).sum(-1)
        size = nn.functional.linear(points.abs(), normals.abs(), offsets.abs())
        rounding = 2.0 * (self.dim + 8) * torch.finfo(torch.float64).eps * size
        certain = sharpness * (margins.abs() - rounding)
        # The hard cell's probability is the product of the sigmoids of the absolute margins.
        return soft, cells, -torch.expm1(nn.functional.logsigmoid(certain).sum(-1))


def _pattern_products(indicators: Tensor) -> Tensor:
    """(..., chunk, T, 2) to (..., chunk, 2^T): all products of one choice per halfspace, the first one slowest."""
    products = indicators[..., 0, :]
    for t in range(1, indicators.shape[-2]):
        products = (products.unsqueeze(-1) * indicators[..., t, :].unsqueeze(-2)).flatten(-2)
    return products
