"""Figures of the language experiments: quality against sparsity, speed against context, effective support."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entreg.experiments.language.speed.tables import SpeedCell, speed_cells
from entreg.experiments.language.study import (
    DENSE,
    LANGUAGE,
    ORACLES,
    OURS,
    PLAIN,
    SPEED,
    TRAINING,
    UNTRAINED,
    WANTED_SPARSITY,
    LanguageStudy,
    is_default,
    method_label,
    plan_label,
    quality_studies,
    training_studies,
)
from entreg.records.figures import PALETTE, new_figure, register_figure
from entreg.records.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]
Line = list[tuple[float, float]]

OURS_COLOR, GREY = PALETTE[0], PALETTE[7]
# The default plan is blue, dense models and plans that know the exact scores grey; variants of the default, and other
# plans, take these in their order.
_DEFAULT_MARKERS = ("o", "d", "H", "8")
_GREY_MARKERS = ("x", "+", "s", "^", "D", "v", "*", "p")
_NAMED = {"window": (PALETTE[1], "s"), "pooled": (PALETTE[2], "^"), "sampled": (PALETTE[4], "D")}
_VARIANTS = ((PALETTE[5], "v"), (PALETTE[8], "P"), (PALETTE[11], "X"))
_OTHERS = ((PALETTE[3], "<"), (PALETTE[9], ">"), (PALETTE[10], "p"), (PALETTE[6], "h"))
_BOUND = {"linestyle": (0, (4, 3)), "marker": "_", "markersize": 9, "markeredgewidth": 2.0, "zorder": 2}
_MOST_ROWS = 3
_KEY = 1.09  # where a line's marker stands beside its name, in widths of a panel
_LINE = 0.062  # height of a line of text, in heights of a panel
_SUPPORT_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
# Task of a quality panel: words of its axis, where the axis turns logarithmic (the project's aim), and its ticks.
_QUALITY = {
    "perplexity": ("perplexity above dense, %", 2.0, (-2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 300, 1000)),
    "copy": ("loss above dense, nats per token", 0.05, (-0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10)),
}


@register_figure("llm-quality", experiments=LANGUAGE)
def quality_figure(records: Records) -> Figure | None:
    """Perplexity and copy loss above dense against realised sparsity, a line per plan, a row per model."""
    studies = [study for study in quality_studies(records) if _quality_lines(study, "perplexity")][:_MOST_ROWS]
    if not studies:
        return None
    figure, grid = new_figure(len(studies), 2, width=11.0, height=0.4 + 3.8 * len(studies), squeeze=False)
    for axes, study in zip(grid, studies, strict=True):
        looks = _looks(study.plans())
        for panel, task in zip(axes, _QUALITY, strict=True):
            words, threshold, ticks = _QUALITY[task]
            lines = _quality_lines(study, task)
            _lines(panel, lines, looks)
            panel.axvline(100 * WANTED_SPARSITY, color="#AAAAAA", linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
            panel.axhline(0.0, color="#444444", linewidth=1.0, zorder=1)
            # Linear up to the size that is the project's aim, where methods lie close; logarithmic above.
            panel.set_yscale("symlog", linthresh=threshold, linscale=0.7)
            panel.set_ylim(*_limits([y for line in lines.values() for _, y in line], threshold))
            low, high = panel.get_ylim()
            panel.set_yticks([tick for tick in ticks if low <= tick <= high])
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.minorticks_off()
            panel.set_xlabel("realised sparsity, %")
            panel.set_ylabel(words)
            context = study.reference_context(task)
            where = ": not run" if context is None or not lines else f", {context:,} tokens"
            title = f"{study.title}{where}" if task == "perplexity" else f"copying{where}"
            panel.set_title(title, loc="left", fontsize=10)
            _label_ends(panel, lines, looks)
    return figure


def _limits(values: Sequence[float], threshold: float) -> tuple[float, float]:
    """Heights that show every value and at least the linear part."""
    return min([-0.5 * threshold, *(1.2 * value for value in values)]), max([threshold, *values]) * 1.25


def _quality_lines(study: LanguageStudy, task: str) -> dict[str, Line]:
    """Plan to points of realised sparsity and the measure (perplexity above dense in per cent, or nats)."""
    lines = {}
    for plan in study.plans():
        line = []
        for level in study.levels(plan):
            found = study.increase(study.base, task, plan, level, "loss")
            realised = study.mean(study.base, task, plan, level, "realised_sparsity")
            if found is not None and realised is not None:
                height = 100 * math.expm1(found.mean) if task == "perplexity" else found.mean
                line.append((100 * realised, height))
        if line:
            lines[plan] = sorted(line)
    return lines


@register_figure("llm-speed", experiments=(SPEED,))
def speed_figure(records: Records) -> Figure | None:
    """Speed-up over fastest dense against context: a row per model and device, prefill and decoding side by side."""
    by_title: dict[str, dict[tuple[str, int], list[SpeedCell]]] = {}
    for cell in speed_cells(records):
        if _speed_lines([cell]):
            by_title.setdefault(cell.title, {}).setdefault((cell.phase, cell.batch), []).append(cell)
    rows = {title: _panels(found) for title, found in by_title.items()}
    rows = dict(sorted(rows.items(), key=lambda item: -sum(map(len, item[1].values())))[:_MOST_ROWS])
    if not rows:
        return None
    columns = max(map(len, rows.values()))
    figure, grid = new_figure(
        len(rows), columns, width=0.8 + 4.6 * columns, height=0.5 + 3.5 * len(rows), squeeze=False
    )
    for axes, (title, panels) in zip(grid, rows.items(), strict=True):
        methods = [row["method"] for cells in panels.values() for cell in cells for row in cell.rows]
        looks = _looks(list(dict.fromkeys(methods)))
        for panel in axes[len(panels) :]:
            panel.set_visible(False)
        for panel, ((phase, batch), cells) in zip(axes, panels.items(), strict=False):
            lines = _speed_lines(cells)
            _lines(panel, lines, looks)
            for method, line in _bounds(cells).items():
                panel.plot(*zip(*line, strict=True), color=looks[method]["color"], **_BOUND)
            panel.axhline(1.0, color="#444444", linewidth=1.0, zorder=1)
            contexts = sorted({cell.context for cell in cells})
            panel.set_xscale("log", base=2)
            panel.set_xticks(contexts, [f"{one // 1024}k" if one % 1024 == 0 else str(one) for one in contexts])
            panel.minorticks_off()
            panel.set_ylim(bottom=min(0.9, panel.get_ylim()[0]))
            panel.set_xlabel("context, tokens")
            words = f"{'prefill' if phase == 'prefill' else 'decoding'}, batch {batch}"
            # The row's name runs over its panels.
            panel.set_title(f"{title if panel is axes[0] else ''}\n{words}", loc="left", fontsize=10)
            bounds = {f"{method} bound": line for method, line in _bounds(cells).items()}
            _label_ends(panel, lines | bounds, looks)
        axes[0].set_ylabel("speed-up over fastest dense")
    return figure


def _panels(found: Mapping[tuple[str, int], list[SpeedCell]]) -> dict[tuple[str, int], list[SpeedCell]]:
    """Prefill at its smallest batch, decoding at its smallest and largest."""
    wanted = [key for key in found if key[0] == "prefill"][:1]
    batches = sorted(batch for phase, batch in found if phase == "decode")
    wanted += [("decode", batch) for batch in dict.fromkeys([*batches[:1], *batches[-1:]])]
    return {key: found[key] for key in wanted}


def _speed_lines(cells: Sequence[SpeedCell]) -> dict[str, Line]:
    """Method to points of context and speed-up, without the dense model that everything is compared with."""
    lines: dict[str, Line] = {}
    for cell in cells:
        for row in cell.rows:
            if row.get("speedup_over_dense") is not None and not _is_reference(row):
                lines.setdefault(row["method"], []).append((cell.context, row["speedup_over_dense"]))
    return lines


def _is_reference(row: Mapping[str, Any]) -> bool:
    return row["role"] == "baseline" and row["speedup_over_dense"] == 1.0


def _bounds(cells: Sequence[SpeedCell]) -> dict[str, Line]:
    """Amdahl's bound of the default plan by context."""
    lines: dict[str, Line] = {}
    for cell in cells:
        row = cell.at_claimed_sparsity()
        if row is not None and row.get("bound") is not None:
            lines.setdefault(row["method"], []).append((cell.context, row["bound"]))
    return lines


