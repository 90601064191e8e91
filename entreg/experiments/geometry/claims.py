"""What the geometry claims of the paper come to, computed from the records of the geometry experiment.

The claims name no data sets. Ours are weighed alike: the value of a speed-up claim is the geometric mean over all data
sets at the largest size that they share, with the network's pass counted, and the reason names the best and the worst
one. "Up to" claims take the best one within the claimed error. Triangulations of cocircular points do not count (see
:data:`entreg.experiments.geometry.study.COCIRCULAR`); the reason says what happens there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entreg.experiments.geometry.study import (
    ADVISE,
    EXPERIMENTS,
    OURS,
    REWRITE,
    REWRITE_FREE,
    Study,
    extreme,
    label,
)
from entreg.experiments.geometry.tables import distribution_label
from entreg.records.claims import Evidence, register_measure
from entreg.records.formatting import number, percent, ratio
from entreg.records.statistics import geometric_mean_ratio, mean_and_interval

Records = list[dict[str, Any]]

CLAIMED_ERROR = 0.002

CONTROLS = ("plain_filter", "jitter", "rounding_float32", "rounding_grid")
"""Methods with no network and the same algorithm behind them: what a speed-up of rewriting must be more than."""

KEY_SETS = ("square", "disk", "circle", "cities")
"""Without all of these there is no verdict: somebody who runs one favourable data set has not checked a claim."""


@register_measure("geo-hull-speed", experiments=("geometry/hull",))
def hull_speed(records: Records) -> Evidence | None:
    """Geometric mean over data sets of Qhull's time over network and Qhull on the rewritten points."""
    return _mean_speedup(records, (*CONTROLS, OURS, ADVISE))


@register_measure("geo-tri-speed", experiments=("geometry/triangulation",))
def triangulation_speed(records: Records) -> Evidence | None:
    """The same for the Delaunay triangulation."""
    return _mean_speedup(records, ("jitter", "shull", "triangle", OURS, ADVISE))


@register_measure("geo-error", experiments=("geometry/hull", "geometry/triangulation"))
def error(records: Records) -> Evidence | None:
    """Relative area error of the hull of the rewritten points, in per cent: mean over data sets, geometric over seeds.

    Errors are positive and differ by factors, so the interval is one of their logarithms, as for the speed-ups.
    """
    hull_records = [r for r in records if r["experiment"] == "geometry/hull"]
    study = Study(hull_records)
    if not _is_complete(study):
        return None
    areas = study.by_distribution(REWRITE, "area_error")
    per_seed: dict[int, list[float]] = {}
    for name in study.distributions:
        for seed, row in study.rows(name, study.size_of(name), REWRITE).items():
            per_seed.setdefault(seed, []).append(100.0 * row["area_error"])
    if not per_seed:
        return None
    means = [sum(values) / len(values) for values in per_seed.values()]
    estimate = geometric_mean_ratio(means, [1.0] * len(means)) if min(means) > 0 else mean_and_interval(means)
    worst, best = extreme(areas), extreme(areas, min)
    within = [name for name, value in areas.items() if value < CLAIMED_ERROR]
    reasons = [
        f"{study.size_text()}: below 0.2 % on {len(within)} of {len(areas)} data sets, best {_named(best, percent)}, "
        f"worst {_named(worst, percent)}",
        f"Hausdorff distance up to {_named(extreme(study.by_distribution(REWRITE, 'hausdorff')), percent)} of the "
        "diameter",
    ]
    triangulated = Study([r for r in records if r["experiment"] == "geometry/triangulation"])
    if triangulated.sizes:
        kept = triangulated.by_distribution(REWRITE, "edges_kept")
        lost = {name: 1.0 - value for name, value in kept.items()}
        if lost:
            reasons.append(
                f"of the Delaunay edges {_named(extreme(lost, min), percent)} to {_named(extreme(lost), percent)} "
                "are lost"
            )
    reasons.append("classical exact methods and learned advice have no error")
    return Evidence(
        value=estimate.mean,
        interval=estimate.interval,
        scale=hull_records[0]["scale"],
        record_ids=[r["id"] for r in records],
        reason="; ".join(reasons),
        unit="%",
    )


