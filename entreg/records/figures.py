"""Figures as PNG and SVG: one style, the same colour for the same method everywhere, the same bytes every time.

Matplotlib is loaded only when a figure is drawn.
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entreg.errors import InputError
from entreg.records.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureBuilder = Callable[[list[dict[str, Any]]], "Figure | None"]

figure_registry: Registry[FigureBuilder] = Registry("figure")

# The eight colours of Okabe and Ito, which people with any common colour blindness can tell apart, and four darker
# or lighter relatives. Markers differ as well, so that the figures also survive grey print.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C8C8C",
    "#332288",
    "#882255",
    "#999933",
    "#117733",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")

# Methods that appear in several figures keep their colour and marker; others get the free ones in order.
METHOD_INDEX = {
    "entreg": 0,
    "qhull": 1,
    "geos": 2,
    "opencv": 3,
    "shull": 4,
    "triangle": 5,
    "filter": 6,
    "scan": 7,
    "entropynet rewrite": 8,
    "entropynet advise": 9,
    "dense": 7,
}

_STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    # Element ids of an SVG are hashes salted at random unless the salt is given.
    "svg.hashsalt": "entreg",
    "path.simplify": False,
}

_KEYWORD = "entreg-content:"


def register_figure(name: str, experiments: Sequence[str] = ("",)) -> Callable[[FigureBuilder], FigureBuilder]:
    """Decorator: the function draws ``results/figures/<name>.png`` and ``.svg``; see :mod:`entreg.records`.

    Args:
        name: file stem, lower case with hyphens.
        experiments: prefixes of the experiments whose records the function is given.
    """

    def sign_up(function: FigureBuilder) -> FigureBuilder:
        @functools.wraps(function)
        def in_style(records: list[dict[str, Any]]) -> "Figure | None":
            with style():
                return function(records)

        return figure_registry.register(name, experiments)(in_style)

    return sign_up


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's look inside the block, whatever the user's own matplotlib settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 4.0, **subplots: Any
) -> tuple["Figure", Any]:
    """A figure in the project's style, bound to no window system.

    Args:
        rows: axes from top to bottom.
        columns: axes from left to right.
        width: inches of the whole figure.
        height: inches of the whole figure.
        **subplots: passed on to ``Figure.subplots`` (``sharex``, ``squeeze``, ...).

    Returns:
        The figure and its axes, as ``matplotlib.pyplot.subplots`` returns them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, **subplots)


def method_style(method: str) -> dict[str, Any]:
    """Colour, marker and label of one of :data:`METHOD_INDEX`, the same in every figure; keywords for ``Axes.plot``."""
    return method_styles([method])[method]


def method_styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colours, markers and labels for the methods of one figure, no two alike.

    Args:
        methods: legend names, at most as many as there are colours. Those in :data:`METHOD_INDEX` (compared in lower
            case) keep the look they have in every figure; the others get the free ones in their order.

    Returns:
        Keywords for ``Axes.plot`` by method.

    Raises:
        InputError: more methods than colours.
    """
    if len(set(methods)) > len(PALETTE):
        raise InputError(f"A figure can tell at most {len(PALETTE)} methods apart, not {len(set(methods))}.")
    chosen: dict[str, int] = {}
    for method in methods:
        index = METHOD_INDEX.get(method.lower())
        if index is not None and index not in chosen.values():
            chosen[method] = index
    for method in methods:
        if method not in chosen:
            chosen[method] = next(index for index in range(len(PALETTE)) if index not in chosen.values())
    return {
        method: {"color": PALETTE[chosen[method]], "marker": MARKERS[chosen[method]], "label": method}
        for method in methods
    }


def fingerprint(figure: "Figure") -> str:
    """SHA-256 of what a figure shows: the data and words in its axes, not the pixels.

    Pixels and path coordinates depend on matplotlib's and its font library's version; the data do not. Numbers count
    to six significant digits, so that the last digits of a fit do not matter.
    """
    parts: list[str] = []
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        parts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()]
        parts += [_colour(text.get_color()) + text.get_text() for text in axes.texts]
        legend = axes.get_legend()
        parts += [text.get_text() for text in legend.get_texts()] if legend is not None else []
        for line in axes.lines:
            parts += [str(line.get_label()), _colour(line.get_color()), _numbers(line.get_xydata())]
        for collection in axes.collections:
            parts.append(_numbers(collection.get_offsets()))
            parts += [_numbers(path.vertices) for path in collection.get_paths()]
            parts += [_numbers(collection.get_facecolor()), _numbers(collection.get_array())]
        for patch in axes.patches:
            parts += [_numbers(patch.get_path().vertices), _numbers(patch.get_patch_transform().get_matrix())]
            parts.append(_colour(patch.get_facecolor()))
        parts += [_numbers(image.get_array()) for image in axes.images]
    parts += [text.get_text() for text in figure.texts]
    parts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return hashlib.sha256("\x1f".join(parts).encode("utf-8")).hexdigest()


def render(figure: "Figure", title: str) -> dict[str, bytes]:
    """The figure's files, equal bytes for equal figures: no dates, no random identifiers, no version strings.

    Args:
        figure: from :func:`new_figure`.
        title: written into the files' metadata.

    Returns:
        ``{"png": bytes, "svg": bytes}``; both carry the figure's fingerprint.
    """
    mark = _KEYWORD + fingerprint(figure)
    files = {}
    with style():
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="svg", metadata={"Title": title, "Keywords": [mark], "Date": None, "Creator": None}
        )
        # Editors and git dislike the trailing blanks that matplotlib leaves in path data.
        files["svg"] = b"\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + b"\n"
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Title": title, "Description": mark, "Software": None})
        files["png"] = buffer.getvalue()
    return files


def embedded_fingerprint(data: bytes) -> str | None:
    """The fingerprint that :func:`render` put into a PNG or SVG file, or None when there is none."""
    start = data.find(_KEYWORD.encode("ascii"))
    if start < 0:
        return None
    digest = data[start + len(_KEYWORD) : start + len(_KEYWORD) + 64].decode("ascii", errors="replace")
    return digest if len(digest) == 64 else None


def _numbers(values: Any) -> str:
    if values is None:
        return "none"
    array = np.ma.filled(np.ma.asarray(values, dtype=np.float64), np.nan)
    # Adding zero turns -0.0 into 0.0.
    return f"{array.shape}" + ",".join(f"{value + 0.0:.6g}" for value in array.ravel())


def _colour(value: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(value, keep_alpha=True)