@register_figure("llm-support", experiments=LANGUAGE)
def support_figure(records: Records) -> Figure | None:
    """Effective support of the dense model per layer and head, a panel per model."""
    studies = [study for study in quality_studies(records) if study.effective_support(study.base)][:_MOST_ROWS]
    if not studies:
        return None
    from matplotlib.colors import LogNorm

    found = {study: study.effective_support(study.base) for study in studies}
    tallest = max(len(layers) for layers, _ in found.values())
    widths = [max(4.2, 0.26 * len(layers[0]) + 1.8) for layers, _ in found.values()]
    figure, grid = new_figure(
        1,
        len(studies),
        width=sum(widths),
        height=1.4 + 0.19 * max(tallest, 12),
        squeeze=False,
        gridspec_kw={"width_ratios": widths},
    )
    for axes, (study, (layers, context)) in zip(grid[0], found.items(), strict=True):
        values = [value for layer in layers for value in layer]
        image = axes.imshow(layers, norm=LogNorm(max(1.0, min(values)), max(values)), cmap="viridis", aspect="auto")
        axes.grid(visible=False)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{study.title}, {context:,} tokens", loc="left", fontsize=10)
        bar = figure.colorbar(image, ax=axes, label="effective support, keys", aspect=30)
        ticks = [tick for tick in _SUPPORT_TICKS if min(values) <= tick <= max(values)]
        bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        bar.minorticks_off()
    return figure


