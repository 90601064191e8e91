"""Figures of the geometry experiment: speed-up against error, point sets before and after, sensitivity."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from entreg.experiments.geometry.study import (
    ADVISE,
    BASELINES,
    EXPERIMENTS,
    OURS,
    REWRITE,
    REWRITE_FREE,
    Study,
)
from entreg.experiments.geometry.tables import TITLES, distribution_label
from entreg.records.figures import PALETTE, method_styles, new_figure, register_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]

# Legend name to the methods it stands for, in the order of the legend.
_GROUPS: dict[str, tuple[str, ...]] = {
    "entropy net, rewrite": (REWRITE,),
    "the same, its own time not counted": (REWRITE_FREE,),
    "entropy net, advise": (ADVISE,),
    "entreg": (OURS,),
    "other exact methods": ("plain_filter", "shull", "triangle"),
    "reordered input": tuple(f"{b}_{o}" for b in ("qhull", "numpy_lexsort") for o in ("x_sorted", "hilbert", "kmeans")),
    "rounding, no learning": ("rounding_float32", "rounding_grid"),
    "jitter, no learning": ("jitter",),
}

# Errors at or below this are drawn left of it, a column for each group.
_SMALLEST_ERROR, _LARGEST_ERROR = 1e-5, 2.0
_COLUMN = 0.4  # width of such a column, in decades
# What a marker takes of a panel's width and height.
_MARKER_WIDTH, _MARKER_HEIGHT = 0.021, 0.022


@register_figure("geometry-net-tradeoff", experiments=EXPERIMENTS)
def tradeoff(records: Records) -> Figure | None:
    """One panel per problem: every method on every data set, error across, speed-up upwards."""
    studies = {e: Study([r for r in records if r["experiment"] == e]) for e in EXPERIMENTS}
    present = [experiment for experiment, study in studies.items() if study.sizes]
    if not present:
        return None
    from matplotlib.patches import Patch

    figure, grid = new_figure(1, len(present), width=4.9 * len(present), height=5.2, squeeze=False, sharey=True)
    styles = method_styles(list(_GROUPS))
    found = {
        experiment: {
            name: [point for method in methods for point in _points(studies[experiment], method)]
            for name, methods in _GROUPS.items()
        }
        for experiment in present
    }
    heights = [y for groups in found.values() for points in groups.values() for _, y in points]
    low, high = min([*heights, 0.5]) / 1.4, max([*heights, 5.0]) * 1.4
    left = _SMALLEST_ERROR * 10 ** (-_COLUMN * (len(_GROUPS) + 1))
    claim = Patch(color="#F0E442", alpha=0.6, linewidth=0, label="the paper's claim")
    handles: dict[str, Any] = {}
    for axes, experiment in zip(grid[0], present, strict=True):
        axes.axhline(1.0, color="#555555", linewidth=0.8)
        axes.axvline(_SMALLEST_ERROR, color="#555555", linewidth=0.8, linestyle=":")
        axes.fill_between([left, 0.002], 4.0, 5.0, color="#F0E442", alpha=0.6, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlim(left, _LARGEST_ERROR)
        axes.set_title(TITLES[experiment])
        axes.set_xlabel("Delaunay edges lost" if experiment.endswith("triangulation") else "relative area error")
        axes.set_ylabel(f"speed-up over {BASELINES[experiment]}")
        _ratio_scale(axes)
        axes.set_ylim(low, high)
        places = _side_by_side(found[experiment], left, np.log10(_LARGEST_ERROR / left), np.log10(high / low))
        for name, points in places.items():
            marks = axes.scatter(
                *np.array(points).T,
                s=30,
                color=styles[name]["color"],
                marker=styles[name]["marker"],
                linewidths=0,
                zorder=3,
            )
            handles.setdefault(name, marks)
        middle = float(np.sqrt(left * _SMALLEST_ERROR))
        axes.set_xticks([middle, 1e-4, 1e-3, 1e-2, 1e-1, 1.0], ["≤ 0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
        axes.xaxis.minorticks_off()
    figure.legend([*handles.values(), claim], [*handles, claim.get_label()], loc="outside lower center", ncols=5)
    return figure


def _side_by_side(
    groups: Mapping[str, list[tuple[float, float]]], left: float, width: float, height: float
) -> dict[str, list[tuple[float, float]]]:
    """Places of the points, none over another: what would be covered moves aside, never up or down.

    Args:
        groups: error and speed-up of each point by group. Those with hardly an error stand in their group's column.
        left: smallest error that the panel shows.
        width: decades of errors that it shows.
        height: decades of speed-ups.
    """
    across, upwards = width * _MARKER_WIDTH, height * _MARKER_HEIGHT
    taken: list[tuple[float, float]] = []
    places: dict[str, list[tuple[float, float]]] = {}
    for number, (name, points) in enumerate(groups.items()):
        for error, speedup in sorted(points, key=lambda point: (point[0] > _SMALLEST_ERROR, point[1])):
            is_exact = error <= _SMALLEST_ERROR
            column = left * 10 ** (_COLUMN * (number + 1))
            low, high = (left, _SMALLEST_ERROR) if is_exact else (_SMALLEST_ERROR, _LARGEST_ERROR)
            x, low, high = (np.log10(one) / across for one in (column if is_exact else error, low, high))
            y = np.log10(speedup) / upwards
            x = next(
                one
                for step in itertools.count(0.0, 0.25)
                for one in (x + step, x - step)
                if low + 0.6 < one < high - 0.6 and all((one - a) ** 2 + (y - b) ** 2 >= 1.0 for a, b in taken)
            )
            taken.append((x, y))
            places.setdefault(name, []).append((10 ** (x * across), speedup))
    return places


def _ratio_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if _decades(axes) < 1.5 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _decades(axes: Axes) -> float:
    low, high = axes.get_ylim()
    return float(np.log10(high / low))


def _points(study: Study, method: str) -> list[tuple[float, float]]:
    speedups = study.by_distribution(method, "speedup")
    kept = study.by_distribution(method, "edges_kept")
    errors = {name: 1.0 - value for name, value in kept.items()} or study.by_distribution(method, "area_error")
    return [(errors[name], speedups[name]) for name in sorted(speedups)]


@register_figure("geometry-net-rewriting", experiments=("geometry/hull",))
def rewriting(records: Records) -> Figure | None:
    """Some points of three data sets before and after rewriting, each with its hull."""
    from scipy.spatial import ConvexHull

    with_sample = {r["config"]["distribution"]: r for r in records if "sample_before" in r["metrics"]}
    wanted = [name for name in ("circle", "parabola", "cities", "square", "disk") if name in with_sample][:3]
    if not wanted:
        return None
    figure, grid = new_figure(1, len(wanted), width=4.2 * len(wanted), height=4.4, squeeze=False)
    for axes, name in zip(grid[0], wanted, strict=True):
        record = with_sample[name]
        before = np.array(record["metrics"]["sample_before"])
        after = np.array(record["metrics"]["sample_after"])
        steps = np.stack([before, after], axis=1)
        for start, stop in steps[:: max(1, len(steps) // 120)]:
            axes.plot(*np.stack([start, stop]).T, color="#BBBBBB", linewidth=0.6, zorder=1)
        for points, color, text in ((before, PALETTE[7], "before"), (after, PALETTE[0], "after rewriting")):
            axes.scatter(*points.T, s=6, color=color, linewidths=0, label=text, zorder=2)
            corners = points[ConvexHull(points).vertices]
            axes.plot(*np.concatenate([corners, corners[:1]]).T, color=color, linewidth=1.0, zorder=3)
        axes.set_aspect("auto" if name in ("parabola", "cities") else "equal")
        axes.set_title(f"{distribution_label(name)}: {_summary(record)}")
        axes.grid(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _summary(record: Mapping[str, Any]) -> str:
    study = Study([record])
    n = study.sizes[-1]
    name = record["config"]["distribution"]
    speedups, areas = study.values(name, n, REWRITE, "speedup"), study.values(name, n, REWRITE, "area_error")
    if not speedups:
        return "failed"
    return f"{speedups[0]:.2g}x, area off by {100 * areas[0]:.2g} %"


_FACTORS = {
    "entropy_weight": "weight of the entropy",
    "num_cells": "cells",
    "sharpness": "sharpness",
    "initialization": "initialisation",
    "hidden": "width of the network",
}


@register_figure("geometry-sensitivity", experiments=("geometry/sensitivity",))
def sensitivity(records: Records) -> Figure | None:
    """One column per factor: speed-up above, area error below; one line per data set and surrogate."""
    records = [r for r in records if "variant" in r["config"]]
    bases = {
        r["config"]["training"]["surrogate"]: r["config"]["training"]
        for r in records
        if r["config"]["variant"] in ("default", r["config"]["training"]["surrogate"])
    }
    if not bases:
        return None
    figure, grid = new_figure(2, len(_FACTORS), width=15.0, height=6.0, sharex="col", sharey="row")
    distributions = sorted({r["config"]["distribution"] for r in records})
    lines = [(s, d) for s in sorted(bases, reverse=True) for d in distributions]
    styles = method_styles([f"{s}, {distribution_label(d)}" for s, d in lines])
    for column, (factor, title) in enumerate(_FACTORS.items()):
        upper, lower = grid[0][column], grid[1][column]
        lines_here = {}
        for surrogate, distribution in lines:
            values = _along(records, bases[surrogate], factor, distribution)
            if len(values) > 1:
                lines_here[surrogate, distribution] = values
        ticks = sorted({value for values in lines_here.values() for value in values}, key=_tick_order)
        for (surrogate, distribution), values in lines_here.items():
            chosen = [v for v in ticks if v in values]
            x = [ticks.index(v) for v in chosen]
            style = styles[f"{surrogate}, {distribution_label(distribution)}"]
            if factor == "initialization":
                style = {**style, "linestyle": "none"}
                upper.margins(x=0.2)
            for axes, position in ((upper, 0), (lower, 1)):
                axes.plot(x, [np.mean(values[v][position]) for v in chosen], **style)
                axes.vlines(
                    x,
                    [min(values[v][position]) for v in chosen],
                    [max(values[v][position]) for v in chosen],
                    color=style["color"],
                    linewidth=0.8,
                )
        upper.axhline(1.0, color="#555555", linewidth=0.8)
        lower.axhline(0.2, color="#555555", linewidth=0.8)
        upper.set_title(title)
        words = any(isinstance(v, str) for v in ticks)
        lower.set_xticks(
            range(len(ticks)), [v if isinstance(v, str) else f"{v:g}" for v in ticks], rotation=30 if words else 0
        )
    _ratio_scale(grid[0][0])
    grid[0][0].set_ylabel("speed-up over Qhull")
    grid[1][0].set_yscale("symlog", linthresh=0.01)
    grid[1][0].set_yticks([0.0, 0.01, 0.1, 1.0, 10.0, 100.0], ["0", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    grid[1][0].set_ylim(bottom=-0.003)
    grid[1][0].set_ylabel("area error (line: the paper's)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _along(
    records: Records, base: Mapping[str, Any], factor: str, distribution: str
) -> dict[Any, tuple[list[float], list[float]]]:
    """Value of the factor to speed-ups and area errors (per cent) by seed, everything else as in ``base``."""
    result: dict[Any, tuple[list[float], list[float]]] = {}
    for record in records:
        config = record["config"]
        training = config["training"]
        same = all(training[key] == value for key, value in base.items() if key != factor)
        if not same or config["distribution"] != distribution:
            continue
        for row in record["rows"]:
            if row["method"] == REWRITE and row["status"] == "measured":
                speedups, errors = result.setdefault(training[factor], ([], []))
                speedups.append(row["speedup"])
                errors.append(100.0 * row["area_error"])
    return result


def _tick_order(value: Any) -> tuple[int, Any]:
    return (1, value) if isinstance(value, str) else (0, value)
