"""The methods that the geometry experiment compares on one point set, and how each answer is judged.

Per problem: the classical algorithm on the raw points (the baseline), on reordered points, exact rivals, jitter and
rounding of the coordinates (rewrites that nobody had to learn), our exact algorithm, and EntropyNet in its modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from entreg.experiments.geometry.errors import hull_error, pareto_error, triangulation_error
from entreg.experiments.geometry.speed.rivals import DELAUNAY_RIVALS, HULL_RIVALS, INPUT_ORDERS, PARETO_RIVALS
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.delaunay import delaunay
from entreg.geometry.entropy_net import Advice, EntropyNet
from entreg.geometry.pareto import pareto_front

REWRITE = "entropy_net_rewrite"
REWRITE_FREE = "entropy_net_rewrite_free"
ADVISE = "entropy_net_advise"
OURS = "entreg"
GRID_CELLS = 1024
JITTER = 1e-6


@dataclass(frozen=True)
class Answer:
    """Indices of hull vertices or maxima, or (m, 3) triangles; and the points they belong to if those were moved."""

    value: np.ndarray
    moved: np.ndarray | None = None


@dataclass(frozen=True)
class Method:
    """A method bound to its input.

    Attributes:
        kind: ``baseline``, ``reordered``, ``exact``, ``unlearned`` (a rewrite without a network), ``ours``,
            ``rewrite`` or ``advise``.
        run: everything that the method must pay for.
    """

    kind: str
    run: Callable[[], Answer]


@dataclass(frozen=True)
class Problem:
    """One geometric problem.

    Attributes:
        baseline: name of the classical algorithm, the denominator of the paper's speed-up.
        classical: that algorithm, (n, 2) points to an answer.
        exact_rivals: further methods with exact answers.
        ours: our exact algorithm.
        advised: our exact algorithm with advice.
        error: (points, exact answer, answer, moved points or None) to measures by name.
        can_round: whether rounding the coordinates leaves a meaningful question (it merges points, of which a
            triangulation must keep all).
    """

    baseline: str
    classical: Callable[[np.ndarray], np.ndarray]
    exact_rivals: dict[str, Callable[[np.ndarray], np.ndarray]]
    ours: Callable[[np.ndarray], np.ndarray]
    advised: Callable[[Advice, np.ndarray], np.ndarray]
    error: Callable[..., dict[str, float | bool]]
    can_round: bool


PROBLEMS: dict[str, Problem] = {
    "hull": Problem(
        baseline="qhull",
        classical=HULL_RIVALS["qhull"],
        exact_rivals={"plain_filter": HULL_RIVALS["plain_filter"]},
        ours=convex_hull,
        advised=lambda advice, points: advice.convex_hull(points),
        error=hull_error,
        can_round=True,
    ),
    "triangulation": Problem(
        baseline="qhull",
        classical=DELAUNAY_RIVALS["qhull"],
        exact_rivals={name: DELAUNAY_RIVALS[name] for name in ("shull", "triangle")},
        ours=lambda points: delaunay(points).simplices,
        advised=lambda advice, points: advice.delaunay(points),
        error=triangulation_error,
        can_round=False,
    ),
    "pareto_front": Problem(
        baseline="numpy_lexsort",
        classical=PARETO_RIVALS["numpy_lexsort"],
        exact_rivals={"plain_filter": PARETO_RIVALS["plain_filter"]},
        ours=pareto_front,
        advised=lambda advice, points: advice.pareto_front(points),
        error=pareto_error,
        can_round=True,
    ),
}
"""Problem by name."""


def build_methods(problem: Problem, net: EntropyNet, advice: Advice, points: np.ndarray) -> dict[str, Method]:
    """All methods of a problem, bound to a point set, by name; the baseline comes first.

    ``entropy_net_rewrite`` pays for the network; ``entropy_net_rewrite_free`` gets the moved points as a gift, which
    is how the paper's numbers can be read. Training is in neither: it is paid once for all point sets of a kind and
    recorded beside.
    """
    moved = net.rewrite(points)

    def reordered(order: Callable[[np.ndarray], np.ndarray]) -> Answer:
        indices = order(points)
        return Answer(indices[problem.classical(points[indices])])

    def on_moved(move: Callable[[np.ndarray], np.ndarray]) -> Answer:
        replaced = move(points)
        return Answer(problem.classical(replaced), replaced)

    methods = {
        problem.baseline: Method("baseline", lambda: Answer(problem.classical(points))),
        **{
            f"{problem.baseline}_{name}": Method("reordered", lambda order=order: reordered(order))
            for name, order in INPUT_ORDERS.items()
        },
        **{
            name: Method("exact", lambda rival=rival: Answer(rival(points)))
            for name, rival in problem.exact_rivals.items()
        },
    }
    methods["jitter"] = Method("unlearned", lambda: on_moved(jitter))
    if problem.can_round:
        methods["rounding_float32"] = Method("unlearned", lambda: on_moved(round_to_float32))
        methods["rounding_grid"] = Method("unlearned", lambda: on_moved(round_to_grid))
    methods[OURS] = Method("ours", lambda: Answer(problem.ours(points)))
    methods[REWRITE] = Method("rewrite", lambda: on_moved(net.rewrite))
    methods[REWRITE_FREE] = Method("rewrite", lambda: Answer(problem.classical(moved), moved))
    methods[ADVISE] = Method("advise", lambda: Answer(problem.advised(advice, points)))
    return methods


def jitter(points: np.ndarray) -> np.ndarray:
    """(n, 2) points moved by uniform noise of at most a millionth of the longer side of their box."""
    reach = JITTER * float(np.ptp(points, axis=0).max())
    return points + np.random.default_rng(0).uniform(-reach, reach, points.shape)


def round_to_float32(points: np.ndarray) -> np.ndarray:
    """(n, 2) float64 points rounded to float32 and widened again."""
    return points.astype(np.float32).astype(np.float64)


def round_to_grid(points: np.ndarray) -> np.ndarray:
    """(n, 2) points moved to the nearest corner of a grid of 1,024 cells along the longer side of their box."""
    low = points.min(axis=0)
    step = float((points.max(axis=0) - low).max()) / GRID_CELLS
    return low + np.rint((points - low) / step) * step
