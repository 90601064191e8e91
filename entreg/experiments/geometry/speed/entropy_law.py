"""The law: the convex hull's time is linear in n (1 + H), H the range-partition entropy of the input list.

Three families of inputs sweep H from 0 to log n, each by another kind of structure: presorted order (k sorted runs of
points in convex position), interior points (a shrinking share of points on the hull) and locality (k clusters in
convex position). For each input the entropy is bounded from above by a partition that can be checked, the hull is
timed on one thread, and a line is fitted to time against n (1 + H).

The law is about algorithms that compare. Ours may fall below its line where distributing points into buckets beats
comparing them, so a textbook algorithm that does nothing but compare is timed beside it: Timsort and monotone chain
for sorted runs, quickhull for interior points and clusters.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entreg.atomic import require_writable
from entreg.entropy import hull_entropy
from entreg.errors import ConfigError
from entreg.experiments.geometry.speed.certificates import vertex_set_difference
from entreg.experiments.geometry.speed.rivals import COMPARISON_HULLS
from entreg.experiments.timing import Timing, interleaved_timings
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.generators import generate
from entreg.names import require_known
from entreg.progress import progress
from entreg.records.record import new_record
from entreg.records.statistics import linear_fit
from entreg.records.store import RecordStore


def convex_clusters(n: int, seed: int, clusters: int) -> np.ndarray:
    """``n`` points in ``clusters`` small disks around equally spaced points of the unit circle, in random order.

    The disks are so small that every cluster has points on the hull and that, but for its outer edge, a cluster fits
    into a triangle inside the hull: the entropy is near log(clusters).

    Returns:
        ``(n, 2)`` float64.
    """
    rng = np.random.default_rng(seed)
    spacing = 2.0 * np.pi / clusters
    # A tenth of the arc's height above the chord to the neighbours keeps the disks in convex position.
    radius = 0.1 * (1.0 - np.cos(min(spacing, np.pi / 2.0)))
    angle = spacing * rng.permutation(np.arange(n) % clusters)
    offset = radius * generate("disk", n, seed)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) + offset


@dataclass(frozen=True)
class LawFamily:
    """Inputs of one kind.

    Attributes:
        parameter: what ``value`` means, for tables.
        values: ``values(n, levels)``: the swept values, from low to high entropy.
        points: ``points(n, seed, value)``: ``(n, 2)`` float64.
        comparison: the textbook algorithm, a key of :data:`entreg.experiments.geometry.speed.rivals.COMPARISON_HULLS`.
        entropy: ``entropy(n, value)``: entropy in nats of the partition that the construction itself gives, or None
            when it gives none in closed form.
    """

    parameter: str
    values: Callable[[int, int], list[float]]
    points: Callable[[int, int, float], np.ndarray]
    comparison: str
    entropy: Callable[[int, float], float | None]


def _counts(n: int, levels: int) -> list[float]:
    return sorted({round(n ** (level / (levels - 1))) for level in range(levels)})


def _shares(n: int, levels: int) -> list[float]:
    return [level / (levels - 1) for level in range(levels)]


def _runs_entropy(n: int, runs: float) -> float:
    bounds = np.linspace(0, n, int(runs) + 1).astype(np.int64)
    return sum((b - a) / n * math.log(n / (b - a)) for a, b in itertools.pairwise(bounds.tolist()) if b > a)


def _hull_fraction_entropy(n: int, fraction: float) -> float:
    # Every point on the circle is a part of its own; the disk of half the radius is one part, since it is the
    # inscribed circle of a triangle in the unit circle.
    outer = min(n, max(3, round(fraction * n)))
    inner = n - outer
    return outer / n * math.log(n) + (inner / n * math.log(n / inner) if inner else 0.0)


LAW_FAMILIES: dict[str, LawFamily] = {
    "sorted_runs": LawFamily(
        parameter="sorted runs",
        values=_counts,
        points=lambda n, seed, value: generate("sorted_runs", n, seed, runs=int(value)),
        comparison="timsort_chain",
        entropy=_runs_entropy,
    ),
    "hull_fraction": LawFamily(
        parameter="share of points on the hull",
        values=_shares,
        points=lambda n, seed, value: generate("hull_fraction", n, seed, fraction=value),
        comparison="quickhull",
        entropy=_hull_fraction_entropy,
    ),
    "clusters": LawFamily(
        parameter="clusters in convex position",
        values=_counts,
        points=lambda n, seed, value: convex_clusters(n, seed, int(value)),
        comparison="quickhull",
        entropy=lambda n, value: None,
    ),
}
"""Name to family of inputs."""


def _measure(points: np.ndarray, comparison: str, repeats: int) -> dict[str, Timing]:
    methods: dict[str, Callable[[], object]] = {
        "entreg": lambda: convex_hull(points, threads=1),
        comparison: lambda: COMPARISON_HULLS[comparison](points),
    }
    return interleaved_timings(methods, repeats=repeats)


def law_rows(family: str, sizes: Sequence[int], levels: int, seed: int, repeats: int) -> list[dict[str, object]]:
    """Entropy bounds and times over one family.

    Returns:
        One row per size, level and method: ``family, n, method, parameter, value, entropy`` (the smaller of the two
        upper bounds, in nats), ``entropy_upper`` and ``entropy_lower`` (of :func:`entreg.entropy.hull_entropy`),
        ``entropy_family`` (of the construction, or None), ``work`` = n (1 + entropy), ``hull_vertices``,
        ``seconds_median``, ``seconds_min``, ``seconds_max``, ``repeats``, ``threads``.

    Raises:
        RuntimeError: the two methods disagree about a hull.
    """
    rows = []
    law = LAW_FAMILIES[family]
    inputs = [(n, value) for n in sizes for value in law.values(n, levels)]
    for n, value in progress(inputs, family):
        points = law.points(n, seed, value)
        bounds = hull_entropy(points)
        from_construction = law.entropy(n, value)
        candidates = [bounds.upper] if from_construction is None else [bounds.upper, from_construction]
        vertices = convex_hull(points, threads=1)
        other = COMPARISON_HULLS[law.comparison](points)
        if vertex_set_difference(points[vertices], points[other]) != (0, 0):
            raise RuntimeError(f"entreg and {law.comparison} disagree on {family}, n = {n}, {value}")
        for method, timing in _measure(points, law.comparison, repeats).items():
            rows.append(
                {
                    "family": family,
                    "n": n,
                    "method": method,
                    "parameter": law.parameter,
                    "value": value,
                    "entropy": min(candidates),
                    "entropy_upper": bounds.upper,
                    "entropy_lower": bounds.lower,
                    "entropy_family": from_construction,
                    "work": n * (1.0 + min(candidates)),
                    "hull_vertices": len(vertices),
                    "seconds_median": timing.median,
                    "seconds_min": timing.minimum,
                    "seconds_max": timing.maximum,
                    "repeats": repeats,
                    "threads": 1,
                }
            )
    return rows


def fit_law(rows: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Least-squares line of seconds against n (1 + H), and what n log n alone would explain.

    Args:
        rows: as from :func:`law_rows`, of one method, and of one family or several.

    Returns:
        ``nanoseconds_per_unit`` (slope), ``intercept_seconds``, ``r_squared``, ``r_squared_n_log_n`` (the same fit
        against n log n, which knows nothing of the entropy; None when all sizes are equal),
        ``nanoseconds_per_unit_least`` and ``_most`` (the range of time over n (1 + H): a bounded range is what
        O(n (1 + H)) says, whether or not the line fits), ``count``.
    """
    seconds = [row["seconds_median"] for row in rows]
    fit = linear_fit([row["work"] for row in rows], seconds)
    sizes = [row["n"] for row in rows]
    blind = linear_fit([n * math.log(n) for n in sizes], seconds).r_squared if len(set(sizes)) > 1 else None
    return {
        "nanoseconds_per_unit": 1e9 * fit.slope,
        "intercept_seconds": fit.intercept,
        "r_squared": fit.r_squared,
        "r_squared_n_log_n": blind,
        "nanoseconds_per_unit_least": 1e9 * min(row["seconds_median"] / row["work"] for row in rows),
        "nanoseconds_per_unit_most": 1e9 * max(row["seconds_median"] / row["work"] for row in rows),
        "count": fit.count,
    }


