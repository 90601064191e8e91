"""Speed of the geometry package against its rivals: convex hull, Pareto front and Delaunay triangulation.

Every result is checked before anything is timed: ours by an exact certificate, the rivals' against ours. All methods
then take turns in one process (:mod:`entreg.experiments.timing`). A method that would need more than its time budget
is run fewer times, or not at all, and its row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from entreg.atomic import require_writable
from entreg.data.points import POINT_SETS, describe_points, load_points
from entreg.errors import ConfigError
from entreg.experiments.geometry.speed.certificates import (
    canonical_indices,
    delaunay_defect,
    edge_keys,
    hull_defect,
    triangle_neighbors,
    triangle_set_fingerprint,
    vertex_set_difference,
)
from entreg.experiments.geometry.speed.rivals import (
    DELAUNAY_RIVALS,
    HULL_RIVALS,
    LIBRARY_DELAUNAY_RIVALS,
    LIBRARY_HULL_RIVALS,
    PARETO_RIVALS,
    Rival,
    as_float32,
    eight_extremes,
    geos_geometry,
    hilbert_order,
    hull_vertices,
)
from entreg.experiments.timing import interleaved_timings
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.delaunay import Triangulation, delaunay
from entreg.geometry.generators import generate
from entreg.geometry.pareto import pareto_front
from entreg.names import require_known, require_some
from entreg.parallel import chunk_ranges, default_threads, run_chunks
from entreg.progress import progress
from entreg.records.record import new_record
from entreg.records.store import RecordStore

MEASURED = "measured"
NOT_RUN = "over the time budget, not run"

_CLUSTERS = 32
_FEWEST_ROUNDS = 3
_SIDE_LINE_SHARE = 0.05


# --- point sets ----------------------------------------------------------------------------------------------------


def _square_hilbert(n: int, seed: int) -> np.ndarray:
    points = generate("square", n, seed)
    return points[hilbert_order(points)]


def _square_scan_lines(n: int, seed: int) -> np.ndarray:
    """The unit square as a scanner lists it: about sqrt(n) horizontal lines, each from left to right."""
    points = generate("square", n, seed)
    line = np.floor(points[:, 1] * np.sqrt(n))
    return points[np.lexsort((points[:, 0], line))]


def _clusters_ordered(n: int, seed: int) -> np.ndarray:
    """Clusters listed one after the other, each in random order inside."""
    parts = [
        generate("clusters", stop - start, seed * _CLUSTERS + part, clusters=1)
        for part, (start, stop) in enumerate(chunk_ranges(n, _CLUSTERS))
    ]
    return np.concatenate(parts)


COHERENT_POINT_SETS: dict[str, Callable[[int, int], np.ndarray]] = {
    "square_hilbert": _square_hilbert,
    "square_scan_lines": _square_scan_lines,
    "clusters_ordered": _clusters_ordered,
}
"""Spatially coherent inputs: neighbours in the list are neighbours in the plane. ``cities`` is one as well."""


def benchmark_points(name: str, n: int, seed: int) -> np.ndarray:
    """``(n, 2)`` float64 points of a benchmark's point set.

    Raises:
        ConfigError: unknown name.
        AssetError: the cities are not in the cache and cannot be fetched.
    """
    if name in COHERENT_POINT_SETS:
        return COHERENT_POINT_SETS[name](n, seed)
    require_known([name], sorted((*POINT_SETS, *COHERENT_POINT_SETS)), "distribution")
    return load_points(name, n, seed)


def _describe(name: str, n: int, seed: int) -> dict[str, object]:
    if name in COHERENT_POINT_SETS:
        return {"name": name, "n": n, "seed": seed, "source": "entreg.experiments.geometry.speed.benchmark"}
    return describe_points(name, n, seed)


# --- methods and their checks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A rival, one of our own calls or a reference line, and the role it plays.

    ``kind``: ``ours``, ``library``, ``textbook``, ``reordered`` (a library on reordered input), ``limit`` (a pass over
    the points that no algorithm can do without) or ``conversion`` (what a rival's input format costs).
    """

    rival: Rival
    kind: str

    @property
    def name(self) -> str:
        return self.rival.name


@dataclass(frozen=True)
class Family:
    """One problem: its methods, ours first, and how results are checked.

    ``certify(points, result)`` names what is wrong with our own result, or returns None. ``checker(points, ours)``
    gives a function from a method's input and result to the row's fields ``exact``, ``missing`` and ``extra``: hull
    vertices, front points or Delaunay edges that it has too few or too many.
    """

    methods: tuple[Method, ...]
    baseline: str
    fastest_of: tuple[str, ...]
    certify: Callable[[np.ndarray, object], str | None]
    checker: Callable[[np.ndarray, object], Callable[[np.ndarray, object], dict[str, object]]]


