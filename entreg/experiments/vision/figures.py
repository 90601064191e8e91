"""Figures of the vision experiments: accuracy under sparsity by method and by level, and error by corruption."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entreg.experiments.method_names import label
from entreg.experiments.vision.study import VisionStudy, ours_for
from entreg.experiments.vision.tables import SETTINGS, VIT, accuracy, main_study
from entreg.records.figures import PALETTE, new_figure, register_figure
from entreg.records.statistics import mean_and_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]

# Kind of training to its colour: the same in every figure here.
KINDS = {
    "neither regularised nor sparse in training": PALETTE[6],
    "regularised, sparse only when tested": PALETTE[7],
    "sparse in training": PALETTE[1],
    "ours: coupled partition in training": PALETTE[0],
}
_PLAIN, _REGULARISED, _SPARSE, _OURS = KINDS

_WORDS = {
    "loop": "sparse in the loop",
    "fuse": "the rest fused (EViT), in the loop",
    "entropy_loop": "selection entropy, in the loop",
    "ours": "ours",
    "ours_entropy": "ours with selection entropy",
}

# The last four of CIFAR-C, which never count in the mean corruption error. Not imported from entreg.data, so that
# figures are drawn without loading image libraries; a test compares the two.
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

_CURVES = {"columns": "Key columns, chosen per head", "tokens": "Patch tokens, dropped before the first layer"}


def method_words(method: str) -> str:
    """What figures call a method, without its setting's letter: ``loop_a`` is ``sparse in the loop``."""
    return _WORDS.get(_parted(method)[0]) or label(method)


def kind_of(method: str) -> str:
    """Which of :data:`KINDS` a method is; one whose name ends with a setting's letter was trained under its plan."""
    name, letter = _parted(method)
    if name == "plain":
        return _PLAIN
    if name.startswith("ours"):
        return _OURS
    return _SPARSE if letter else _REGULARISED


def _parted(method: str) -> tuple[str, str | None]:
    """The name without its setting's letter, and that letter."""
    name, _, letter = method.rpartition("_")
    return (name, letter) if name and letter.upper() in SETTINGS.values() else (method, None)


@register_figure("vision-settings", experiments=VIT)
def settings_figure(records: Records) -> Figure | None:
    """A panel per setting, a row per method: seeds, mean and 95 % interval; the plain model dense is a line."""
    study = main_study(records)
    if study is None:
        return None
    by_plan = {plan: _ranked(study, plan) for plan in SETTINGS}
    by_plan = {plan: methods for plan, methods in by_plan.items() if methods}
    if not by_plan:
        return None
    longest = max(map(len, by_plan.values()))
    figure, grid = new_figure(
        1, len(by_plan), width=0.6 + 5.6 * len(by_plan), height=1.5 + 0.3 * longest, squeeze=False
    )
    for axes, (plan, methods) in zip(grid[0], by_plan.items(), strict=True):
        for place, method in enumerate(methods):
            _seeds_and_mean(axes, place, study.values(method, plan), KINDS[kind_of(method)])
        _dense_line(axes, study)
        _method_rows(axes, methods, longest)
        axes.set_xlim(_limits(value for method in methods for value in study.values(method, plan)))
        axes.set_title(_setting_title(study, plan), loc="left", fontsize=10)
        axes.set_xlabel("test accuracy per answer, %")
    present = {kind_of(method) for methods in by_plan.values() for method in methods}
    _kind_legend(figure, [kind for kind in KINDS if kind in present])
    return figure


def _ranked(study: VisionStudy, plan: str) -> list[str]:
    """Methods measured under a setting, but those trained for another one, from the worst to the best."""
    means = {
        method: statistics.fmean(values)
        for method in study.methods
        if _parted(method)[1] in (None, plan[-1]) and (values := study.values(method, plan))
    }
    return sorted(means, key=lambda method: (means[method], method))


def _seeds_and_mean(axes: Axes, place: float, values: Sequence[float], color: str) -> None:
    """One row: dots for the seeds, a light line for the interval, an upright one for the mean, and it in words."""
    found = mean_and_interval([100 * value for value in values])
    if found.interval is not None:
        axes.plot(found.interval, [place, place], color=color, linewidth=5.0, alpha=0.25, solid_capstyle="butt")
    axes.plot([found.mean], [place], color=color, marker="|", markersize=13, markeredgewidth=2.4)
    axes.scatter([100 * value for value in values], [place] * len(values), s=20, color=color, alpha=0.7, linewidths=0)
    axes.annotate(
        f"{found.mean:.1f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=color
    )


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Axis in per cent around the seeds' values; the intervals of very few seeds may run out of it."""
    low = 100 * min(values)
    return max(0.0, low - 0.2 * (100 - low)), 100.0


