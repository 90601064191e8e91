"""Reading the records of the geometry experiment: rows by data set, size and method, averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entreg.experiments.geometry.speed.tables import method_label
from entreg.records.formatting import number
from entreg.records.statistics import DifferenceTest, Estimate, geometric_mean_ratio, mean_and_interval, paired_test

Row = Mapping[str, Any]
Cell = tuple[str, int, str]

REWRITE = "entropy_net_rewrite"
REWRITE_FREE = "entropy_net_rewrite_free"
ADVISE = "entropy_net_advise"
OURS = "entreg"

EXPERIMENTS = ("geometry/hull", "geometry/triangulation", "geometry/pareto_front")
BASELINES = {
    "geometry/hull": "Qhull",
    "geometry/triangulation": "Qhull",
    "geometry/pareto_front": "numpy lexsort",
}

COCIRCULAR = ("circle", "circle_ordered", "sorted_runs")
"""Data sets on one circle. Qhull's Delaunay triangulation takes quadratic time on them, and any perturbation of the
points, learned or not, removes that. They are shown, but kept out of the means and claims about triangulation."""

_LABELS = {
    REWRITE: "entropy net, rewrite",
    REWRITE_FREE: "entropy net, rewrite, its own time not counted",
    ADVISE: "entropy net, advise",
    "rounding_float32": "rounding to float32",
    "jitter": "jitter of a millionth",
    "rounding_grid": "rounding to a grid of 1,024 cells",
    OURS: "entreg, exact",
}


def label(method: str) -> str:
    """What tables and legends call a method of the experiment."""
    return _LABELS.get(method) or method_label(method)


class Study:
    """The rows of one problem's records.

    Of several records for one data set, seed and size the newest counts.

    Args:
        records: run records of one of :data:`EXPERIMENTS`, of the default variant; rows that are no measurement of
            a method are left out.

    Attributes:
        experiment: the records' experiment, empty without records.
        distributions: names of the data sets, sorted.
        sizes: numbers of points, increasing.
        methods: names in the order of the records.
        left_out: the data sets that do not count in means, see :data:`COCIRCULAR`.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._cells: dict[Cell, dict[int, Row]] = {}
        self._sources: dict[Cell, dict[int, str]] = {}
        self.methods: list[str] = []
        for record in sorted(records, key=lambda r: (r["utc"], r["id"])):
            for row in record["rows"]:
                if "method" not in row or "status" not in row:
                    continue
                key = (row["distribution"], row["n"], row["method"])
                self._cells.setdefault(key, {})[record["seed"]] = row
                self._sources.setdefault(key, {})[record["seed"]] = record["id"]
                if row["method"] not in self.methods:
                    self.methods.append(row["method"])
        self.distributions = sorted({key[0] for key in self._cells})
        self.sizes = sorted({key[1] for key in self._cells})
        self.experiment = records[0]["experiment"] if records else ""
        triangulation = self.experiment == "geometry/triangulation"
        self.left_out = [name for name in self.distributions if triangulation and name in COCIRCULAR]

    def rows(self, distribution: str, n: int, method: str) -> dict[int, Row]:
        """Measured rows by seed; empty when the method was not run or failed."""
        cell = self._cells.get((distribution, n, method), {})
        return {seed: row for seed, row in sorted(cell.items()) if row["status"] == "measured"}

    def status(self, distribution: str, n: int, method: str) -> str | None:
        """Why a method has no numbers for some seed, or None when it has all of them or was not run."""
        cell = self._cells.get((distribution, n, method), {})
        return next((row["status"] for _, row in sorted(cell.items()) if row["status"] != "measured"), None)

    def values(self, distribution: str, n: int, method: str, field: str) -> list[float]:
        """One field over the seeds; rows that lack it are left out."""
        rows = self.rows(distribution, n, method).values()
        return [float(row[field]) for row in rows if row.get(field) is not None]

    def ids_of(self, distribution: str | None = None) -> list[str]:
        """Identifiers of the records whose rows count, of one data set or of all."""
        chosen = (s for key, s in self._sources.items() if distribution in (None, key[0]))
        return sorted({identifier for by_seed in chosen for identifier in by_seed.values()})

    def size_of(self, distribution: str) -> int:
        """The largest size at which a data set was run."""
        return max(key[1] for key in self._cells if key[0] == distribution)

    def size_text(self) -> str:
        """The sizes behind :meth:`mean_speedup` and :meth:`by_distribution`: ``n = 1,000,000``, exceptions named."""
        sizes = {name: self.size_of(name) for name in self.distributions}
        usual = max(sizes.values(), key=lambda n: (list(sizes.values()).count(n), n))
        others = [f"{name} {number(n)}" for name, n in sizes.items() if n != usual]
        return f"n = {number(usual)}" + (f" ({', '.join(others)})" if others else "")

    def speedup(self, distribution: str, n: int, method: str) -> Estimate | None:
        """Speed-up over the baseline: geometric mean over seeds with its interval."""
        return _geometric_mean(self.values(distribution, n, method, "speedup"))

    def failed(self, method: str) -> list[str]:
        """The data sets on which a method that was run at the largest size has no result for some seed."""
        return [name for name in self.distributions if self.status(name, self.size_of(name), method) is not None]

    def mean_speedup(self, method: str, without: Sequence[str] = ()) -> Estimate | None:
        """Geometric mean over the data sets, each at its largest size, per seed; then over seeds with its interval.

        Data sets in ``left_out`` and ``without`` do not count. None when the method lacks another one, since the means
        would not compare.
        """
        return _geometric_mean(list(self.mean_speedups(method, without).values()))

    def mean_speedups(self, method: str, without: Sequence[str] = ()) -> dict[int, float]:
        """Seed to geometric mean over the data sets, of the seeds that have all of them; see :meth:`mean_speedup`."""
        by_seed: dict[int, list[float]] = {}
        names = [name for name in self.distributions if name not in without and name not in self.left_out]
        for name in names:
            for seed, row in self.rows(name, self.size_of(name), method).items():
                by_seed.setdefault(seed, []).append(math.log(row["speedup"]))
        count = len(names)
        return {seed: math.exp(sum(logs) / count) for seed, logs in by_seed.items() if len(logs) == count}

    def rewrite_over(self, method: str) -> DifferenceTest | None:
        """Logarithm of the rewriting's mean speed-up over a method's, tested in pairs over shared training seeds."""
        own, other = self.mean_speedups(REWRITE), self.mean_speedups(method)
        seeds = [seed for seed in own if seed in other]
        if not seeds:
            return None
        return paired_test([math.log(own[seed]) for seed in seeds], [math.log(other[seed]) for seed in seeds])

    def by_distribution(self, method: str, field: str) -> dict[str, float]:
        """Mean over seeds of a field, by data set at its largest size; geometric for speed-ups."""
        means = {}
        for name in self.distributions:
            values = self.values(name, self.size_of(name), method, field)
            if values:
                estimate = _geometric_mean(values) if field == "speedup" else mean_and_interval(values)
                means[name] = estimate.mean
        return means


def extreme(values: Mapping[str, float], choose: Callable[..., str] = max) -> tuple[str, float] | None:
    """Name and value of the largest (or, with ``min``, smallest) entry; None when there is none."""
    if not values:
        return None
    name = choose(values, key=values.__getitem__)
    return name, values[name]


def _geometric_mean(values: Sequence[float]) -> Estimate | None:
    return geometric_mean_ratio(values, [1.0] * len(values)) if values else None