def _verdict(missing: int, extra: int) -> dict[str, object]:
    return {"exact": missing == extra == 0, "missing": missing, "extra": extra}


def _ours(function: Callable[..., object]) -> list[Method]:
    return [
        Method(Rival("entreg", function, note="all threads", threads=0), "ours"),
        Method(Rival("entreg_1_thread", lambda points: function(points, threads=1)), "ours"),
    ]


@njit(cache=True, nogil=True)
def _scan(points: np.ndarray, start: int, stop: int) -> np.ndarray:
    return eight_extremes(points[start:stop])


def _memory_scans() -> list[Method]:
    def scan(threads: int) -> Callable[[np.ndarray], object]:
        return lambda points: run_chunks(
            lambda start, stop: _scan(points, start, stop), chunk_ranges(len(points), threads), threads
        )

    counts = sorted({1, default_threads()})
    note = "one pass over the points for eight extremes: no hull"
    return [
        Method(Rival(f"memory_scan_{count}_thread", scan(count), note=note, threads=count), "limit") for count in counts
    ]


def _kind_of(name: str, libraries: Iterable[str]) -> str:
    if name in libraries:
        return "library"
    return "reordered" if any(name.startswith(f"{library}_") for library in libraries) else "textbook"


def _hull_checker(points: np.ndarray, ours: np.ndarray) -> Callable[[np.ndarray, object], dict[str, object]]:
    vertices, indices = points[ours], np.sort(ours)

    def check(given: np.ndarray, result: np.ndarray) -> dict[str, object]:
        if result.ndim == 1 and given is points and np.array_equal(np.sort(result), indices):
            return _verdict(0, 0)
        claimed = hull_vertices(given, result)
        # A float32 method is held to the exact hull of the rounded points that it was given.
        exact = given[convex_hull(given)] if claimed.dtype == np.float32 else vertices
        return _verdict(*vertex_set_difference(exact, claimed))

    return check


def hull_family() -> Family:
    """Convex hull: Qhull, GEOS and OpenCV, textbook methods, reordered inputs to Qhull, and the scan limit."""
    float32 = Rival(
        "entreg_float32",
        convex_hull,
        dtype="float32",
        prepare=as_float32,
        threads=0,
        note="our call on float32 points, widened inside the timer",
    )
    rivals = [
        # GEOS without the construction is a library figure too, but not one that a user can have alone.
        Method(rival, "conversion" if name == "geos_call_only" else _kind_of(name, LIBRARY_HULL_RIVALS))
        for name, rival in HULL_RIVALS.items()
    ]
    conversions = [
        Method(Rival("convert_to_float32", as_float32, note="what OpenCV's input costs"), "conversion"),
        Method(Rival("convert_to_geos", geos_geometry, note="what GEOS' input costs"), "conversion"),
    ]
    return Family(
        methods=(*_ours(convex_hull), Method(float32, "ours"), *rivals, *_memory_scans(), *conversions),
        baseline="qhull",
        fastest_of=LIBRARY_HULL_RIVALS,
        certify=hull_defect,
        checker=_hull_checker,
    )


def _certify_pareto(points: np.ndarray, result: object) -> str | None:
    expected = PARETO_RIVALS["numpy_lexsort"](points)
    return None if np.array_equal(result, expected) else "differs from the sorted running maximum"


def _pareto_checker(points: np.ndarray, ours: np.ndarray) -> Callable[[np.ndarray, object], dict[str, object]]:
    def check(given: np.ndarray, result: np.ndarray) -> dict[str, object]:
        return _verdict(len(np.setdiff1d(ours, result)), len(np.setdiff1d(result, ours)))

    return check


def pareto_family() -> Family:
    """Two-dimensional maxima: no common library has them, so numpy's sort is the rival."""
    rivals = [Method(rival, "textbook") for rival in PARETO_RIVALS.values()]
    return Family(
        methods=(*_ours(pareto_front), *rivals, *_memory_scans()),
        baseline="numpy_lexsort",
        fastest_of=tuple(PARETO_RIVALS),
        certify=_certify_pareto,
        checker=_pareto_checker,
    )


def _certify_delaunay(points: np.ndarray, result: object) -> str | None:
    return delaunay_defect(points, result.simplices, result.neighbors)


