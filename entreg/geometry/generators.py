"""Synthetic planar point sets whose range-partition entropy ranges from 0 to log n.

All generators return ``(n, 2)`` float64, are reproducible from ``(distribution, n, seed, parameters)``, and come
in random order unless the name says otherwise. Which of them the paper used is not stated; the choice is ours
and follows the habit of convex-hull benchmarks: favourable cases (most points deep inside the hull: square,
Gaussian), in-between cases (disk, clusters) and the worst case (every point on the hull: circle, parabola).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from entreg.errors import InputError
from entreg.names import require_known


def _square(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((n, 2))


def _disk(n: int, rng: np.random.Generator) -> np.ndarray:
    angle = rng.random(n) * (2.0 * np.pi)
    radius = np.sqrt(rng.random(n))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _gaussian(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n, 2))


def _on_circle(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _circle(n: int, rng: np.random.Generator) -> np.ndarray:
    return _on_circle(rng.random(n) * (2.0 * np.pi))


def _circle_ordered(n: int, rng: np.random.Generator) -> np.ndarray:
    return _on_circle(np.sort(rng.random(n)) * (2.0 * np.pi))


def _parabola(n: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.random(n) * 2.0 - 1.0
    return np.stack([x, x * x], axis=1)


def _clusters(n: int, rng: np.random.Generator, *, clusters: int = 32, spread: float = 0.01) -> np.ndarray:
    if clusters < 1:
        raise InputError(f"clusters must be at least 1, got {clusters}")
    if not spread >= 0.0:
        raise InputError(f"spread must be at least 0 (in units of the unit square), got {spread}")
    centers = rng.random((clusters, 2))
    return centers[rng.integers(clusters, size=n)] + spread * rng.standard_normal((n, 2))


def _sorted_runs(n: int, rng: np.random.Generator, *, runs: int = 16) -> np.ndarray:
    """Points of a circle's upper arc in ``runs`` consecutive pieces, each sorted by x: run entropy log(runs)."""
    if not 1 <= runs <= max(n, 1):
        raise InputError(f"runs must lie between 1 and n = {n}, got {runs}")
    angle = rng.random(n) * np.pi
    bounds = np.linspace(0, n, runs + 1).astype(np.int64)
    for start, stop in itertools.pairwise(bounds):
        angle[start:stop] = -np.sort(-angle[start:stop])
    return _on_circle(angle)


def _hull_fraction(n: int, rng: np.random.Generator, *, fraction: float = 0.1) -> np.ndarray:
    """A share ``fraction`` of the points on the unit circle, the others in a disk well inside it."""
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"fraction must lie between 0 and 1, got {fraction}")
    # At least three points on the circle, so that the interior ones are interior to something.
    on_circle = min(n, max(3, round(fraction * n)))
    points = np.concatenate([_circle(on_circle, rng), 0.5 * _disk(n - on_circle, rng)])
    return points[rng.permutation(n)]


DISTRIBUTIONS: dict[str, Callable[..., np.ndarray]] = {
    "square": _square,
    "disk": _disk,
    "gaussian": _gaussian,
    "circle": _circle,
    "circle_ordered": _circle_ordered,
    "parabola": _parabola,
    "clusters": _clusters,
    "sorted_runs": _sorted_runs,
    "hull_fraction": _hull_fraction,
}
"""Name to generator. ``circle_ordered`` lists the circle's points by angle."""


def generate(distribution: str, n: int, seed: int, **parameters: float) -> np.ndarray:
    """Draw ``n`` points of a named distribution.

    Args:
        distribution: a key of :data:`DISTRIBUTIONS`.
        n: number of points, at least 1.
        seed: non-negative seed; equal arguments give equal bytes on one numpy version.
        **parameters: ``clusters`` and ``spread`` for ``clusters``, ``runs`` for ``sorted_runs``, ``fraction``
            for ``hull_fraction``.

    Returns:
        ``(n, 2)`` float64, C-contiguous.

    Raises:
        InputError: unknown distribution or parameter, or a value out of range.
    """
    require_known([distribution], sorted(DISTRIBUTIONS), "distribution", error=InputError)
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    generator = DISTRIBUTIONS[distribution]
    known = generator.__kwdefaults__ or {}
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise InputError(
            f"distribution '{distribution}' has no parameter {', '.join(unknown)}; "
            f"it takes {', '.join(sorted(known)) or 'none'}"
        )
    return np.ascontiguousarray(generator(n, np.random.default_rng(seed), **parameters))
