import io

import matplotlib
import numpy as np
import pytest

from entreg.errors import InputError
from entreg.records import figures
from entreg.records.figures import (
    METHOD_INDEX,
    PALETTE,
    embedded_fingerprint,
    fingerprint,
    method_style,
    method_styles,
    new_figure,
    render,
    style,
)


def draw(scale=1.0, title="Law", label="entreg", colour=None):
    figure, (left, right) = new_figure(1, 2)
    keywords = method_style(label) if colour is None else {"color": colour, "label": label}
    left.plot([1.0, 2.0, 3.0], [scale, 4.0, 9.0], **keywords)
    left.set_xscale("log")
    left.legend()
    left.set_title(title)
    left.annotate("here", (1.0, 1.0))
    right.scatter([1.0, 2.0], [2.0, scale])
    right.bar([1.0, 2.0], [3.0, 4.0 * scale])
    right.fill_between([1.0, 2.0], [1.0, 2.0], [2.0, 3.0], alpha=0.3)
    return figure


def test_equal_figures_give_equal_bytes():
    first, second = render(draw(), "law"), render(draw(), "law")
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    assert b"<svg" in first["svg"]
    assert not any(line.endswith(b" ") for line in first["svg"].splitlines())


def test_the_users_matplotlib_settings_do_not_matter():
    with style():
        expected = render(draw(), "law")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": "x", "axes.facecolor": "red"}):
        with style():
            figure = draw()
        assert render(figure, "law") == expected


def test_both_files_carry_the_fingerprint():
    figure = draw()
    files = render(figure, "law")
    assert embedded_fingerprint(files["png"]) == embedded_fingerprint(files["svg"]) == fingerprint(figure)
    assert embedded_fingerprint(b"another program's file") is None
    assert embedded_fingerprint(b"entreg-content:short") is None


@pytest.mark.parametrize(
    "change",
    [{"scale": 1.001}, {"title": "Lore"}, {"label": "qhull"}, {"colour": "#123456"}],
)
def test_the_fingerprint_changes_with_what_is_shown(change):
    assert fingerprint(draw(**change)) != fingerprint(draw())


def test_the_fingerprint_ignores_the_last_digits_and_drawing():
    figure = draw(scale=1.0 + 1e-12)
    before = fingerprint(figure)
    render(figure, "law")
    assert before == fingerprint(figure) == fingerprint(draw())


def test_legends_of_the_whole_figure_and_hidden_axes_count():
    figure = draw()
    before = fingerprint(figure)
    legend = figure.legend(["a", "b"], loc="outside lower center")
    assert fingerprint(figure) != before
    legend.remove()
    assert fingerprint(figure) == before
    figure.axes[1].set_visible(False)
    assert fingerprint(figure) != before


def test_images_and_gaps_count():
    def image(value):
        figure, axes = new_figure()
        axes.imshow(np.array([[0.0, value], [2.0, np.nan]]))
        return fingerprint(figure)

    assert image(1.0) == image(1.0) != image(1.5)


def test_no_time_stamp_in_the_files():
    files = render(draw(), "law")
    assert b"date" not in files["svg"].lower().replace(b"update", b"")
    assert b"tIME" not in files["png"]
    assert b"Software" not in files["png"]
    assert matplotlib.__version__.encode() not in files["svg"]


def test_png_is_readable():
    picture = matplotlib.image.imread(io.BytesIO(render(draw(), "law")["png"]))
    assert picture.shape[0] == int(4.0 * 160)
    assert picture.std() > 0.01


def test_a_method_looks_the_same_in_every_figure():
    alone = method_style("entreg")
    among = method_styles(["someone", "qhull", "entreg", "another"])
    assert among["entreg"] == alone
    assert among["qhull"]["color"] == PALETTE[METHOD_INDEX["qhull"]]
    assert len({look["color"] for look in among.values()}) == 4
    assert len({look["marker"] for look in among.values()}) == 4
    assert method_style("Qhull")["label"] == "Qhull"


def test_methods_that_share_a_colour_are_told_apart_in_one_figure():
    looks = method_styles(sorted(METHOD_INDEX))
    assert len({look["color"] for look in looks.values()}) == len(METHOD_INDEX)
    with pytest.raises(InputError, match="at most"):
        method_styles([str(index) for index in range(len(PALETTE) + 1)])


def test_palette_is_distinct():
    assert len(set(PALETTE)) == len(PALETTE) == len(figures.MARKERS) == len(set(figures.MARKERS))