def _delaunay_checker(points: np.ndarray, ours: Triangulation) -> Callable[[np.ndarray, object], dict[str, object]]:
    n = len(points)
    # Among equal points every library may keep another index, so triangles are compared between first occurrences.
    canonical = canonical_indices(points)
    expected = canonical[ours.simplices]
    fingerprint = triangle_set_fingerprint(expected)

    def check(given: np.ndarray, result: object) -> dict[str, object]:
        simplices = canonical[np.asarray(getattr(result, "simplices", result), dtype=np.int64)]
        if triangle_set_fingerprint(simplices) == fingerprint:
            return _verdict(0, 0)
        our_edges, their_edges = edge_keys(expected, n), edge_keys(simplices, n)
        verdict = _verdict(
            len(np.setdiff1d(our_edges, their_edges, assume_unique=True)),
            len(np.setdiff1d(their_edges, our_edges, assume_unique=True)),
        )
        # Cocircular points leave a choice: another triangulation is as right as ours when its certificate holds.
        oriented, neighbors = triangle_neighbors(points, simplices)
        exact = neighbors is not None and delaunay_defect(points, oriented, neighbors) is None
        return {**verdict, "exact": exact}

    return check


def delaunay_family() -> Family:
    """Delaunay triangulation: Qhull, shull and Triangle, and the three on reordered input."""
    libraries = ("qhull", *LIBRARY_DELAUNAY_RIVALS)
    rivals = [Method(rival, _kind_of(name, libraries)) for name, rival in DELAUNAY_RIVALS.items()]
    return Family(
        methods=(*_ours(delaunay), *rivals, *_memory_scans()),
        baseline="qhull",
        fastest_of=LIBRARY_DELAUNAY_RIVALS,
        certify=_certify_delaunay,
        checker=_delaunay_checker,
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "hull": hull_family,
    "pareto": pareto_family,
    "delaunay": delaunay_family,
}
"""Problem to its methods and checks."""


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    family: Family,
    points: np.ndarray,
    *,
    repeats: int,
    time_budget: float,
    expected: Mapping[str, float] | None = None,
) -> list[dict[str, object]]:
    """Check and time every method of ``family`` on one point set.

    Args:
        family: what to compare.
        points: ``(n, 2)`` float64.
        repeats: rounds of the interleaved timing, at least 1.
        time_budget: seconds that one method may spend in its timed rounds; a twentieth of it for reordered inputs and
            conversions. A method too slow for all rounds gets fewer, but at least three.
        expected: method to expected seconds of one run; a method expected to exceed its budget is not run.

    Returns:
        One row per method: ``n, method, kind, dtype, threads, status, seconds_median, seconds_min, seconds_max,
        repeats, exact, missing, extra, fastest_rival``, and ratios "this rival's median seconds over the method's
        own": ``ratio_to_<baseline>`` and ``ratio_to_fastest_rival`` (above 1: the method is faster). Fields that do
        not apply are None.

    Raises:
        RuntimeError: our own result is wrong; nothing is timed then.
    """
    expected = expected or {}
    given_by_preparation: dict[Callable[[np.ndarray], object], object] = {}
    checks: dict[str, dict[str, object]] = {}
    budgets: dict[str, float] = {}
    callables: dict[str, Callable[[], object]] = {}
    check: Callable[[np.ndarray, object], dict[str, object]] | None = None
    for method in family.methods:
        budget = time_budget * (_SIDE_LINE_SHARE if method.kind in ("reordered", "conversion") else 1.0)
        if expected.get(method.name, 0.0) > budget:
            continue
        prepare = method.rival.prepare
        if prepare not in given_by_preparation:
            given_by_preparation[prepare] = prepare(points)
        given = given_by_preparation[prepare]
        result = method.rival.run(given)
        if method.kind in ("limit", "conversion"):
            checks[method.name] = {}
        else:
            if check is None:
                defect = family.certify(points, result)
                if defect is not None:
                    raise RuntimeError(f"{method.name} is wrong on {len(points)} points: {defect}")
                check = family.checker(points, result)
            checks[method.name] = check(given, result)
            if method.kind == "ours" and not checks[method.name]["exact"]:
                raise RuntimeError(f"{method.name} differs from entreg on {len(points)} points")
        del result
        budgets[method.name] = budget
        callables[method.name] = _bind(method.rival.run, given)

    timings = interleaved_timings(callables, repeats=repeats, least=min(_FEWEST_ROUNDS, repeats), time_budget=budgets)
    seconds_of = {name: timing.seconds for name, timing in timings.items()}
    rows = [_row(method, len(points), seconds_of.get(method.name), checks) for method in family.methods]
    _add_ratios(rows, family)
    return rows


def _bind(run: Callable[[object], object], given: object) -> Callable[[], object]:
    return lambda: run(given)


def _row(
    method: Method, n: int, seconds: Sequence[float] | None, checks: Mapping[str, Mapping[str, object]]
) -> dict[str, object]:
    check = checks.get(method.name, {})
    return {
        "n": n,
        "method": method.name,
        "kind": method.kind,
        "dtype": method.rival.dtype,
        "threads": method.rival.threads or default_threads(),
        "status": MEASURED if seconds else NOT_RUN,
        "seconds_median": float(np.median(seconds)) if seconds else None,
        "seconds_min": min(seconds) if seconds else None,
        "seconds_max": max(seconds) if seconds else None,
        "repeats": len(seconds) if seconds else 0,
        "exact": check.get("exact"),
        "missing": check.get("missing"),
        "extra": check.get("extra"),
    }


