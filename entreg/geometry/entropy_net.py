"""EntropyNet: a small point-set network that makes a point set cheaper for a geometric algorithm.

Two uses of one trained network. ``rewrite`` is the paper's: the points are moved and a classical algorithm runs on
the moved points, so that the answer belongs to other points than those asked about. ``advise`` is ours: only what the
surrogate learned (its halfspaces or anchors) is handed on, to the exact algorithms of :mod:`entreg.geometry.advice`.

The paper gives no architecture beyond "point-set network"; widths, pooling and the residual form are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entreg.entropy.ball import BallEntropy
from entreg.entropy.halfspace import HalfspaceEntropy
from entreg.errors import InputError
from entreg.geometry.advice import advised_convex_hull, advised_delaunay, advised_pareto_front
from entreg.geometry.validation import as_points, require_finite
from entreg.kernels import kernel
from entreg.parallel import chunk_ranges, resolve_threads, run_chunks

_THREADS_FROM = 10_000


@dataclass(frozen=True)
class Advice:
    """What a trained surrogate says about the data, in the data's own coordinates.

    Attributes:
        directions: (t, 2) float64, where to look for extreme points.
        anchors: (k, 2) float64, centres of the learned cells.
    """

    directions: np.ndarray
    anchors: np.ndarray

    def convex_hull(self, points: Any, *, threads: int | None = None) -> np.ndarray:
        """Exact convex hull, see :func:`entreg.geometry.advice.advised_convex_hull`."""
        return advised_convex_hull(points, self.directions, threads=threads)

    def pareto_front(self, points: Any, *, threads: int | None = None) -> np.ndarray:
        """Exact Pareto front, see :func:`entreg.geometry.advice.advised_pareto_front`."""
        return advised_pareto_front(points, self.directions, threads=threads)

    def delaunay(self, points: Any, *, threads: int | None = None) -> np.ndarray:
        """Triangles of an exact Delaunay triangulation, see :func:`entreg.geometry.advice.advised_delaunay`."""
        return advised_delaunay(points, self.anchors, threads=threads)


class EntropyNet(nn.Module):
    """Residual displacement of every point, given the point and a pooled summary of the set.

    Features of a point: a linear map and ReLU. Context: mean and maximum of these features over the set, mapped
    linearly. Displacement: a two-layer network of features plus context. Reordering the input reorders the output
    alike (permutation equivariance). The last layer starts at zero, so that an untrained network changes nothing.

    Args:
        surrogate: the trained-along entropy surrogate over (..., n, 2) points in normalised coordinates.
        hidden: width, at least 1.
        context_points: points of a large set that the context is pooled over, at least 1; evenly spaced in the
            input's order.

    Raises:
        InputError: ``hidden`` or ``context_points`` below 1.
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self, surrogate: BallEntropy | HalfspaceEntropy, *, hidden: int = 32, context_points: int = 1024
    ) -> None:
        super().__init__()
        if hidden < 1 or context_points < 1:
            raise InputError(f"hidden and context_points must be at least 1, got {hidden} and {context_points}")
        self.surrogate = surrogate
        self.context_points = context_points
        self.point_layer = nn.Linear(2, hidden)
        self.context_layer = nn.Linear(2 * hidden, hidden, bias=False)
        self.hidden_layer = nn.Linear(hidden, hidden)
        self.output_layer = nn.Linear(hidden, 2)
        nn.init.zeros_(self.output_layer.weight)
        nn.init.zeros_(self.output_layer.bias)
        # float64: city coordinates and other far-away data must not lose digits before they are centred.
        self.register_buffer("center", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def fit_normalisation(self, points: np.ndarray) -> None:
        """Take centre and half extent of the bounding box of (n, 2) points as origin and unit.

        Raises:
            InputError: all points are equal, or their extent is not a finite number.
        """
        low, high = points.min(axis=0), points.max(axis=0)
        scale = 0.5 * float((high - low).max())
        if not (np.isfinite(scale) and scale > 0):
            raise InputError("EntropyNet needs points that are not all equal and whose extent is finite")
        self.center.copy_(torch.from_numpy(0.5 * (low + high)))
        self.scale.fill_(scale)

    def normalise(self, points: np.ndarray) -> Tensor:
        """(n, 2) float64 points in data coordinates to (n, 2) float32 in [-1, 1] (for the points fitted on)."""
        return torch.from_numpy((points - self.center.numpy()) / self.scale.item()).float()

    def context(self, points: Tensor) -> Tensor:
        """Pooled summary of normalised points (..., n, 2): (..., hidden)."""
        features = torch.relu(self.point_layer(points))
        return self.context_layer(torch.cat([features.mean(dim=-2), features.amax(dim=-2)], dim=-1))

    def displacement(self, points: Tensor, context: Tensor) -> Tensor:
        """Displacement (..., n, 2) of normalised points (..., n, 2) given the context (..., hidden) of their set."""
        features = torch.relu(self.point_layer(points) + context.unsqueeze(-2))
        return self.output_layer(torch.relu(self.hidden_layer(features)))

    def forward(self, points: Tensor) -> Tensor:
        """Move normalised points (..., n, 2); the result has the same shape."""
        return points + self.displacement(points, self.context(points))

    @torch.no_grad()
    def rewrite(self, points: Any, *, threads: int | None = None) -> np.ndarray:
        """Move a point set of any size (mode ``rewrite``).

        The displacement is computed in float32 and added in float64. Were the sum taken in float32, rounding alone
        would throw most points of a circle off the hull, and the speed-up would be credited to the network.

        Args:
            points: (n, 2) finite points in data coordinates.
            threads: threads to use; None for all cores of this process.

        Returns:
            (n, 2) float64, row i the moved ``points[i]``.

        Raises:
            InputError: points of a wrong shape or not finite.
        """
        array = as_points(points)
        require_finite(array)
        center, scale = self.center.numpy(), self.scale.item()
        first, first_bias = self.point_layer.weight.numpy(), self.point_layer.bias.numpy()
        # The same as context(), but nothing here may wake torch's or a BLAS's thread pool: its workers go on spinning
        # for a while and take the cores from the threads below (five times slower on two cores).
        sample = ((array[:: max(1, len(array) // self.context_points)] - center) / scale).astype(np.float32)
        features = np.maximum(sample[:, :1] * first[:, 0] + sample[:, 1:] * first[:, 1] + first_bias, np.float32(0.0))
        pooled = np.concatenate([features.mean(axis=0), features.max(axis=0)])
        context = (self.context_layer.weight.numpy() * pooled).sum(axis=1)
        moved = np.empty_like(array)
        weights = (
            first,
            first_bias + context,
            np.ascontiguousarray(self.hidden_layer.weight.numpy().T),
            self.hidden_layer.bias.numpy(),
            self.output_layer.weight.numpy(),
            self.output_layer.bias.numpy(),
        )
        workers = resolve_threads(threads)
        run_chunks(
            lambda start, stop: _move(array, moved, start, stop, center, scale, *weights),
            chunk_ranges(len(array), 4 * workers if len(array) >= _THREADS_FROM else 1),
            workers,
        )
        return moved

    @torch.no_grad()
    def advice(self, points: Any) -> Advice:
        """What the surrogate learned, in data coordinates (mode ``advise``).

        Directions: the halfspaces' normals, both ways; for balls, from the mean of the anchors to each of them.
        Cells: the mean of each cell's points in a sample of the data (an empty cell gives none).

        Args:
            points: (n, 2) finite sample of the data, at most ``context_points`` of which are looked at.

        Raises:
            InputError: points of a wrong shape or not finite.
        """
        array = as_points(points)
        require_finite(array)
        sample = self.normalise(array[:: max(1, len(array) // self.context_points)])
        if isinstance(self.surrogate, HalfspaceEntropy):
            normals, offsets = self.surrogate.normals, self.surrogate.offsets
            directions = torch.cat([normals, -normals])
            bits = 2 ** torch.arange(len(normals))
            labels = ((sample @ normals.T >= offsets) * bits).sum(dim=1)
        else:
            anchors = self.surrogate.anchors
            directions = anchors - anchors.mean(dim=0)
            labels = torch.cdist(sample, anchors).argmin(dim=1)
        centers = torch.stack([sample[labels == label].mean(dim=0) for label in labels.unique()])
        return Advice(
            directions=directions.double().numpy(),
            anchors=self.center.numpy() + self.scale.item() * centers.double().numpy(),
        )


@kernel
def _move(points, moved, start, stop, center, scale, first, first_bias, second, second_bias, third, third_bias):
    """Rows start..stop of ``moved``: points plus displacement; weights as in torch but ``second`` transposed."""
    width = first.shape[0]
    features = np.empty(width, np.float32)
    hidden = np.empty(width, np.float32)
    for i in range(start, stop):
        x = np.float32((points[i, 0] - center[0]) / scale)
        y = np.float32((points[i, 1] - center[1]) / scale)
        for k in range(width):
            features[k] = max(first[k, 0] * x + first[k, 1] * y + first_bias[k], np.float32(0.0))
            hidden[k] = second_bias[k]
        for j in range(width):
            feature = features[j]
            if feature > 0.0:
                for k in range(width):
                    hidden[k] += feature * second[j, k]
        dx = third_bias[0]
        dy = third_bias[1]
        for k in range(width):
            value = max(hidden[k], np.float32(0.0))
            dx += third[0, k] * value
            dy += third[1, k] * value
        moved[i, 0] = points[i, 0] + scale * np.float64(dx)
        moved[i, 1] = points[i, 1] + scale * np.float64(dy)