@register_figure("llm-training", experiments=(TRAINING,))
def training_figure(records: Records) -> Figure | None:
    """Sparse perplexity by training method over that after plain steps, a panel per plan: below 1 the method helped."""
    study = next((one for one in training_studies(records) if _gains(one, OURS)), None)
    if study is None:
        return None
    plans = [plan for plan in study.plans() if _gains(study, plan)][:_MOST_ROWS]
    looks = _looks([method for method in study.methods if method not in UNTRAINED])
    figure, grid = new_figure(1, len(plans), width=0.8 + 4.8 * len(plans), height=4.2, squeeze=False, sharey=True)
    for axes, plan in zip(grid[0], plans, strict=True):
        gains = _gains(study, plan)
        axes.axhline(1.0, color="#444444", linewidth=1.0, zorder=1)
        for place, (method, found) in enumerate(gains.items()):
            # Side by side, so that intervals can be told apart.
            places = [100 * level + 0.35 * (place - (len(gains) - 1) / 2) for level in found]
            axes.plot(places, [one.mean for one in found.values()], label=method_label(method), **looks[method])
            for x, one in zip(places, found.values(), strict=True):
                if one.interval is not None:
                    axes.plot([x, x], one.interval, color=looks[method]["color"], linewidth=1.0, zorder=2)
        axes.set_xlabel("sparsity asked for, %")
        axes.set_title(plan_label(plan), loc="left", fontsize=10)
    for axes, plan in zip(grid[0], plans, strict=True):
        ends = {
            method: [(100 * level, one.mean) for level, one in found.items()]
            for method, found in _gains(study, plan).items()
        }
        _label_ends(axes, ends, looks, method_label)
    grid[0][0].set_title(f"{study.title}: {plan_label(plans[0])}", loc="left", fontsize=10)
    grid[0][0].set_ylabel("sparse perplexity over that after plain steps")
    return figure


