"""Every committed figure can be read: series look different, legends name what is there, no text lies over another."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text

from entreg.records import registry
from entreg.records.figures import figure_registry

registry.discover()


@pytest.fixture(scope="module")
def drawn(reference_records):
    """Name of a figure to the figure of the committed records, laid out."""
    found = {}

    def draw(name):
        if name not in found:
            entry = figure_registry.get(name)
            found[name] = entry.function(entry.select(reference_records))
            found[name].canvas.draw()
        return found[name]

    return draw


every_figure = pytest.mark.parametrize("name", [entry.name for entry in figure_registry.entries()])


def look(line):
    return to_hex(line.get_color()), line.get_marker(), str(line._dash_pattern)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


@every_figure
def test_no_two_series_of_a_panel_look_alike(drawn, name):
    for axes in panels(drawn(name)):
        series = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert len({look(line) for line in series}) == len(series)
        assert len({line.get_label() for line in series}) == len(series)
        # A line of a single point would not be seen.
        for line in series:
            points = np.isfinite(np.asarray(line.get_xydata(), dtype=float)).all(1).sum()
            assert points > 1 or line.get_marker() not in ("None", "", None)


@every_figure
def test_what_a_legend_names_is_drawn(drawn, name):
    figure = drawn(name)
    lines = [line for axes in panels(figure) for line in axes.lines]
    filled = [patch.get_facecolor() for axes in panels(figure) for patch in axes.patches]
    filled += [color for axes in panels(figure) for one in axes.collections for color in one.get_facecolor()]
    filled = {to_hex(color) for color in filled}
    for legend in [*figure.legends, *(axes.get_legend() for axes in panels(figure) if axes.get_legend())]:
        for handle in legend.legend_handles:
            if isinstance(handle, Line2D):
                color = to_hex(handle.get_color())
                same = [
                    line
                    for line in lines
                    if (to_hex(line.get_color()), line.get_marker()) == (color, handle.get_marker())
                ]
                # Points of a cloud carry their colour alone.
                assert same or color in filled
            else:
                assert to_hex(np.atleast_2d(handle.get_facecolor())[0]) in filled


@every_figure
def test_no_text_lies_over_another(drawn, name):
    figure = drawn(name)
    renderer = figure.canvas.get_renderer()
    # Hidden panels keep their texts.
    roots = [*panels(figure), *figure.legends, *figure.texts]
    texts = {text for root in roots for text in root.findobj(Text) if text.get_visible() and text.get_text().strip()}
    for axis in (axis for axes in panels(figure) for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            # What lies outside of a panel's limits is there and not drawn.
            if not low - slack <= tick.get_loc() <= high + slack:
                texts -= {tick.label1, tick.label2}
    # The boxes of slanted texts say little.
    boxes = [
        (text.get_text(), text.get_window_extent(renderer).padded(-0.5))
        for text in texts
        if text.get_rotation() % 90 == 0
    ]
    for (first, one), (second, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), f"{first!r} and {second!r}"
