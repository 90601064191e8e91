"""What a newcomer waits for: from the start of a process to the first hull, front or triangulation.

Every measurement is a process of its own that imports what it needs, computes once on points that are ready, and ends.
*Cold* has an empty cache, so that all kernels are compiled; *warm* finds them compiled, as after ``make setup``. scipy
and NumPy, which compile nothing, are measured the same way, in turns with ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import entreg
from entreg.atomic import require_writable
from entreg.errors import ConfigError
from entreg.geometry.generators import generate
from entreg.progress import progress
from entreg.records.record import new_record
from entreg.records.store import RecordStore

CALLS: dict[str, dict[str, str]] = {
    "hull": {
        "entreg": "from entreg.geometry import convex_hull; convex_hull(points)",
        "qhull": "from scipy.spatial import ConvexHull; ConvexHull(points)",
    },
    "pareto": {
        "entreg": "from entreg.geometry import pareto_front; pareto_front(points)",
        "numpy_lexsort": "x, y = points[np.lexsort((points[:, 1], points[:, 0]))].T; "
        "np.flatnonzero(y[:-1] > np.maximum.accumulate(y[::-1])[::-1][1:])",
    },
    "delaunay": {
        "entreg": "from entreg.geometry import delaunay; delaunay(points)",
        "qhull": "from scipy.spatial import Delaunay; Delaunay(points)",
    },
}
"""Problem to method to the program, which finds NumPy as ``np`` and the ``points``."""

COLD, WARM, NO_CACHE = "cold", "warm", "none"
"""States of the cache of compiled kernels; the last is for what compiles nothing."""


def first_result(program: str, points: Path, cache: Path) -> float:
    """Seconds from starting a Python process to its end, which comes with its first result.

    Args:
        program: Python, as in :data:`CALLS`.
        points: file of NumPy with the points.
        cache: folder of compiled kernels.

    Raises:
        RuntimeError: the program fails.
    """
    code = f"import numpy as np; points = np.load({str(points)!r}); {program}"
    found = os.pathsep.join([str(Path(entreg.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": found}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"'{program}' failed: {done.stderr[-1000:]}")
    return seconds


def start_rows(problem: str, sizes: Sequence[int], seed: int, repeats: int) -> list[dict[str, object]]:
    """Times to the first result of one problem on the unit square.

    Returns:
        One row per size, method and state of the cache: ``n, method, cache, seconds_median, seconds_min, seconds_max,
        repeats``.
    """
    rows = []
    for n in progress(sizes, f"{problem}, first results"):
        seconds: dict[tuple[str, str], list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "points.npy"
            np.save(file, generate("square", n, seed))
            for turn in range(repeats):
                cache = Path(folder) / str(turn)
                for method, program in CALLS[problem].items():
                    for state in (COLD, WARM) if method == "entreg" else (NO_CACHE,):
                        seconds.setdefault((method, state), []).append(first_result(program, file, cache))
        rows += [
            {
                "n": n,
                "method": method,
                "cache": state,
                "seconds_median": float(np.median(times)),
                "seconds_min": min(times),
                "seconds_max": max(times),
                "repeats": repeats,
            }
            for (method, state), times in seconds.items()
        ]
    return rows


def run_geometry_start(
    *,
    problems: Sequence[str],
    sizes: Sequence[int],
    profile: Mapping[str, object],
    store: str | Path,
    command: str,
    force: bool = False,
) -> list[Path]:
    """Measure the time to the first result and save one record per problem.

    Args:
        problems: keys of :data:`CALLS`.
        sizes: numbers of points; those above the profile's ``geometry.max_points`` are left out.
        profile: the configuration group ``profile`` (``name``, ``geometry.max_points``, ``repeats``, ``seeds``).
        store: folder of the records.
        command: what to type to repeat the run.
        force: run again what has a record already.

    Returns:
        The records' files, in the order of ``problems``.

    Raises:
        ConfigError: unknown problem, or no size within the profile's limit.
    """
    unknown = [name for name in problems if name not in CALLS]
    if unknown:
        raise ConfigError(f"unknown problem '{unknown[0]}', known are {', '.join(CALLS)}")
    sizes = sorted(n for n in sizes if n <= profile["geometry"]["max_points"])
    if not sizes or sizes[0] < 10:
        raise ConfigError(f"sizes need a value from 10 to max_points = {profile['geometry']['max_points']}")
    require_writable(store)
    records = RecordStore(store)
    seed, repeats = profile["seeds"][0], profile["repeats"]
    paths = []
    for problem in problems:
        config = {"problem": problem, "sizes": sizes, "repeats": repeats, "seed": seed, "profile": profile["name"]}
        experiment = f"benchmark/geometry_start/{problem}"
        if not force and records.find(experiment, config) is not None:
            paths.append(records.path_for(experiment, config))
            continue
        start = time.perf_counter()
        rows = start_rows(problem, sizes, seed, repeats)
        record = new_record(
            experiment=experiment,
            scale=profile["name"],
            config=config,
            command=command,
            dataset={"name": "square", "n": sizes[-1], "seed": seed, "source": "entreg.geometry.generators"},
            seed=seed,
            repeats=repeats,
            metrics={
                state: {str(row["n"]): row["seconds_median"] for row in rows if row["cache"] == state}
                for state in (COLD, WARM, NO_CACHE)
            },
            rows=rows,
            wall_seconds=time.perf_counter() - start,
        )
        paths.append(records.save(record))
    return paths
