"""Figure of the vision speed benchmark: measured speed-up of every plan beside what its smaller work allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entreg.experiments.vision.speed.tables import AIM, EXPERIMENT, is_bound, is_fused, plan_label, speed_settings
from entreg.records.figures import PALETTE, new_figure, register_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"ours": PALETTE[0], "rival": PALETTE[1], "bound": PALETTE[7]}
_LABELS = {"ours": "ours", "rival": "rivals", "bound": "columns that cost nothing to choose"}
_MARKS = {
    True: {"marker": "|", "markersize": 11, "color": "black", "label": "Amdahl's bound of leaving out score entries"},
    False: {
        **{"marker": "d", "markersize": 6, "color": "white", "markeredgecolor": "black"},
        "label": "if time shrank in proportion to tokens and entries",
    },
}
"""What stands beside a bar: whether it is a bound, and its look."""


@register_figure("vision-speed", experiments=(EXPERIMENT,))
def speed_figure(records: list[dict[str, Any]]) -> Figure | None:
    """A panel per setting at its headline batch: bars of measured speed-ups over dense fused, and marks."""
    settings = [one for one in speed_settings(records) if len(one.rows(one.headline_batch)) > 2][:4]
    if not settings:
        return None
    heights = [len(_bars(one)) for one in settings]
    figure, grid = new_figure(
        len(settings),
        1,
        width=8.4,
        height=0.25 * sum(heights) + 0.9 * len(settings) + 0.6,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, setting in zip(grid[:, 0], settings, strict=True):
        bars = _bars(setting)
        places = range(len(bars), 0, -1)
        axes.barh(
            list(places),
            [row["speedup_over_dense_fused"] for row in bars],
            color=[_COLOURS[row["role"]] for row in bars],
            height=0.7,
        )
        for bounds, look in _MARKS.items():
            marked = [(row["bound"], place) for row, place in zip(bars, places, strict=True) if is_bound(row) == bounds]
            if marked:
                axes.plot(*zip(*marked, strict=True), linestyle="", **look)
        axes.axvline(1.0, color="#444444", linewidth=1.0)
        axes.axvline(AIM, color="#444444", linewidth=1.0, linestyle="--")
        names = [f"{plan_label(row['method'])} ({100 * row['realised_sparsity']:.0f} %)" for row in bars]
        axes.set_yticks(list(places), names)
        axes.set_xlabel("speed-up over dense fused")
        axes.set_title(f"{setting.title}, batch {setting.headline_batch}", fontsize=10, loc="left")
        axes.grid(axis="y", visible=False)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    roles = dict.fromkeys(row["role"] for setting in settings for row in _bars(setting))
    handles = [Patch(color=_COLOURS[role], label=_LABELS[role]) for role in roles]
    kinds = {is_bound(row) for setting in settings for row in _bars(setting)}
    handles += [Line2D([], [], linestyle="", **look) for bounds, look in _MARKS.items() if bounds in kinds]
    handles.append(Line2D([], [], linestyle="--", color="#444444", label=f"the paper's {AIM}x"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _bars(setting: Any) -> list[Any]:
    """Fused rows of the headline batch that have a plan, fastest of each role first."""
    rows = [row for row in setting.rows(setting.headline_batch) if is_fused(row) and row["role"] in _COLOURS]
    order = list(_COLOURS)
    return sorted(rows, key=lambda row: (order.index(row["role"]), -row["speedup_over_dense_fused"]))
