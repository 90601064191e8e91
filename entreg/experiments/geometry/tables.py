"""Tables of the geometry experiment: every method per problem, all measurements, and the sensitivity study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entreg.experiments.geometry.speed.tables import DISTRIBUTION_LABELS
from entreg.experiments.geometry.study import BASELINES, REWRITE, Study, extreme, label
from entreg.records.formatting import p_value
from entreg.records.statistics import exponential, holm_by_name, mean_and_interval
from entreg.records.tables import MISSING, Table, TracedRow, number, percent, ratio, register_table, seconds

TITLES = {
    "geometry/hull": "Convex hull",
    "geometry/triangulation": "Delaunay triangulation",
    "geometry/pareto_front": "Pareto front",
}

# Field, heading, and whether the field counts what was kept instead of what was lost.
_ERRORS = {
    "geometry/hull": (("area_error", "area error"), ("hausdorff", "Hausdorff"), ("mapped_area_error", "mapped back")),
    "geometry/triangulation": (
        ("edges_lost", "edges lost"),
        ("area_error", "area error"),
        ("inverted", "triangles turned over"),
    ),
    "geometry/pareto_front": (("area_error", "hypervolume error"), ("mapped_area_error", "mapped back")),
}

_THREADS = "entreg, advice and the network's pass use all cores where it pays; the libraries use one."
_NOTES = {
    "geometry/hull": (
        "Area and Hausdorff errors are relative to area and diameter of the exact hull. Mapped back: area error of the "
        "original points that the answer names."
    ),
    "geometry/triangulation": (
        "Edges lost: share of Delaunay edges missing from the answer (cocircular points leave a choice, so exact "
        "methods may differ there). Triangles turned over: share that is flat or inverted when the answer is put back "
        "on the original points."
    ),
    "geometry/pareto_front": (
        "Hypervolume errors are relative to that of the exact front. Mapped back: of the original points that the "
        "answer names."
    ),
}


def distribution_label(name: str) -> str:
    """What tables call a data set."""
    return {"sorted_runs": "16 sorted runs"}.get(name) or DISTRIBUTION_LABELS.get(name, name)


def summary_table(experiment: str, name: str, records: Sequence[Mapping[str, Any]]) -> Table | None:
    """One row per method at the largest size that all data sets share."""
    study = Study(_with_edges_lost(records))
    if not study.sizes:
        return None
    errors = _ERRORS[experiment]
    tests = {method: study.rewrite_over(method) for method in study.methods if method != REWRITE}
    adjusted = holm_by_name(tests)
    rows = []
    for method in study.methods:
        speedups = study.by_distribution(method, "speedup")
        best, worst = extreme(speedups), extreme(speedups, min)
        row: list[Any] = [
            label(method),
            _speedup_or_failure(study, method),
            ratio(exponential(tests[method].difference)) if tests.get(method) else MISSING,
            p_value(adjusted.get(method)),
            f"{ratio(best[1])} ({distribution_label(best[0])})" if best else MISSING,
            f"{ratio(worst[1])} ({distribution_label(worst[0])})" if worst else MISSING,
        ]
        for field, _ in errors:
            values = study.by_distribution(method, field)
            largest = extreme(values)
            mean = sum(values.values()) / len(values) if values else None
            row.append(f"{percent(mean)} / {percent(largest[1])}" if largest else MISSING)
        rows.append([*row, len(study.mean_speedups(method))])
    baseline = BASELINES[experiment]
    sets = ", ".join(distribution_label(d) for d in study.distributions)
    return Table(
        name,
        f"{TITLES[experiment]}: learned rewriting and advice against classical methods, {study.size_text()}",
        [
            *("method", f"speed-up over {baseline}", "rewrite over it", "p", "best", "worst"),
            *(f"{text}, mean / worst" for _, text in errors),
            "seeds",
        ],
        rows,
        notes=[
            f"Data sets: {sets}. Speed-up: geometric mean over them, with the 95 % interval over training seeds; all "
            "times of one data set were taken in turns within one process. Rewrite over it: ratio of the rewriting's "
            "speed-up to the method's, with a t test of its logarithm in pairs over the seeds; p after Holm's "
            "correction.",
            "Rewriting pays for the network's pass but not for its training, which is in the records "
            f"({_training(records)} per data set).",
            _THREADS,
            *_left_out(study),
            _NOTES[experiment],
        ],
        align="l" + "r" * (6 + len(errors)),
    )


def complete_table(experiment: str, name: str, records: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every data set, size and method."""
    study = Study(_with_edges_lost(records))
    if not study.sizes:
        return None
    errors = _ERRORS[experiment]
    rows = []
    for distribution in study.distributions:
        for n in study.sizes:
            for method in study.methods:
                measured = study.rows(distribution, n, method)
                status = study.status(distribution, n, method)
                if not measured and status is None:
                    continue
                row: list[Any] = [distribution_label(distribution), n, label(method)]
                if measured:
                    times = study.values(distribution, n, method, "seconds")
                    row += [seconds(sum(times) / len(times)), ratio(study.speedup(distribution, n, method))]
                    row += [percent(_mean(study.values(distribution, n, method, field))) for field, _ in errors]
                    row += [len(measured), min(int(r["rounds"]) for r in measured.values())]
                else:
                    row += [status, *([MISSING] * (len(errors) + 3))]
                rows.append(TracedRow(row, study.ids_of(distribution)))
    return Table(
        name,
        f"{TITLES[experiment]}: all measurements of the rewriting experiment",
        ["points", "n", "method", "time", "speed-up", *(text for _, text in errors), "seeds", "rounds"],
        rows,
        notes=[
            "Time: mean over seeds of the median over interleaved rounds. Speed-up: geometric mean over seeds with its "
            f"95 % interval, against {BASELINES[experiment]} on the raw points.",
            _THREADS,
            _NOTES[experiment],
        ],
        align="lrl" + "r" * (4 + len(errors)),
    )