def _dense_line(axes: Axes, study: VisionStudy) -> None:
    dense = accuracy(study, "plain", "dense")
    if dense is None:
        return
    axes.axvline(100 * dense.mean, color=KINDS[_PLAIN], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"plain, dense {100 * dense.mean:.1f}",
        (100 * dense.mean, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="#444444",
    )


def _method_rows(axes: Axes, methods: Sequence[str], most: int) -> None:
    """Names at the left, ours bold, room above for the dense line's words, as many rows in every panel."""
    axes.set_yticks(range(len(methods)), [method_words(method) for method in methods])
    for tick, method in zip(axes.get_yticklabels(), methods, strict=True):
        tick.set_fontweight("bold" if kind_of(method) == _OURS else "normal")
    axes.set_ylim(len(methods) - most - 0.6, len(methods) + 0.2)
    axes.grid(axis="y", color="#F0F0F0")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _setting_title(study: VisionStudy, plan: str) -> str:
    record = next(r for r in study.records.values() if any(row["plan"] == plan for row in r["rows"]))
    settings = record["config"]["evaluation"]["plans"][plan]
    sparsity = next(row["sparsity"] for row in record["rows"] if row["plan"] == plan)
    tokens = f"{settings['keep']} tokens" if settings.get("keep") is not None else "fewer tokens"
    return f"Setting {SETTINGS[plan]}: {tokens} from layer {settings['before_layer']} on, {100 * sparsity:.0f} % sparse"


def _kind_legend(figure: Figure, kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", marker="o", markersize=7, color=KINDS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


@register_figure("vision-curves", experiments=VIT)
def curves_figure(records: Records) -> Figure | None:
    """A panel per kind of plan: the plain model, the best rival and the best of ours over realised sparsity.

    Rival and ours are those of the highest mean validation accuracy over the panel's levels. The axis shows the score
    entries that are left on a logarithmic scale, so that the sparse end, where methods differ, has room.
    """
    study = main_study(records)
    if study is None:
        return None
    panels = {plan: _curve_methods(study, plan) for plan in _CURVES}
    panels = {plan: methods for plan, methods in panels.items() if methods}
    if not panels:
        return None
    figure, grid = new_figure(1, len(panels), width=4.9 * len(panels), height=4.3, squeeze=False, sharey=True)
    for axes, (plan, methods) in zip(grid[0], panels.items(), strict=True):
        for role, method in methods.items():
            _curve(axes, study, plan, role, method)
        levels = [0.0, *_levels(study, plan)]
        axes.set_xscale("log")
        axes.set_xticks([1.0 - level for level in levels], ["dense", *(f"{100 * level:.0f}" for level in levels[1:])])
        axes.xaxis.minorticks_off()
        axes.invert_xaxis()
        axes.set_title(_CURVES[plan], loc="left")
        axes.set_xlabel("realised sparsity, %")
        axes.legend(loc="lower left")
    shown = [
        (plan, level, method)
        for plan, found in panels.items()
        for level in _levels(study, plan)
        for method in found.values()
    ]
    grid[0][0].set_ylim(_limits(v for plan, level, method in shown for v in study.values(method, plan, level=level)))
    grid[0][0].set_ylabel("test accuracy per answer, %")
    return figure


def _levels(study: VisionStudy, plan: str) -> list[float]:
    return [level for level in study.levels(plan) if level is not None]


def _curve_methods(study: VisionStudy, plan: str) -> dict[str, str]:
    """Role to method: ``plain``, ``best rival`` and ``best of ours``, as far as they were measured."""
    totals = {}
    for method in study.methods:
        found = {
            split: [study.values(method, plan, level=level, split=split) for level in _levels(study, plan)]
            for split in ("validation", "test")
        }
        if found["test"] and all(map(all, found.values())):
            totals[method] = statistics.fmean(statistics.fmean(values) for values in found["validation"])
    kinds = {"plain": (_PLAIN,), "best rival": (_REGULARISED, _SPARSE), "best of ours": (_OURS,)}
    groups = {role: [m for m in totals if kind_of(m) in those] for role, those in kinds.items()}
    return {role: max(methods, key=totals.get) for role, methods in groups.items() if methods}


def _curve(axes: Axes, study: VisionStudy, plan: str, role: str, method: str) -> None:
    color, marker = {"plain": (KINDS[_PLAIN], "o"), "best rival": (KINDS[_SPARSE], "s")}.get(role, (KINDS[_OURS], "^"))
    points = [(0.0, dense)] if (dense := study.values(method, "dense")) else []
    for level in _levels(study, plan):
        realised = statistics.fmean(study.values(method, plan, "sparsity", level=level))
        points.append((realised, study.values(method, plan, level=level)))
    left = [1.0 - sparsity for sparsity, _ in points]
    estimates = [mean_and_interval([100 * value for value in values]) for _, values in points]
    letter = _parted(method)[1]
    name = method_words(method) + (f", setting {letter.upper()}" if letter else "")
    name = f"best rival: {name}" if role == "best rival" else name
    axes.plot(left, [one.mean for one in estimates], color=color, marker=marker, label=name, zorder=3)
    if all(one.interval for one in estimates):
        low, high = zip(*(one.interval for one in estimates), strict=True)
        axes.fill_between(left, low, high, color=color, alpha=0.13, linewidth=0)
    for place, (_, values) in zip(left, points, strict=True):
        axes.scatter(
            [place] * len(values), [100 * value for value in values], s=9, color=color, alpha=0.4, linewidths=0
        )


@register_figure("cifar-corruptions", experiments=("cifar/",))
def corruptions_figure(records: Records) -> Figure | None:
    """A row per corruption, the hardest for the plain model on top: the error of plain, label smoothing and ours."""
    study = main_study(records)
    if study is None:
        return None
    wanted = {"plain": "plain", "label smoothing": "label_smoothing", "ours": ours_for("robustness", study.methods)}
    errors = {name: study.errors_by_corruption(method) for name, method in wanted.items() if method in study.methods}
    errors = {name: found for name, found in errors.items() if found}
    if not errors:
        return None
    rows = _corruption_rows(next(iter(errors.values())))
    colors = {"plain": KINDS[_PLAIN], "label smoothing": PALETTE[4], "ours": KINDS[_OURS]}
    markers = {"plain": "o", "label smoothing": "s", "ours": "^"}
    figure, axes = new_figure(1, 1, width=6.8, height=1.6 + 0.26 * len(rows))
    for place, corruption in rows.items():
        here = [100 * found[corruption] for found in errors.values() if corruption in found]
        axes.plot([min(here), max(here)], [place, place], color="#CCCCCC", linewidth=2.0, zorder=1)
    for name, found in errors.items():
        places = [place for place, corruption in rows.items() if corruption in found]
        axes.scatter(
            [100 * found[rows[place]] for place in places],
            places,
            s=36,
            color=colors[name],
            marker=markers[name],
            label=name,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
        means = study.corruption_errors(wanted[name], "dense")
        if means:
            axes.axvline(
                100 * statistics.fmean(means), color=colors[name], linewidth=1.0, linestyle=(0, (4, 3)), zorder=0
            )
    axes.set_yticks(list(rows), [corruption.replace("_", " ") for corruption in rows.values()])
    for tick, corruption in zip(axes.get_yticklabels(), rows.values(), strict=True):
        tick.set_color("#888888" if corruption in EXTRA_CORRUPTIONS else "black")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("error, %, over severities and seeds (dashed: mean corruption error)")
    axes.set_title("Error by corruption, dense; grey names do not count in the mean", loc="left")
    figure.legend(loc="outside lower center", ncols=len(errors))
    return figure


def _corruption_rows(errors: Mapping[str, float]) -> dict[float, str]:
    """Height to corruption: the hardest on top, a gap, and below it those that do not count."""
    counted = sorted((name for name in errors if name not in EXTRA_CORRUPTIONS), key=errors.get)
    extra = sorted((name for name in errors if name in EXTRA_CORRUPTIONS), key=errors.get)
    places = {float(place): name for place, name in enumerate(extra)}
    start = len(extra) + 0.6 if extra else 0.0
    return places | {start + place: name for place, name in enumerate(counted)}