def run_entropy_law(
    *,
    families: Sequence[str],
    sizes: Sequence[int],
    levels: int,
    profile: Mapping[str, object],
    store: str | Path,
    command: str,
    force: bool = False,
) -> list[Path]:
    """Sweep the entropy in every family and save one record per family.

    Its metrics are the fits over all sizes and at each size alone, where n itself explains nothing.

    Args:
        families: keys of :data:`LAW_FAMILIES`.
        sizes: numbers of points; those above the profile's ``geometry.max_points`` are left out.
        levels: inputs per family and size, at least 3.
        profile: the configuration group ``profile`` (``name``, ``geometry.max_points``, ``repeats``, ``seeds``).
        store: folder of the records.
        command: what to type to repeat the run.
        force: run again what has a record already.

    Returns:
        The records' files, in the order of ``families``.

    Raises:
        ConfigError: unknown family, fewer than three levels, or no size within the profile's limit.
    """
    require_known(families, LAW_FAMILIES, "family")
    most = profile["geometry"]["max_points"]
    sizes = sorted(n for n in sizes if n <= most)
    if levels < 3 or not sizes or sizes[0] < 10:
        raise ConfigError(f"levels must be at least 3, and sizes need a value from 10 to max_points = {most}")
    require_writable(store)
    records = RecordStore(store)
    seed, repeats = profile["seeds"][0], profile["repeats"]
    paths = []
    for family in progress(families, "entropy law"):
        config = {
            "family": family,
            "sizes": sizes,
            "levels": levels,
            "repeats": repeats,
            "seed": seed,
            "profile": profile["name"],
        }
        experiment = f"benchmark/entropy_law/{family}"
        if not force and records.find(experiment, config) is not None:
            paths.append(records.path_for(experiment, config))
            continue
        start = time.perf_counter()
        rows = law_rows(family, sizes, levels, seed, repeats)
        record = new_record(
            experiment=experiment,
            scale=profile["name"],
            config=config,
            command=command,
            dataset={"name": family, "sizes": sizes, "seed": seed},
            seed=seed,
            repeats=repeats,
            metrics={method: _fits(rows, method, sizes) for method in ("entreg", LAW_FAMILIES[family].comparison)},
            rows=rows,
            wall_seconds=time.perf_counter() - start,
        )
        paths.append(records.save(record))
    return paths


def _fits(rows: Sequence[Mapping[str, object]], method: str, sizes: Sequence[int]) -> dict[str, object]:
    own = [row for row in rows if row["method"] == method]
    by_size = {f"n = {n}": fit_law([row for row in own if row["n"] == n]) for n in sizes}
    return {"all_sizes": fit_law(own), **by_size}
