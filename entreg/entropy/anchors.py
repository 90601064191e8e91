"""Starting values of the surrogates' parameters, taken from data and reproducible by seed."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.names import require_choice

ANCHOR_METHODS = ("kmeans++", "farthest", "random")
HALFSPACE_METHODS = ("principal", "random")


def choose_anchors(points: Tensor, count: int, method: str, seed: int) -> Tensor:
    """Choose ``count`` of the points as anchors.

    The choice is made in float64 on the CPU, so that it does not depend on the device.

    Args:
        points: (n, d) finite.
        count: number of anchors, 1 to n.
        method: ``"kmeans++"``, ``"farthest"`` or ``"random"`` (without replacement; equal points may be chosen).
        seed: of the random choices. ``"farthest"`` draws its first point only.

    Returns:
        (count, d) float64 on the CPU.

    Raises:
        InputError: non-finite points, unknown method, fewer than ``count`` points, or (except for ``"random"``)
            fewer distinct points.
    """
    data = _finite_float64(points)
    require_choice("method", method, ANCHOR_METHODS, InputError)
    if len(data) < count:
        raise InputError(f"{count} anchors need at least {count} points, got {len(data)}")
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return data[torch.randperm(len(data), generator=generator)[:count]]
    chosen = [data[int(torch.randint(len(data), (), generator=generator))]]
    nearest = (data - chosen[0]).square().sum(-1)
    while len(chosen) < count:
        farthest = int(nearest.argmax())
        if nearest[farthest] == 0:
            raise InputError(
                f"{count} anchors need at least {count} distinct points, got {len(chosen)}; use fewer anchors"
            )
        if method == "farthest":
            index = farthest
        else:
            index = _draw_proportional(nearest, generator)
        chosen.append(data[index])
        nearest = torch.minimum(nearest, (data - chosen[-1]).square().sum(-1))
    return torch.stack(chosen)


def _draw_proportional(weights: Tensor, generator: torch.Generator) -> int:
    # torch.multinomial stops at 2^24 categories; the inverse of the cumulative sum does not. A weight of zero is
    # never drawn: `right=True` skips the flat parts of the sum.
    cumulative = weights.cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, draw, right=True))
    return min(index, int(torch.nonzero(weights)[-1]))


def choose_halfspaces(points: Tensor, count: int, method: str, seed: int) -> tuple[Tensor, Tensor]:
    """Choose unit normals and offsets that cut the data evenly (our choice; the paper does not say).

    Args:
        points: (n, d) finite, n at least 1.
        count: number of halfspaces, at least 1.
        method: ``"principal"``: normals are the principal directions of the data in turn; a direction used r times is
            cut at its r quantiles 1/(r+1), ..., r/(r+1), a grid with evenly filled slabs. ``"random"``: normals
            uniform on the sphere, cut at the median.
        seed: of the random choices.

    Returns:
        normals (count, d) and offsets (count,), float64 on the CPU; halfspace t is w_t . x >= b_t.

    Raises:
        InputError: non-finite points or unknown method.
    """
    data = _finite_float64(points)
    require_choice("method", method, HALFSPACE_METHODS, InputError)
    dim = data.shape[1]
    index = torch.arange(count)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        normals = torch.nn.functional.normalize(
            torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=-1
        )
        level = torch.full((count,), 0.5, dtype=torch.float64)
    else:
        centered = data - data.mean(0)
        # eigh orders by increasing variance; the sign is fixed so that the result does not depend on the library.
        directions = torch.linalg.eigh(centered.t() @ centered).eigenvectors.t().flip(0)
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        normals = directions[index % dim]
        uses = (count - 1 - index % dim) // dim + 1
        level = (index // dim + 1).double() / (uses + 1)
    projected = (data @ normals.t()).sort(0).values
    position = level * (len(data) - 1)
    lower = position.floor().long()
    upper = position.ceil().long()
    offsets = torch.lerp(projected[lower, index], projected[upper, index], position - lower)
    return normals, offsets


def _finite_float64(points: Tensor) -> Tensor:
    data = points.detach().to("cpu", torch.float64)
    if not torch.isfinite(data).all():
        raise InputError("points must be finite, got NaN or infinity")
    return data
