"""Tables of the geometry benchmarks: the project's aims, times by method, ratios by size, exactness, and the law."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entreg.records.record import current_records
from entreg.records.statistics import linear_fit
from entreg.records.tables import MISSING, NOT_RUN, Table, TracedRow, number, ratio, register_table, seconds

LARGE = 1_000_000
OURS = "entreg"

Row = Mapping[str, Any]

DISTRIBUTION_LABELS = {
    "square": "square",
    "disk": "disk",
    "gaussian": "Gaussian",
    "circle": "circle",
    "circle_ordered": "circle, in angular order",
    "parabola": "parabola",
    "clusters": "32 clusters",
    "cities": "cities (real)",
    "square_hilbert": "square, Hilbert order",
    "square_scan_lines": "square, scan lines",
    "clusters_ordered": "32 clusters, one by one",
}

METHOD_LABELS = {
    "entreg": "entreg",
    "entreg_1_thread": "entreg, 1 thread",
    "entreg_float32": "entreg, float32 input",
    "qhull": "Qhull",
    "geos": "GEOS",
    "geos_call_only": "GEOS, call only",
    "opencv": "OpenCV (float32)",
    "plain_filter": "plain exact filter",
    "x_sort_chain": "x-sort and chain",
    "numpy_lexsort": "numpy lexsort",
    "timsort_chain": "Timsort and chain",
    "quickhull": "quickhull",
    "shull": "shull",
    "shull_parallel": "shull, parallel",
    "triangle": "Triangle",
    "convert_to_float32": "conversion to float32",
    "convert_to_geos": "conversion to GEOS",
}

_ORDER_LABELS = {"x_sorted": "x-sorted", "hilbert": "Hilbert order", "kmeans": "k-means order"}

_TIMING_NOTE = (
    "Seconds are medians of interleaved rounds in one process; a ratio is the rival's median over ours, above 1 we are "
    "faster. Slow methods ran fewer rounds (at least three) or, where it says so, not at all."
)


def method_label(method: str) -> str:
    """What a table or legend calls a method."""
    if method in METHOD_LABELS:
        return METHOD_LABELS[method]
    if method.startswith("memory_scan_"):
        return f"scan limit, {method.split('_')[2]} thread" + ("" if "_1_" in method else "s")
    for order, label in _ORDER_LABELS.items():
        if method.endswith(f"_{order}"):
            return f"{METHOD_LABELS[method.removesuffix(f'_{order}')]}, {label}"
    return method


@dataclass(frozen=True)
class Bench:
    """The rows of one problem's records, by distribution, size and method; ``sources``: a distribution's records."""

    cells: Mapping[tuple[str, int, str], Row]
    sources: Mapping[str, tuple[str, ...]]
    distributions: tuple[str, ...]
    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    record_ids: tuple[str, ...]

    def get(self, distribution: str, n: int, method: str) -> Row:
        """The row, or an empty one."""
        return self.cells.get((distribution, n, method), {})

    def median(self, distribution: str, n: int, method: str) -> float | None:
        """Median seconds, or None when not run."""
        return self.get(distribution, n, method).get("seconds_median")

    def largest(self, wanted: int = LARGE) -> int:
        """The largest size not above ``wanted``, or the smallest there is."""
        return max((n for n in self.sizes if n <= wanted), default=self.sizes[0])


def bench_of(records: Sequence[dict[str, Any]], problem: str) -> Bench | None:
    """The current rows of ``problem`` (hull, pareto or delaunay), or None without records."""
    prefix = f"benchmark/geometry_{problem}/"
    chosen = [record for record in current_records(records) if record["experiment"].startswith(prefix)]
    if not chosen:
        return None
    rows = [row for record in chosen for row in record["rows"]]
    known = list(DISTRIBUTION_LABELS)
    present = {row["distribution"] for row in rows}
    return Bench(
        cells={(row["distribution"], row["n"], row["method"]): row for row in rows},
        sources={
            name: tuple(r["id"] for r in chosen if any(row["distribution"] == name for row in r["rows"]))
            for name in present
        },
        distributions=tuple(sorted(present, key=lambda d: (known.index(d) if d in known else len(known), d))),
        sizes=tuple(sorted({row["n"] for row in rows})),
        methods=tuple(dict.fromkeys(row["method"] for row in rows)),
        record_ids=tuple(record["id"] for record in chosen),
    )


# --- aims ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """A ratio that the project set out to reach before it measured."""

    problem: str
    text: str
    distributions: tuple[str, ...]
    field: str
    target: float
    every_size: bool = False


_COHERENT = ("cities", "square_hilbert", "square_scan_lines", "clusters_ordered")

AIMS = (
    Aim("hull", "x Qhull", ("square", "gaussian", "circle", "parabola"), "ratio_to_qhull", 30.0),
    Aim("hull", "x Qhull", ("disk", "clusters", "cities"), "ratio_to_qhull", 15.0),
    Aim("hull", "x Qhull", ("circle_ordered",), "ratio_to_qhull", 60.0),
    Aim(
        "hull",
        "x fastest library, worst size",
        ("square", "disk", "gaussian", "circle", "circle_ordered", "parabola", "clusters", "cities"),
        "ratio_to_fastest_rival",
        1.0,
        every_size=True,
    ),
    Aim(
        "delaunay",
        "x Qhull",
        ("square", "gaussian", "clusters", *_COHERENT),
        "ratio_to_qhull",
        10.0,
    ),
    Aim("delaunay", "x fastest library", ("square", "clusters"), "ratio_to_fastest_rival", 1.0),
    Aim("delaunay", "x fastest library", _COHERENT, "ratio_to_fastest_rival", 1.5),
)


@register_table("benchmark-aims", experiments=("benchmark/geometry_",))
def aims_table(records: list[dict[str, Any]]) -> Table | None:
    benches = {problem: bench_of(records, problem) for problem in ("hull", "delaunay")}
    rows = [
        TracedRow(
            [
                aim.problem,
                DISTRIBUTION_LABELS[distribution],
                aim.text,
                f">= {number(aim.target)}x",
                *_aim_outcome(benches[aim.problem], aim, distribution),
            ],
            benches[aim.problem].sources.get(distribution, ()) if benches[aim.problem] else (),
        )
        for aim in AIMS
        for distribution in aim.distributions
    ]
    used = [record_id for bench in benches.values() if bench for record_id in bench.record_ids]
    if not used:
        return None
    met, judged = (sum(row[-1] in verdicts for row in rows) for verdicts in (("met",), ("met", "missed")))
    return Table(
        "benchmark-aims",
        "The project's aims for the geometry package",
        ["problem", "input", "ratio", "aim", "measured", "at", "verdict"],
        rows,
        notes=[
            f"{met} of {judged} aims met. At n = {LARGE:,} unless the ratio says worst size: then the smallest ratio "
            "over all sizes that were run, and where it occurred.",
            "Fastest library: of Qhull, GEOS (building its geometry included) and OpenCV (float32, conversion not "
            "included) for the hull; of shull, sequential or parallel, and Triangle for the triangulation. Ours uses "
            "all threads.",
            _TIMING_NOTE,
        ],
        align="llllrll",
        record_ids=used,
    )


def _aim_outcome(bench: Bench | None, aim: Aim, distribution: str) -> list[str]:
    if bench is None:
        return [NOT_RUN, MISSING, NOT_RUN]
    sizes = bench.sizes if aim.every_size else (LARGE,)
    rows = [bench.get(distribution, n, OURS) for n in sizes]
    measured = [row for row in rows if row.get(aim.field)]
    if not measured:
        return [NOT_RUN, MISSING, NOT_RUN]
    worst = min(measured, key=lambda row: row[aim.field])
    against = "qhull" if aim.field == "ratio_to_qhull" else worst["fastest_rival"]
    verdict = "met" if worst[aim.field] >= aim.target else "missed"
    return [ratio(worst[aim.field]), f"n = {worst['n']:,}, {method_label(against)}", verdict]


# --- times at one size ---------------------------------------------------------------------------------------------


def _time(bench: Bench, distribution: str, n: int, method: str) -> str:
    row = bench.get(distribution, n, method)
    if row.get("seconds_median") is None:
        return row.get("status", NOT_RUN)
    return seconds(row["seconds_median"])


def _times_table(
    bench: Bench,
    name: str,
    title: str,
    n: int,
    methods: Sequence[str],
    ratios: Mapping[str, str],
    notes: Sequence[str],
) -> Table:
    shown = [method for method in methods if method in bench.methods]
    rows = [
        TracedRow(
            [
                DISTRIBUTION_LABELS.get(distribution, distribution),
                *(_time(bench, distribution, n, method) for method in shown),
                *(ratio(bench.get(distribution, n, OURS).get(field)) for field in ratios),
            ],
            bench.sources[distribution],
        )
        for distribution in bench.distributions
    ]
    return Table(
        name,
        f"{title}, n = {n:,}",
        ["points", *(method_label(method) for method in shown), *ratios.values()],
        rows,
        notes=[*notes, _TIMING_NOTE],
        record_ids=bench.record_ids,
    )


def _scans(bench: Bench) -> list[str]:
    return [method for method in bench.methods if method.startswith("memory_scan_")]


@register_table("benchmark-hull", experiments=("benchmark/geometry_hull/",))
def hull_table(records: list[dict[str, Any]]) -> Table | None:
    bench = bench_of(records, "hull")
    if bench is None:
        return None
    return _times_table(
        bench,
        "benchmark-hull",
        "Convex hull: time by method",
        bench.largest(),
        ["qhull", "geos", "opencv", "plain_filter", "x_sort_chain", "entreg_1_thread", OURS, *_scans(bench)],
        {"ratio_to_qhull": "Qhull / entreg", "ratio_to_fastest_rival": "fastest library / entreg"},
        [
            "Scan limit: one pass over the points for their extremes in eight directions, without computing a hull.",
            "OpenCV works in float32 only and gets converted points for free; see the table of exactness.",
        ],
    )


@register_table("benchmark-hull-reordered", experiments=("benchmark/geometry_hull/",))
def hull_reordered_table(records: list[dict[str, Any]]) -> Table | None:
    bench = bench_of(records, "hull")
    if bench is None:
        return None
    return _times_table(
        bench,
        "benchmark-hull-reordered",
        "Convex hull: what reordering and converting the input costs",
        bench.largest(),
        [
            "qhull",
            *(f"qhull_{order}" for order in _ORDER_LABELS),
            "geos_call_only",
            "convert_to_geos",
            "convert_to_float32",
            "entreg_float32",
            OURS,
        ],
        {},
        ["Times on reordered input include the reordering."],
    )


@register_table("benchmark-delaunay", experiments=("benchmark/geometry_delaunay/",))
def delaunay_table(records: list[dict[str, Any]]) -> Table | None:
    bench = bench_of(records, "delaunay")
    if bench is None:
        return None
    return _times_table(
        bench,
        "benchmark-delaunay",
        "Delaunay triangulation: time by method",
        bench.largest(),
        ["qhull", "shull", "shull_parallel", "triangle", "entreg_1_thread", OURS, *_scans(bench)],
        {"ratio_to_qhull": "Qhull / entreg", "ratio_to_fastest_rival": "fastest of shull, Triangle / entreg"},
        ["Triangle computes no neighbours here; the others do."],
    )


@register_table("benchmark-delaunay-reordered", experiments=("benchmark/geometry_delaunay/",))
def delaunay_reordered_table(records: list[dict[str, Any]]) -> Table | None:
    bench = bench_of(records, "delaunay")
    if bench is None:
        return None
    return _times_table(
        bench,
        "benchmark-delaunay-reordered",
        "Delaunay triangulation: reordered inputs",
        bench.largest(LARGE // 10),
        [
            method
            for library in ("qhull", "shull", "triangle")
            for method in (library, *(f"{library}_{order}" for order in _ORDER_LABELS))
        ]
        + [OURS],
        {},
        ["Times on reordered input include the reordering."],
    )


@register_table("benchmark-pareto", experiments=("benchmark/geometry_pareto/",))
def pareto_table(records: list[dict[str, Any]]) -> Table | None:
    bench = bench_of(records, "pareto")
    if bench is None:
        return None
    return _times_table(
        bench,
        "benchmark-pareto",
        "Pareto front: time by method",
        bench.largest(),
        ["numpy_lexsort", "plain_filter", "entreg_1_thread", OURS, *_scans(bench)],
        {"ratio_to_numpy_lexsort": "numpy / entreg", "ratio_to_fastest_rival": "fastest rival / entreg"},
        ["Plain exact filter: drop what the point of largest x + y dominates, then sort in numpy."],
    )


# --- ratios by size ------------------------------------------------------------------------------------------------


def _sizes_table(bench: Bench, name: str, title: str, rivals: str) -> Table:
    def cell(distribution: str, n: int) -> str:
        row = bench.get(distribution, n, OURS)
        if not row.get("ratio_to_fastest_rival"):
            return NOT_RUN
        text = f"{ratio(row['ratio_to_fastest_rival'])} {method_label(row['fastest_rival']).split(' (')[0]}"
        return f"**{text}**" if row["ratio_to_fastest_rival"] < 1.0 else text

    rows = [
        TracedRow([DISTRIBUTION_LABELS.get(d, d), *(cell(d, n) for n in bench.sizes)], bench.sources[d])
        for d in bench.distributions
    ]
    cells = [bench.get(d, n, OURS).get("ratio_to_fastest_rival") for d in bench.distributions for n in bench.sizes]
    measured = [value for value in cells if value]
    return Table(
        name,
        title,
        ["points", *(f"n = {n:,}" for n in bench.sizes)],
        rows,
        notes=[
            f"Fastest of {rivals} over entreg, and which it was; bold where entreg is slower. Not slower in "
            f"{sum(value >= 1.0 for value in measured)} of {len(measured)} cells.",
            _TIMING_NOTE,
        ],
        record_ids=bench.record_ids,
    )


def _register_sizes(problem: str, title: str, rivals: str) -> None:
    name = f"benchmark-{problem}-sizes"

    @register_table(name, experiments=(f"benchmark/geometry_{problem}/",))
    def build(records: list[dict[str, Any]]) -> Table | None:
        bench = bench_of(records, problem)
        return None if bench is None else _sizes_table(bench, name, title, rivals)


_register_sizes("hull", "Convex hull: against the fastest library, by size", "Qhull, GEOS and OpenCV")
_register_sizes("delaunay", "Delaunay triangulation: against the fastest library, by size", "shull and Triangle")
_register_sizes("pareto", "Pareto front: against the fastest rival, by size", "numpy with and without a plain filter")


# --- the first result ----------------------------------------------------------------------------------------------


@register_table("benchmark-geometry-start", experiments=("benchmark/geometry_start/",))
def start_table(records: list[dict[str, Any]]) -> Table | None:
    prefix = "benchmark/geometry_start/"
    chosen = [record for record in current_records(records) if record["experiment"].startswith(prefix)]
    rows = []
    for record in chosen:
        cells = {(row["n"], row["cache"]): row for row in record["rows"]}
        for n in sorted({row["n"] for row in record["rows"]}):
            ours = [seconds(cells[n, cache]["seconds_median"]) for cache in ("cold", "warm")]
            rival = cells[n, "none"]
            theirs = f"{seconds(rival['seconds_median'])} ({method_label(rival['method'])})"
            rows.append(TracedRow([record["config"]["problem"], f"{n:,}", *ours, theirs], [record["id"]]))
    if not rows:
        return None
    return Table(
        "benchmark-geometry-start",
        "From the start of a process to its first result",
        ["problem", "n", "kernels compiled first", "kernels compiled before", "without entreg"],
        rows,
        notes=[
            "Whole processes that import, compute once on uniform points in the unit square, and end; medians. "
            "Kernels are compiled once for a machine: by `make setup`, `python -m entreg.warm_up` or the first call."
        ],
        align="lrrrr",
        record_ids=[record["id"] for record in chosen],
    )


# --- exactness -----------------------------------------------------------------------------------------------------


@register_table("benchmark-exactness", experiments=("benchmark/geometry_",))
def exactness_table(records: list[dict[str, Any]]) -> Table | None:
    rows, used = [], []
    for problem, unit in (("hull", "vertices"), ("pareto", "points"), ("delaunay", "edges")):
        bench = bench_of(records, problem)
        if bench is None:
            continue
        used += bench.record_ids
        for method in bench.methods:
            checked = [row for row in bench.cells.values() if row["method"] == method and row["exact"] is not None]
            if not checked:
                continue
            wrong = [row for row in checked if not row["exact"]]
            worst = max(wrong, key=lambda row: row["missing"] + row["extra"], default=None)
            cells = [
                problem,
                method_label(method),
                checked[0]["dtype"],
                f"{len(checked) - len(wrong)} of {len(checked)}",
                MISSING
                if worst is None
                else f"{worst['missing']:,} {unit} missing, {worst['extra']:,} too many "
                f"({DISTRIBUTION_LABELS.get(worst['distribution'], worst['distribution'])}, n = {worst['n']:,})",
            ]
            rows.append(TracedRow(cells, bench.record_ids))
    if not rows:
        return None
    return Table(
        "benchmark-exactness",
        "Exactly right results, by method",
        ["problem", "method", "precision", "inputs exactly right", "worst case"],
        rows,
        notes=[
            "Our results are certified before anything is timed: a hull is strictly convex with no point outside, a "
            "triangulation covers the hull and is locally Delaunay at every inner edge, all in exact arithmetic; the "
            "Pareto front equals numpy's. The others are compared with ours; where cocircular points leave a choice, a "
            "different triangulation that passes the certificate counts as right. float32 methods are held to the "
            "exact result for the rounded points.",
        ],
        align="lllrl",
        record_ids=used,
    )


# --- the law -------------------------------------------------------------------------------------------------------

LAW_LABELS = {
    "sorted_runs": "sorted runs",
    "hull_fraction": "share of points on the hull",
    "clusters": "clusters in convex position",
}


def law_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The current records of the law, in the order of :data:`LAW_LABELS`."""
    chosen = [r for r in current_records(records) if r["experiment"].startswith("benchmark/entropy_law/")]
    order = list(LAW_LABELS)
    return sorted(chosen, key=lambda r: order.index(r["dataset"]["name"]))


