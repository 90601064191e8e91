"""Calls every kernel of hull, front and triangulation once, see :mod:`entreg.warm_up`."""

import numpy as np

from entreg.geometry._hull_paths import ALL, hull_by_filter, hull_by_runs, hull_by_slabs
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.delaunay import delaunay
from entreg.geometry.pareto import front_by_filter, pareto_front
from entreg.geometry.predicates import compile_exact_stages
from entreg.geometry.validation import require_finite


def warm_up() -> None:
    """Compile the kernels that serve inputs of any size, or load them from the cache."""
    compile_exact_stages()
    points = np.random.default_rng(0).normal(size=(20_000, 2))
    few, some = points[:40], points[:1_000]
    require_finite(few)
    for given in (few, some):
        convex_hull(given)
        pareto_front(given)
    # Twenty of each point: the triangulation's kernels for points that share a key are among those called.
    delaunay(np.repeat(some, 20, axis=0))
    delaunay(np.repeat(some, 2, axis=0))
    # The paths of large inputs, on few points.
    hull_by_filter(some, 1, 100, 32, 1.0, 1, 1)
    hull_by_runs(some[np.argsort(some[:, 0])], 1, 2, 16)
    hull_by_slabs(some, 1, ALL, 2, 4)
    front_by_filter(some, 1, 100, 32, 1.0, 1)
    front_by_filter(some, 1, 100, 32, 0.0, 2)