def _gains(study: LanguageStudy, plan: str) -> dict[str, dict[float, Estimate]]:
    """Method and level to the ratio of sparse perplexities, of the methods that take steps."""
    gains = {}
    for method in study.methods:
        found = {level: study.perplexity_over(method, PLAIN, plan, level) for level in study.levels(plan)}
        found = {level: one for level, one in found.items() if one is not None}
        # The model as published differs by the steps themselves, which is not what the figure asks about.
        if found and method not in UNTRAINED:
            gains[method] = found
    return gains


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style per plan, no two alike."""
    variants, others = _with_styles(_VARIANTS), _with_styles((*_OTHERS, *_VARIANTS))
    defaults = _with_styles([(OURS_COLOR, marker) for marker in _DEFAULT_MARKERS])
    greys = _with_styles([(GREY, marker) for marker in _GREY_MARKERS])
    named = dict(_NAMED)
    looks: dict[str, dict[str, Any]] = {}
    taken: set[tuple[str, str, Any]] = set()
    for name in names:
        first = name.partition("_")[0]
        if is_default(name):
            source, widths = defaults, {"linewidth": 2.4, "zorder": 4}
        elif first in (*ORACLES, DENSE):
            source, widths = greys, {"linewidth": 1.2, "zorder": 2}
        else:
            source, widths = variants if first == OURS else others, {"linewidth": 1.4, "zorder": 3}
        own = named.pop(first, None)
        look = (*own, "-") if own is not None else next(one for one in source if one not in taken)
        taken.add(look)
        color, marker, linestyle = look
        looks[name] = {"color": color, "marker": marker, "linestyle": linestyle, **widths}
    return looks


def _with_styles(looks: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, Any]]:
    """Colours and markers with a solid line, then, for as long as it takes, with other ones."""
    for style in itertools.chain(["-"], ((0, (length, 2)) for length in itertools.count(6))):
        for color, marker in looks:
            yield color, marker, style


def _lines(axes: Axes, lines: Mapping[str, Line], looks: Mapping[str, Mapping[str, Any]]) -> None:
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), label=plan_label(name), **looks[name])


def _label_ends(
    axes: Axes,
    lines: Mapping[str, Line],
    looks: Mapping[str, Mapping[str, Any]],
    label: Callable[[str], str] = plan_label,
) -> None:
    """Names at the right of the panel, in the order of the lines' ends and joined with them, none over another."""
    from matplotlib.patches import ConnectionPatch

    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    to_axes = axes.transScale + axes.transLimits
    ends = sorted((to_axes.transform(line[-1])[1], name) for name, line in lines.items())
    places: list[float] = []
    for height, _ in ends:
        places.append(max(height, places[-1] + _LINE) if places else height)
    # What that pushed out at the top comes down again, and pushes only what is in its way.
    ceiling = 0.97
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - _LINE
    for (_, name), place in zip(ends, places, strict=True):
        method = name.removesuffix(" bound")
        color = looks[method]["color"]
        marker = looks[method]["marker"] if method == name else _BOUND["marker"]
        axes.plot([_KEY], [place], transform=axes.transAxes, clip_on=False, color=color, marker=marker)
        axes.annotate(
            label(name) if method == name else f"Amdahl's bound of {label(method)}",
            (_KEY + 0.025, place),
            xycoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=color,
            fontweight="bold" if method == name and is_default(name) else "normal",
            annotation_clip=False,
        )
        joint = ConnectionPatch(
            lines[name][-1], (_KEY - 0.015, place), "data", "axes fraction", axesA=axes, axesB=axes, color=color
        )
        joint.set(linewidth=0.6, alpha=0.6, zorder=1, in_layout=False, clip_on=False)
        axes.add_artist(joint)