@register_table("geometry-net-hull", experiments=("geometry/hull",))
def hull_table(records: list[dict[str, Any]]) -> Table | None:
    return summary_table("geometry/hull", "geometry-net-hull", records)


@register_table("geometry-net-hull-all", experiments=("geometry/hull",))
def hull_table_all(records: list[dict[str, Any]]) -> Table | None:
    return complete_table("geometry/hull", "geometry-net-hull-all", records)


@register_table("geometry-net-triangulation", experiments=("geometry/triangulation",))
def triangulation_table(records: list[dict[str, Any]]) -> Table | None:
    return summary_table("geometry/triangulation", "geometry-net-triangulation", records)


@register_table("geometry-net-triangulation-all", experiments=("geometry/triangulation",))
def triangulation_table_all(records: list[dict[str, Any]]) -> Table | None:
    return complete_table("geometry/triangulation", "geometry-net-triangulation-all", records)


@register_table("geometry-net-pareto-front", experiments=("geometry/pareto_front",))
def pareto_table(records: list[dict[str, Any]]) -> Table | None:
    return summary_table("geometry/pareto_front", "geometry-net-pareto-front", records)


@register_table("geometry-net-pareto-front-all", experiments=("geometry/pareto_front",))
def pareto_table_all(records: list[dict[str, Any]]) -> Table | None:
    return complete_table("geometry/pareto_front", "geometry-net-pareto-front-all", records)


@register_table("geometry-sensitivity", experiments=("geometry/sensitivity",))
def sensitivity_table(records: list[dict[str, Any]]) -> Table | None:
    """One row per variant, columns per data set."""
    records = [record for record in records if "variant" in record["config"]]
    variants = list(dict.fromkeys(r["config"]["variant"] for r in sorted(records, key=_variant_order)))
    studies = {v: Study([r for r in records if r["config"]["variant"] == v]) for v in variants}
    distributions = sorted({d for study in studies.values() for d in study.distributions})
    if not distributions:
        return None
    n = max(size for study in studies.values() for size in study.sizes)
    rows = []
    for variant, study in studies.items():
        row: list[Any] = [variant.replace("_", " ")]
        for distribution in distributions:
            row.append(ratio(study.speedup(distribution, n, "entropy_net_rewrite")))
            row.append(ratio(_mean(study.values(distribution, n, "entropy_net_rewrite_free", "speedup"))))
            errors = study.values(distribution, n, "entropy_net_rewrite", "area_error")
            estimate = mean_and_interval([100.0 * e for e in errors]) if errors else None
            row.append(estimate)
        row.append(max(len(study.rows(name, n, REWRITE)) for name in study.distributions))
        rows.append(TracedRow(row, study.ids_of()))
    columns = ["variant"]
    for distribution in distributions:
        text = distribution_label(distribution)
        columns += [f"{text}: speed-up", f"{text}: network's time not counted", f"{text}: area error, %"]
    columns.append("seeds")
    return Table(
        "geometry-sensitivity",
        f"Sensitivity of rewriting to its settings, convex hull, n = {number(n)}",
        columns,
        rows,
        notes=[
            "One factor at a time around the default (first row: halfspaces) and around the ball surrogate; mean and "
            "95 % interval over training seeds; speed-up over Qhull on the raw points."
        ],
    )


def _speedup_or_failure(study: Study, method: str) -> str:
    failed = study.failed(method)
    if failed:
        return "failed on " + ", ".join(distribution_label(name) for name in failed)
    return ratio(study.mean_speedup(method))


def _left_out(study: Study) -> list[str]:
    if not study.left_out:
        return []
    names = ", ".join(distribution_label(name) for name in study.left_out)
    return [
        f"The geometric mean leaves out {names}: Qhull triangulates cocircular points in quadratic time, which any "
        "perturbation removes (see jitter)."
    ]


def _variant_order(record: Mapping[str, Any]) -> tuple[Any, ...]:
    training, variant = record["config"]["training"], record["config"]["variant"]
    # The surrogate's own default first, then its factors with their values increasing.
    is_base = variant == "default" or variant == training["surrogate"]
    factor = variant.rpartition("_")[0]
    tail = variant.rpartition("_")[2]
    value = float(tail) if tail.replace(".", "").isdigit() else 0.0
    return (variant != "default", training["surrogate"] == "ball", not is_base, factor, value, variant)


def _with_edges_lost(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **record,
            "rows": [
                {**row, "edges_lost": 1.0 - row["edges_kept"]} if row.get("edges_kept") is not None else row
                for row in record["rows"]
            ],
        }
        for record in records
    ]


def _training(records: Sequence[Mapping[str, Any]]) -> str:
    return seconds(_mean([record["metrics"]["training_seconds"] for record in records]))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