@register_measure("geo-v1-speed", experiments=EXPERIMENTS)
def largest_speed(records: Records) -> Evidence | None:
    """The largest speed-up of rewriting over problems and data sets whose error stays within the claimed one.

    When none does the value is 1, that of leaving the points where they are.
    """
    best: tuple[float, Study, str] | None = None
    fastest: tuple[float, Study, str] | None = None
    free = []
    for experiment in EXPERIMENTS:
        study = Study([r for r in records if r["experiment"] == experiment])
        if not _is_complete(study):
            continue
        errors = study.by_distribution(REWRITE, "area_error")
        given = _counted(study, REWRITE_FREE)
        for name, value in _counted(study, REWRITE).items():
            if fastest is None or value > fastest[0]:
                fastest = (value, study, name)
            if errors[name] < CLAIMED_ERROR:
                free.append(given[name])
                if best is None or value > best[0]:
                    best = (value, study, name)
    if fastest is None:
        return None
    reasons = []
    interval, control = None, None
    if best is None:
        reasons.append("no data set with an error below 0.2 %")
    else:
        value, study, name = best
        n = study.size_of(name)
        interval = study.speedup(name, n, REWRITE).interval
        unlearned = [
            study.speedup(name, n, method).mean
            for method in CONTROLS
            if study.rows(name, n, method)
            and mean_and_interval(study.values(name, n, method, "area_error")).mean < CLAIMED_ERROR
        ]
        control = max(unlearned, default=None)
        others = [
            f"{label(method)}: {ratio(study.speedup(name, n, method).mean)}"
            for method in study.methods
            if method in ("plain_filter", "shull", "jitter", "rounding_grid", OURS, ADVISE)
            and study.rows(name, n, method)
        ]
        reasons.append(f"{_case(study, name)}; there {', '.join(others)}")
    if fastest != best:
        reasons.append(f"at a larger error: {ratio(fastest[0])} on the {_case(fastest[1], fastest[2])}")
    return Evidence(
        value=1.0 if best is None else best[0],
        interval=interval,
        scale=records[0]["scale"],
        record_ids=[r["id"] for r in records],
        reason="; ".join(reasons),
        unit="x",
        alternative=max(free, default=1.0),
        control=control,
    )


def _case(study: Study, name: str) -> str:
    """Problem, data set, size and error of rewriting there."""
    n = study.size_of(name)
    error = mean_and_interval(study.values(name, n, REWRITE, "area_error")).mean
    kind = "hypervolume error" if study.experiment == "geometry/pareto_front" else "area error"
    problem = study.experiment.partition("/")[2].replace("_", " ")
    return f"{problem} of {distribution_label(name)}, n = {number(n)}, at {percent(error)} {kind}"


def _mean_speedup(records: Records, others: Sequence[str]) -> Evidence | None:
    study = Study(records)
    if not _is_complete(study):
        return None
    failed = study.failed(REWRITE)
    estimate = study.mean_speedup(REWRITE, without=failed)
    free = study.mean_speedup(REWRITE_FREE, without=failed)
    if estimate is None or free is None:
        return None
    speedups = _counted(study, REWRITE)
    areas = study.by_distribution(REWRITE, "area_error")
    reasons = [_where(study.size_text(), speedups, areas)]
    if study.left_out:
        reasons.append(_cocircular(study))
    if failed:
        names = ", ".join(distribution_label(name) for name in failed)
        reasons.append(f"no result on {names}, which the mean leaves out")
    if estimate.mean < 2.5 <= free.mean:
        reasons.append("only without the network's own time")
    compared, controls = [], []
    for method in others:
        mean = study.mean_speedup(method)
        if mean is not None:
            errors = study.by_distribution(method, "area_error")
            if method in CONTROLS and max(errors.values()) < CLAIMED_ERROR:
                controls.append(mean.mean)
            exactness = "exact" if max(errors.values()) == 0.0 else f"error up to {percent(max(errors.values()))}"
            compared.append(f"{label(method)}: {ratio(mean.mean)} ({exactness})")
    reasons.append("without learning or without error: " + ", ".join(compared))
    return Evidence(
        value=estimate.mean,
        interval=estimate.interval,
        scale=records[0]["scale"],
        record_ids=[r["id"] for r in records],
        reason="; ".join(reasons),
        unit="x",
        alternative=free.mean,
        control=max(controls, default=None),
    )


def _is_complete(study: Study) -> bool:
    return set(KEY_SETS) <= set(study.distributions)


def _counted(study: Study, method: str) -> dict[str, float]:
    speedups = study.by_distribution(method, "speedup")
    return {name: value for name, value in speedups.items() if name not in study.left_out}


def _cocircular(study: Study) -> str:
    learned, unlearned = (study.by_distribution(method, "speedup") for method in (REWRITE, "jitter"))
    parts = [
        f"{distribution_label(name)} {ratio(learned.get(name))} (jitter alone {ratio(unlearned.get(name))})"
        for name in study.left_out
    ]
    return f"not counted, because Qhull is quadratic on cocircular points: {', '.join(parts)}"


def _where(sizes: str, speedups: Mapping[str, float], areas: Mapping[str, float]) -> str:
    best, worst = extreme(speedups), extreme(speedups, min)
    reached = [
        f"{distribution_label(name)} {ratio(value)} at {percent(areas[name])}"
        for name, value in sorted(speedups.items(), key=lambda item: -item[1])
        if value >= 4.0
    ]
    text = f"{sizes}, {len(speedups)} data sets: best {_named(best, ratio)}, worst {_named(worst, ratio)}"
    return text + "; 4x or more " + (f"on {', '.join(reached)} area error" if reached else "nowhere")


def _named(item: tuple[str, float] | None, text: Any) -> str:
    return "not measured" if item is None else f"{text(item[1])} ({distribution_label(item[0])})"
