"""Figures of the geometry benchmarks: speed-up over Qhull by size, and time against n (1 + H)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entreg.experiments.geometry.speed.tables import (
    DISTRIBUTION_LABELS,
    LAW_LABELS,
    Bench,
    bench_of,
    law_records,
    method_label,
)
from entreg.records.figures import MARKERS, PALETTE, method_style, new_figure, register_figure
from entreg.records.statistics import linear_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Methods whose key differs from the name under which the figures' common style knows them.
_STYLE_NAMES = {"plain_filter": "filter", "numpy_lexsort": "qhull", "shull_parallel": "geos"}


def _style(method: str) -> dict[str, Any]:
    style = method_style(_STYLE_NAMES.get(method, method))
    return {**style, "label": method_label(method)}


def _speedup_figure(bench: Bench, baseline: str, methods: Sequence[str], title: str) -> "Figure":
    """Small multiples, one per distribution: baseline's time over each method's, by size."""
    columns = min(4, len(bench.distributions))
    lines = math.ceil(len(bench.distributions) / columns)
    figure, grid = new_figure(
        lines, columns, width=2.7 * columns, height=2.4 * lines + 0.9, sharex=True, sharey=True, squeeze=False
    )
    panels: list[Axes] = list(grid.ravel())
    for axes, distribution in zip(panels, bench.distributions, strict=False):
        for method in methods:
            found = [
                (n, bench.median(distribution, n, baseline), bench.median(distribution, n, method)) for n in bench.sizes
            ]
            measured = [(n, theirs / own) for n, theirs, own in found if theirs and own]
            if measured:
                axes.plot(*zip(*measured, strict=True), **_style(method))
        axes.axhline(1.0, color="#444444", linewidth=1.0, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(DISTRIBUTION_LABELS.get(distribution, distribution))
    for axes in panels[len(bench.distributions) :]:
        axes.set_visible(False)
    # Shared axes label the bottom row only; above a hidden panel the lowest visible one must do it.
    for column in grid.T:
        lowest = [axes for axes in column if axes.get_visible()][-1]
        lowest.set_xlabel("points n")
        lowest.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title, fontsize=12)
    return figure


@register_figure("benchmark-hull", experiments=("benchmark/geometry_hull/",))
def hull_figure(records: list[dict[str, Any]]) -> "Figure | None":
    """A panel per distribution: Qhull's time over each method's, by size."""
    bench = bench_of(records, "hull")
    if bench is None:
        return None
    methods = ["entreg", "plain_filter", "geos", "opencv"]
    return _speedup_figure(bench, "qhull", methods, "Convex hull: speed-up over Qhull (dashed: Qhull)")


@register_figure("benchmark-delaunay", experiments=("benchmark/geometry_delaunay/",))
def delaunay_figure(records: list[dict[str, Any]]) -> "Figure | None":
    """A panel per distribution: Qhull's time over each method's, by size."""
    bench = bench_of(records, "delaunay")
    if bench is None:
        return None
    methods = ["entreg", "shull", "shull_parallel", "triangle"]
    return _speedup_figure(bench, "qhull", methods, "Delaunay triangulation: speed-up over Qhull (dashed: Qhull)")


@register_figure("benchmark-pareto", experiments=("benchmark/geometry_pareto/",))
def pareto_figure(records: list[dict[str, Any]]) -> "Figure | None":
    """A panel per distribution: numpy's time over each method's, by size."""
    bench = bench_of(records, "pareto")
    if bench is None:
        return None
    methods = ["entreg", "plain_filter"]
    title = "Pareto front: speed-up over numpy's sort (dashed: numpy)"
    return _speedup_figure(bench, "numpy_lexsort", methods, title)


@register_figure("benchmark-entropy-law", experiments=("benchmark/entropy_law/",))
def law_figure(records: list[dict[str, Any]]) -> "Figure | None":
    """Algorithms that compare on the left, ours on the right: a marker per input, a line fitted per family."""
    chosen = law_records(records)
    if not chosen:
        return None
    rows = [row for record in chosen for row in record["rows"]]
    largest = max(row["n"] for row in rows)
    figure, (left, right) = new_figure(1, 2, width=10.0, height=4.4)
    titles = {left: "algorithms that compare", right: "entreg"}
    for axes, title in titles.items():
        for position, (family, label) in enumerate(LAW_LABELS.items()):
            sample = [
                row
                for row in rows
                if row["family"] == family and row["n"] == largest and (row["method"] == "entreg") == (axes is right)
            ]
            if not sample:
                continue
            work = np.array([row["work"] / 1e6 for row in sample])
            milliseconds = np.array([1e3 * row["seconds_median"] for row in sample])
            name = label if axes is right else f"{label}: {method_label(sample[0]['method'])}"
            style = {"color": PALETTE[position], "marker": MARKERS[position], "linestyle": "none"}
            if len(sample) > 1 and np.ptp(work) > 0:
                fit = linear_fit(work, milliseconds)
                ends = np.array([work.min(), work.max()])
                axes.plot(ends, fit.intercept + fit.slope * ends, color=PALETTE[position], linewidth=1.2)
                name += f", R² = {fit.r_squared:.3f}"
            axes.plot(work, milliseconds, label=name, **style)
        axes.set(xlabel="n (1 + H), millions", ylabel="time, ms", title=title)
        axes.set_xlim(left=0)
        # Head room for the legend.
        axes.set_ylim(0, 1.45 * axes.get_ylim()[1])
        axes.legend(loc="upper left")
    figure.suptitle(f"Convex hull of {largest:,} points, one thread: time against n (1 + H)", fontsize=12)
    return figure
