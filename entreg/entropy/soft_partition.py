"""What the two differentiable surrogates share: mean cell masses of a point set, and their Shannon entropy.

A soft partition gives every point a probability for each of k cells. The mean of these probabilities over the
points is the vector of *masses*; the surrogate is the Shannon entropy of the masses in nats (paper, "Method").
Subclasses say how a point's probabilities arise (:class:`~entreg.entropy.ball.BallEntropy`,
:class:`~entreg.entropy.halfspace.HalfspaceEntropy`).

Arithmetic is float32 at least (float64 for float64 points or parameters), whatever autocast asks for: bfloat16
logits would carry errors of several units at the sharpness that makes a soft partition useful.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entreg.entropy.certificate import EntropyCertificate, certify
from entreg.errors import InputError

SHARPNESS_UNITS = ("data", "absolute")
_NOT_FINITE = (
    "points and parameters must be finite and small enough for the squares of their distances to be finite "
    "in the dtype of the computation"
)


def entropy_of_masses(masses: Tensor) -> Tensor:
    """Shannon entropy in nats over the last axis of non-negative masses that sum to one.

    Unlike :func:`torch.special.entr`, an exactly empty cell has a finite (zero) gradient.
    """
    return torch.special.entr(masses.clamp_min(torch.finfo(masses.dtype).tiny)).sum(-1)


def annealed_sharpness(progress: float, start: float, end: float) -> float:
    """Geometric interpolation of the sharpness, for annealing during training (our choice of curve).

    Usage: ``surrogate.sharpness = annealed_sharpness(step / steps, 2.0, 50.0)``.

    Args:
        progress: fraction of the training done; values outside [0, 1] are clipped.
        start: sharpness at progress 0, above 0.
        end: sharpness at progress 1, above 0.

    Raises:
        InputError: ``start`` or ``end`` not positive and finite, or ``progress`` is NaN.
    """
    if math.isnan(progress):
        raise InputError("progress must be a number in [0, 1], got nan")
    first, last = positive_number("start", start), positive_number("end", end)
    return first * (last / first) ** min(max(progress, 0.0), 1.0)


def positive_number(name: str, value: float) -> float:
    """``value`` as a float, or an InputError that names it."""
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} must be a positive finite number, got {value}")
    return number


class SoftPartitionEntropy(nn.Module, ABC):
    """Base of the surrogates: ``(..., n, dim)`` points to ``(...)`` entropies in nats.

    Args:
        dim: coordinates per point, at least 1.
        sharpness: how hard the soft cells are; the subclass says in which formula. Positive and finite.
        sharpness_unit: ``"data"`` measures the sharpness in units of each point set's own scale, treated as a
            constant in the gradient, so that the entropy does not change when points and parameters are scaled
            together; ``"absolute"`` takes the number as it is, as the paper's formulas do.
        chunk_size: points of a set that are processed at once. Above it, chunks are recomputed in the backward
            pass, so that memory beyond the points and their gradient stays O(chunk_size x cells).
        check_finite: whether a NaN or infinite point raises. Only the entropies are looked at: a NaN or infinity
            anywhere in the points makes its set's entropy or scale non-finite, so the check costs one comparison
            per set, not per point. On a GPU it waits for the result; switch it off to avoid that.
    """

    def __init__(self, dim: int, *, sharpness: float, sharpness_unit: str, chunk_size: int, check_finite: bool) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"dim must be at least 1, got {dim}")
        if sharpness_unit not in SHARPNESS_UNITS:
            raise InputError(f"sharpness_unit must be one of {SHARPNESS_UNITS}, got {sharpness_unit!r}")
        if chunk_size < 1:
            raise InputError(f"chunk_size must be at least 1, got {chunk_size}")
        self.dim = dim
        self.sharpness_unit = sharpness_unit
        self.chunk_size = chunk_size
        self.check_finite = check_finite
        self.sharpness = sharpness

    @property
    def sharpness(self) -> float:
        """The present sharpness; assign to it to anneal. It is part of ``state_dict()``."""
        return self._sharpness

    @sharpness.setter
    def sharpness(self, value: float) -> None:
        self._sharpness = positive_number("sharpness", value)

    def get_extra_state(self) -> dict[str, float]:
        return {"sharpness": self._sharpness}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.sharpness = state["sharpness"]

    @property
    @abstractmethod
    def num_cells(self) -> int:
        """Number of cells k of the partition."""

    @abstractmethod
    def _parameters_of(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The learnable tensors in the dtype of the computation."""

    @abstractmethod
    def _scale(self, points: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """The data's own scale, detached; the sharpness is divided by it."""

    @abstractmethod
    def _mass_sum(self, points: Tensor, sharpness: Tensor | float, parameters: tuple[Tensor, ...]) -> Tensor:
        """Sum over the points of a chunk of their cell probabilities: (..., k)."""

    @abstractmethod
    def _certify_chunk(
        self, points: Tensor, sharpness: Tensor | float, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For a float64 chunk: sum of the soft assignments (..., k), hard cell of each point (..., chunk) int64, and
        a bound on the total variation distance between each point's soft and hard assignment (..., chunk)."""

    @abstractmethod
    def _certificate_values_per_point(self) -> int:
        """Temporaries per point of ``_certify_chunk``, to choose its chunks."""

    def masses(self, points: Tensor) -> Tensor:
        """Mean probability of each cell.

        Args:
            points: (..., n, dim), floating point, n at least 1.

        Returns:
            (..., num_cells), each row summing to one up to rounding.

        Raises:
            InputError: wrong shape or dtype, no points, or non-finite points (see ``check_finite``).
        """
        masses, scale = self._masses_and_scale(points)
        self._require_finite(masses, scale)
        return masses

    def forward(self, points: Tensor) -> Tensor:
        """Entropy of the mean cell masses.

        Args:
            points: (..., n, dim), floating point, n at least 1.

        Returns:
            (...) nats in [0, log(num_cells)], float32 or float64.

        Raises:
            InputError: wrong shape or dtype, no points, or non-finite points (see ``check_finite``).
        """
        masses, scale = self._masses_and_scale(points)
        entropy = entropy_of_masses(masses)
        # clamp_min lets NaN through, so that a NaN mass shows in the entropy.
        self._require_finite(entropy, scale)
        return entropy

    @torch.no_grad()
    def certificate(self, points: Tensor) -> EntropyCertificate:
        """Soft and hard entropy of a point set, and a guaranteed bound on their difference.

        Computed in float64 whatever the dtype of the points; the bound includes the rounding of that computation.
        ``soft`` is the float64 value of what :meth:`forward` returns, ``hard`` the entropy of the partition that
        puts each point wholly into its most probable cell (the limit of infinite sharpness).

        Args:
            points: (..., n, dim), floating point, n at least 1.

        Returns:
            an :class:`~entreg.entropy.certificate.EntropyCertificate` of float64 tensors (...), in nats.

        Raises:
            InputError: wrong shape or dtype, no points, or non-finite points.
        """
        self._require_points(points)
        count, leading = points.shape[-2], points.shape[:-2]
        with torch.autocast(points.device.type, enabled=False):
            exact = points.double()
            parameters = self._parameters_of(torch.float64)
            scale = self._scale(exact, parameters) if self.sharpness_unit == "data" else None
            sharpness = self._sharpness if scale is None else self._sharpness / scale
            soft = exact.new_zeros(*leading, self.num_cells)
            hard = torch.zeros_like(soft)
            variation = exact.new_zeros(leading)
            size = 2**22 // (max(1, leading.numel()) * self._certificate_values_per_point())
            for chunk in exact.split(max(1, size), dim=-2):
                chunk_soft, cells, chunk_variation = self._certify_chunk(chunk, sharpness, parameters)
                soft += chunk_soft
                hard.scatter_add_(-1, cells, torch.ones_like(chunk_variation))
                variation += chunk_variation.sum(-1)
        result = certify(soft / count, hard / count, variation / count, count)
        if not torch.isfinite(result.soft).all() or (scale is not None and not torch.isfinite(scale).all()):
            raise InputError(_NOT_FINITE)
        return result

    def _masses_and_scale(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        self._require_points(points)
        with torch.autocast(points.device.type, enabled=False):
            parameters = self._parameters_of(self._computation_dtype(points))
            scale, sharpness = None, self._sharpness
            if self.sharpness_unit == "data":
                scale = self._scale(points, parameters)
                sharpness = self._sharpness / scale
            total = None
            chunks = self._chunks(points)
            for chunk in chunks:
                if len(chunks) == 1 or not torch.is_grad_enabled():
                    part = self._mass_sum(chunk, sharpness, parameters)
                else:
                    part = checkpoint(
                        self._mass_sum,
                        chunk,
                        sharpness,
                        parameters,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                total = part if total is None else total + part
            return total / points.shape[-2], scale

    def _chunks(self, points: Tensor) -> tuple[Tensor, ...]:
        # One split, not a slice per chunk: the gradient of every slice would be as large as all the points.
        return points.split(self.chunk_size, dim=-2)

    def _computation_dtype(self, points: Tensor) -> torch.dtype:
        dtype = torch.float32
        for tensor in (points, *self.parameters()):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def _require_points(self, points: Tensor) -> None:
        if not isinstance(points, Tensor) or not points.is_floating_point():
            kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
            raise InputError(f"points must be a floating-point tensor, got {kind}")
        if points.dim() < 2 or points.shape[-1] != self.dim:
            raise InputError(f"points must have shape (..., n, {self.dim}), got {tuple(points.shape)}")
        if points.numel() == 0:
            raise InputError(f"points must hold at least one point, got shape {tuple(points.shape)}")

    def _require_finite(self, values: Tensor, scale: Tensor | None) -> None:
        if not self.check_finite or torch.compiler.is_compiling():
            return
        finite = torch.isfinite(values).all()
        if scale is not None:
            finite = finite & torch.isfinite(scale).all()
        if not finite:
            raise InputError(_NOT_FINITE)


def population_variance(
    pieces: Callable[[], Iterable[Tensor]], count: int, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Variance about the mean in two passes, so that points far from the origin lose no digits to cancellation.

    Args:
        pieces: called once per pass; gives tensors (..., chunk, features) that together hold ``count`` points.
        count: number of points.
        dims: (-2,) for one variance per feature, (-2, -1) for their sum.

    Returns:
        variance (..., features) or (...), and mean (..., features).
    """
    mean = sum(piece.sum(-2) for piece in pieces()) / count
    squares = sum(torch.linalg.vector_norm(piece - mean.unsqueeze(-2), dim=dims).square() for piece in pieces())
    return squares / count, mean
