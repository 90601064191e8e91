"""Calls every kernel of the entropies once, see :mod:`entreg.warm_up`."""

import numpy as np

from entreg.entropy.hull_bounds import hull_entropy
from entreg.entropy.runs import run_entropy


def warm_up() -> None:
    """Compile the kernels of the exact entropies, or load them from the cache."""
    points = np.random.default_rng(0).normal(size=(1_000, 2))
    run_entropy(points[:, 0].copy())
    hull_entropy(points)
