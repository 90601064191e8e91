"""Training of EntropyNet: an entropy surrogate that pulls points together, a Chamfer term that holds them back.

loss = entropy_weight * surrogate(moved) / log(cells) + Chamfer(moved, original), on random subsets of the data, in
coordinates whose unit is half the extent of the data (paper, "EntropyNet"; subset size, optimiser, number of steps
and the division by log(cells), which makes weights comparable across numbers of cells, are our choice).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entreg.entropy.anchors import ANCHOR_METHODS, HALFSPACE_METHODS
from entreg.entropy.ball import BallEntropy
from entreg.entropy.halfspace import HalfspaceEntropy
from entreg.errors import InputError
from entreg.geometry.entropy_net import EntropyNet
from entreg.names import require_choice

SURROGATES = ("ball", "halfspace")


@dataclass(frozen=True)
class EntropyNetSettings:
    """Everything that decides a training run besides data and seed.

    Attributes:
        surrogate: ``ball`` or ``halfspace``.
        num_cells: anchors of the ball surrogate, at least 2; the halfspace surrogate gets the nearest power of two,
            as log2 of it halfspaces.
        sharpness: of the surrogate, in units of the data's own scale; positive.
        initialization: how anchors or halfspaces are placed, see ``initialize_from`` of the surrogates.
        entropy_weight: lambda, at least 0.
        hidden: width of the network.
        subset_size: points per training step, at least 2.
        steps: training steps, at least 1.
        learning_rate: of Adam, decaying to 0 along a half cosine; positive.
    """

    surrogate: str = "ball"
    num_cells: int = 16
    sharpness: float = 10.0
    initialization: str = "kmeans++"
    entropy_weight: float = 0.01
    hidden: int = 32
    subset_size: int = 512
    steps: int = 300
    learning_rate: float = 0.003

    def __post_init__(self) -> None:
        require_choice("surrogate", self.surrogate, SURROGATES, InputError)
        methods = ANCHOR_METHODS if self.surrogate == "ball" else HALFSPACE_METHODS
        require_choice(f"initialization of {self.surrogate}", self.initialization, methods, InputError)
        if self.num_cells < 2 or self.subset_size < 2 or self.steps < 1 or self.hidden < 1:
            raise InputError("num_cells and subset_size must be at least 2, steps and hidden at least 1")
        if not (self.learning_rate > 0 and self.entropy_weight >= 0 and self.sharpness > 0):
            raise InputError("learning_rate and sharpness must be positive and entropy_weight at least 0")


@dataclass(frozen=True)
class TrainedEntropyNet:
    """A trained network and what its training cost.

    Attributes:
        net: in evaluation mode.
        seconds: wall-clock seconds of the training steps.
        entropy: last value of the surrogate, nats.
        chamfer: last value of the Chamfer term, in squared normalised units.
    """

    net: EntropyNet
    seconds: float
    entropy: float
    chamfer: float


def chamfer_distance(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric Chamfer distance: mean squared distance to the nearest point of the other set, both ways added.

    Exact, by all distances.

    Args:
        first: (..., n, d).
        second: (..., m, d).

    Returns:
        (...), at least 0.
    """
    with torch.no_grad():
        distances = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
        to_second, to_first = distances.argmin(-1), distances.argmin(-2)
    # The gradient flows through the nearest pairs only, so only they are recomputed with it.
    return _mean_squared_step(first, second, to_second) + _mean_squared_step(second, first, to_first)


def _mean_squared_step(points: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    indices = chosen.unsqueeze(-1).expand(*chosen.shape, points.shape[-1])
    return (points - others.gather(-2, indices)).square().sum(-1).mean(-1)


def train_entropy_net(points: np.ndarray, settings: EntropyNetSettings, seed: int) -> TrainedEntropyNet:
    """Train a network on subsets of a point set.

    Args:
        points: (n, 2) finite float64 points, not all equal.
        settings: of network, surrogate and optimiser.
        seed: of weights, placement and subsets; equal arguments give equal weights on one machine.

    Returns:
        The trained network and the cost of its training.

    Raises:
        InputError: points all equal or too few distinct ones for the anchors, or the training diverged.
    """
    rng = np.random.default_rng(seed)
    # The caller's own random state is left alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        surrogate = _new_surrogate(settings)
        net = EntropyNet(surrogate, hidden=settings.hidden)
    net.fit_normalisation(points)
    surrogate.initialize_from(_subset(net, points, 8 * settings.subset_size, rng), settings.initialization, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    weight = settings.entropy_weight / math.log(surrogate.num_cells)
    start = time.perf_counter()
    for _ in range(settings.steps):
        original = _subset(net, points, settings.subset_size, rng)
        moved = net(original)
        entropy, chamfer = surrogate(moved), chamfer_distance(moved, original)
        loss = weight * entropy + chamfer
        if not torch.isfinite(loss):
            raise InputError(
                "the training of EntropyNet diverged; a smaller learning_rate or entropy_weight would be right"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    return TrainedEntropyNet(net.eval(), seconds, entropy.item(), chamfer.item())


def _new_surrogate(settings: EntropyNetSettings) -> BallEntropy | HalfspaceEntropy:
    if settings.surrogate == "ball":
        return BallEntropy(settings.num_cells, 2, sharpness=settings.sharpness)
    return HalfspaceEntropy(round(math.log2(settings.num_cells)), 2, sharpness=settings.sharpness)


def _subset(net: EntropyNet, points: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """Normalised random subset (min(size, n), 2) without replacement."""
    return net.normalise(points[rng.choice(len(points), size=min(size, len(points)), replace=False)])
