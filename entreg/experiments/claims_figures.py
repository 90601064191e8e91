"""Figure of all claims: where each of our numbers lies beside the paper's range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entreg.records.claims import (
    DAGGER,
    NOT_COMPARABLE,
    Claim,
    Rule,
    Verdict,
    judge_all,
    load_claims,
    shown_verdict,
    with_unit,
)
from entreg.records.figures import PALETTE, new_figure, register_figure
from entreg.records.formatting import NOT_RUN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAMILIES = {"geometry": "Geometry", "vision": "Vision transformers", "language": "Language models"}
_BANDS = ("not reproduced", "partly", "the paper's range", "exceeded")
_COLOURS = {"exceeded": PALETTE[2], "reproduced": PALETTE[2], "partly": PALETTE[4], "not reproduced": PALETTE[1]}
_UNDECIDED = "#666666"
_BAR = "#D9D9D9"
# Where the words of the columns end or begin; the bands lie between 0 and 4.
_CLAIM, _PAPER, _OURS, _VERDICT = -1.12, -0.1, 4.15, 5.4


@register_figure("claims")
def claims_figure(records: list[dict[str, Any]]) -> Figure | None:
    """A row per claim: the grey bar is the paper's range, the dot ours with its interval.

    Every claim is drawn on its own scale: its thresholds are the lines between the bands, and what lies beyond them is
    drawn in, so that equal distances within a row are not equal differences.
    """
    claims = load_claims()
    judged = [
        (claim, verdict)
        for claim, at in zip(claims, judge_all(claims, records), strict=True)
        if (verdict := shown_verdict(at)).verdict != NOT_RUN
    ]
    if not judged:
        return None
    places, headings = _places([claim for claim, _ in judged])
    lowest = min(places.values())
    height = 0.31 * -lowest + 1.1
    figure, axes = new_figure(width=12.4, height=height)
    # The words stand outside the axes at places in its own coordinates, which an automatic layout would chase.
    figure.set_layout_engine("none")
    axes.set_position((0.39, 0.5 / height, 0.34, 1.0 - 0.85 / height))
    for claim, verdict in judged:
        _draw(axes, claim, verdict, places[claim.id])
    for place, family in headings:
        axes.text(_CLAIM, place, _FAMILIES[family], ha="right", va="center", fontweight="bold")
    for threshold in (1, 2, 3):
        axes.axvline(threshold, color="#BBBBBB", linewidth=0.8, zorder=0)
    for across, word, side in ((_PAPER, "paper", "right"), (_OURS, "ours", "left"), (_VERDICT, "verdict", "left")):
        axes.text(across, 0.0, word, ha=side, va="center", color="#444444")
    axes.set(xlim=(-0.05, 4.1), ylim=(lowest - 0.6, 0.6), yticks=[])
    axes.set_xticks([0.5, 1.5, 2.5, 3.5], _BANDS)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    _explain(figure, judged)
    return figure


def _places(claims: list[Claim]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Heights of the rows by claim, and of the headings above each family's, from 0 downwards."""
    places, headings, height = {}, [], 0.0
    for family in _FAMILIES:
        own = [claim for claim in claims if claim.family == family]
        if not own:
            continue
        headings.append((height, family))
        for claim in own:
            height -= 1.0
            places[claim.id] = height
        height -= 1.2
    return places, headings


def _draw(axes: Axes, claim: Claim, verdict: Verdict, place: float) -> None:
    evidence, standard = verdict.evidence, claim.standards[verdict.scale]
    comparable = verdict.verdict != NOT_COMPARABLE
    axes.barh(place, 1.0, left=2.0, height=0.62, color=_BAR if comparable else "#F0F0F0", zorder=1)
    axes.text(_CLAIM, place, claim.claim, ha="right", va="center", fontsize=9)
    axes.text(_PAPER, place, claim.paper_value, ha="right", va="center", fontsize=9)
    colour = _COLOURS.get(verdict.verdict, _UNDECIDED)
    mark = f" {DAGGER}" if standard.stand_in is not None else ""
    axes.text(_OURS, place, with_unit(evidence.value, standard.unit) + mark, ha="left", va="center", fontsize=9)
    axes.text(_VERDICT, place, verdict.words, ha="left", va="center", fontsize=9, color=colour, fontweight="bold")
    if not comparable:
        return
    ends = evidence.interval
    if ends is None and evidence.noise:
        ends = (evidence.value - evidence.noise, evidence.value + evidence.noise)
    if ends is not None:
        axes.plot([position(standard.rule, end) for end in ends], [place, place], color=colour, linewidth=1.8, zorder=3)
    face = "white" if standard.stand_in is not None else colour
    dot = {"markersize": 7.5, "markerfacecolor": face, "markeredgecolor": colour, "markeredgewidth": 1.6}
    axes.plot([position(standard.rule, evidence.value)], [place], marker="o", color=colour, zorder=5, **dot)
    if evidence.control is not None:
        at = position(standard.rule, evidence.control)
        axes.plot([at], [place], marker="x", color="#222222", markersize=6, markeredgewidth=1.4, zorder=4)


def position(rule: Rule, value: float) -> float:
    """Where a value is drawn, in (0, 4): the thresholds ``partly``, ``reproduced`` and ``exceeded`` lie at 1, 2 and 3.

    Between them it is linear. Beyond them a distance d, in lengths of the neighbouring band, is drawn as d / (1 + d).
    """
    thresholds = (rule.partly, rule.reproduced, rule.exceeded)
    sign = 1.0 if rule.direction == "higher" else -1.0
    value, (first, second, third) = sign * value, (sign * one for one in thresholds)
    if value < first:
        distance = (first - value) / (second - first)
        return 1.0 - distance / (1.0 + distance)
    if value < second:
        return 1.0 + (value - first) / (second - first)
    if value <= third:
        return 2.0 + (value - second) / (third - second) if third > second else 2.0
    distance = (value - third) / ((third - second) or abs(third))
    return 3.0 + distance / (1.0 + distance)


def _explain(figure: Figure, judged: list[tuple[Claim, Verdict]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dot = {"linestyle": "", "marker": "o", "markersize": 7.5, "color": _UNDECIDED, "markeredgewidth": 1.6}
    handles = [
        Patch(color=_BAR, label="the paper's range"),
        Line2D([], [], label="ours: the paper's own quantity", **dot),
    ]
    if any(claim.standards[verdict.scale].stand_in is not None for claim, verdict in judged):
        handles.append(
            Line2D(
                [], [], label=f"ours: a stand-in ({DAGGER}), against its dense model", markerfacecolor="white", **dot
            )
        )
    if any(verdict.evidence.control is not None for _, verdict in judged):
        cross = {"linestyle": "", "marker": "x", "markersize": 6, "color": "#222222", "markeredgewidth": 1.4}
        handles.append(Line2D([], [], label="control without the method", **cross))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles))