def _add_ratios(rows: list[dict[str, object]], family: Family) -> None:
    medians = {row["method"]: row["seconds_median"] for row in rows if row["seconds_median"]}
    libraries = [name for name in family.fastest_of if name in medians]
    fastest = min(libraries, key=medians.__getitem__) if libraries else None
    for row in rows:
        own = medians.get(row["method"])
        baseline = medians.get(family.baseline)
        row["fastest_rival"] = fastest
        row[f"ratio_to_{family.baseline}"] = baseline / own if own and baseline else None
        row["ratio_to_fastest_rival"] = medians[fastest] / own if own and fastest else None


# --- the benchmarks ------------------------------------------------------------------------------------------------


def run_geometry_speed(
    *,
    problem: str,
    distributions: Sequence[str],
    sizes: Sequence[int],
    time_budget: float,
    profile: Mapping[str, object],
    store: str | Path,
    command: str,
    force: bool = False,
) -> list[Path]:
    """Run one problem's benchmark and save one record per distribution.

    Args:
        problem: ``hull``, ``pareto`` or ``delaunay``.
        distributions: names that :func:`benchmark_points` knows.
        sizes: numbers of points, increasing; those above the profile's ``geometry.max_points`` are left out.
        time_budget: seconds, see :func:`measure`.
        profile: the configuration group ``profile`` (``name``, ``geometry.max_points``, ``repeats``, ``seeds``).
        store: folder of the records.
        command: what to type to repeat the run.
        force: run again what has a record already.

    Returns:
        The records' files, in the order of ``distributions``.

    Raises:
        ConfigError: unknown problem or distribution, or no size within the profile's limit.
    """
    require_known([problem], FAMILIES, "problem")
    require_some("distributions", distributions, sorted((*POINT_SETS, *COHERENT_POINT_SETS)), "distribution")
    most = profile["geometry"]["max_points"]
    sizes = sorted(n for n in sizes if n <= most)
    if not sizes or sizes[0] < 3 or not time_budget > 0:
        raise ConfigError(f"sizes need a value from 3 to max_points = {most}, and time_budget must be positive")
    require_writable(store)
    records = RecordStore(store)
    seed = profile["seeds"][0]
    for distribution in distributions:
        # Real points must be there before any others are timed.
        benchmark_points(distribution, sizes[0], seed)
    family = FAMILIES[problem]()
    paths = []
    for distribution in progress(distributions, f"{problem} benchmark"):
        config = {
            "problem": problem,
            "distribution": distribution,
            "sizes": sizes,
            "repeats": profile["repeats"],
            "time_budget": time_budget,
            "seed": seed,
            "profile": profile["name"],
        }
        experiment = f"benchmark/geometry_{problem}/{distribution}"
        if not force and records.find(experiment, config) is not None:
            paths.append(records.path_for(experiment, config))
            continue
        start = time.perf_counter()
        rows = _run_sizes(family, distribution, sizes, config)
        record = new_record(
            experiment=experiment,
            scale=profile["name"],
            config=config,
            command=command,
            dataset=_describe(distribution, sizes[-1], seed),
            seed=seed,
            repeats=profile["repeats"],
            metrics=_summary(rows, family),
            rows=rows,
            wall_seconds=time.perf_counter() - start,
        )
        paths.append(records.save(record))
    return paths


def _run_sizes(
    family: Family, distribution: str, sizes: Sequence[int], config: Mapping[str, object]
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    expected: dict[str, float] = {}
    previous = None
    for n in progress(sizes, distribution):
        if previous is not None:
            # At least linear growth: what does not fit at this size will not fit at a larger one either.
            expected = {name: seconds * n / previous for name, seconds in expected.items()}
        points = benchmark_points(distribution, n, config["seed"])
        measured = measure(
            family,
            points,
            repeats=config["repeats"],
            time_budget=config["time_budget"],
            expected=expected,
        )
        expected |= {row["method"]: row["seconds_median"] for row in measured if row["seconds_median"]}
        rows.extend({"distribution": distribution, **row} for row in measured)
        previous = n
    return rows


def _summary(rows: Sequence[Mapping[str, object]], family: Family) -> dict[str, object]:
    ours = [row for row in rows if row["method"] == "entreg"]
    return {
        ratio: {str(row["n"]): row[ratio] for row in ours}
        for ratio in (f"ratio_to_{family.baseline}", "ratio_to_fastest_rival")
    }