@register_table("benchmark-entropy-law", experiments=("benchmark/entropy_law/",))
def law_table(records: list[dict[str, Any]]) -> Table | None:
    chosen = law_records(records)
    if not chosen:
        return None
    everything = [row for record in chosen for row in record["rows"]]
    largest = max(row["n"] for row in everything)
    rows = []
    for method in dict.fromkeys(row["method"] for row in everything):
        own = [row for row in everything if row["method"] == method]
        families = [family for family in LAW_LABELS if any(row["family"] == family for row in own)]
        groups = {LAW_LABELS[family]: [row for row in own if row["family"] == family] for family in families}
        if len(groups) > 1:
            groups["**all of these**"] = own
        for family, members in groups.items():
            for size, sample in (
                ("all sizes", members),
                (f"n = {largest:,}", [row for row in members if row["n"] == largest]),
            ):
                if len({row["work"] for row in sample}) < 2:
                    continue
                fit = linear_fit([row["work"] for row in sample], [row["seconds_median"] for row in sample])
                units = [1e9 * row["seconds_median"] / row["work"] for row in sample]
                entropies = [row["entropy"] for row in sample]
                cells = [
                    method_label(method),
                    family,
                    size,
                    fit.count,
                    f"{number(min(entropies))} to {number(max(entropies))}",
                    f"{number(1e9 * fit.slope)} ns",
                    seconds(fit.intercept),
                    f"{fit.r_squared:.3f}",
                    f"{number(min(units))} to {number(max(units))} ns",
                ]
                shown = {row["family"] for row in sample}
                rows.append(TracedRow(cells, (r["id"] for r in chosen if r["dataset"]["name"] in shown)))
    return Table(
        "benchmark-entropy-law",
        "Time of the convex hull against n (1 + H), one thread",
        ["algorithm", "inputs", "sizes", "count", "H, nats", "slope", "intercept", "R²", "time / (n (1 + H))"],
        rows,
        notes=[
            "H is the smaller of two upper bounds on the range-partition entropy: the partition that "
            "`entreg.entropy.hull_entropy` finds and, where it exists, the one that the input was made from.",
            "The law is about algorithms that compare: Timsort and chain, and quickhull, follow it. entreg distributes "
            "points into buckets where that beats comparing, and so falls below the line as H grows; what remains of "
            "the law for it is the bounded last column.",
            "At a single size n itself explains nothing: R² there says how far the entropy alone explains the time.",
        ],
        align="lllrrrrrr",
        record_ids=[record["id"] for record in chosen],
    )
