"""Figure of single scenes: what a token plan keeps after each way of training, and what the model then answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from entreg.experiments.vision.figures import method_words
from entreg.experiments.vision.tables import main_study
from entreg.records.figures import new_figure, register_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, OUTLINE = "#117733", "#C8102E", "#0072B2"
_KEPT = (0.90, 0.62, 0.0)
# How much of a hue the heaviest patch of an image gets, and how much of the picture a dropped patch keeps.
_STRONGEST, _FADED = 0.85, 0.22


@register_figure("vision-overlays", experiments=("vit/overlays",))
def overlays_figure(records: list[dict[str, Any]]) -> Figure | None:
    """A row per scene: the scene with its mask, then each method's first plan.

    Dropped patches fade; those that a partition merges have the hue of the representative that stands for them, the
    stronger the more mass they have. Numbers at the corners are the model's answers.
    """
    study = main_study([record for record in records if "overlays" in record["metrics"]])
    if study is None:
        return None
    shown = {method: study.records[method, study.seeds(method)[0]]["metrics"]["overlays"] for method in study.methods}
    firsts = {method: next(iter(found["plans"].values())) for method, found in shown.items()}
    columns = [(f"{method_words(method)}\n{_plan_words(plan)}", shown[method], plan) for method, plan in firsts.items()]
    return scenes_figure(next(iter(shown.values())), columns)


def scenes_figure(
    scenes: Mapping[str, Any], columns: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
) -> Figure:
    """A row per image: the image, then what each plan makes of it.

    Args:
        scenes: from :func:`entreg.experiments.vision.overlays.overlays`; their dense answers are shown.
        columns: title, overlays and one of their plans each.
    """
    count, width = len(scenes["image"]), 1 + len(columns)
    figure, grid = new_figure(count, width, width=2.1 * width, height=2.28 * count + 0.35, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for row in range(count):
        picture = _on_white(scenes["image"][row])
        _draw(grid[row][0], picture)
        if scenes["mask"][row] is not None:
            _outline(grid[row][0], scenes["mask"][row], scenes["grid"], picture.shape[:2])
        _answers(grid[row][0], scenes["answers"][row], scenes["labels"][row])
        for axes, (title, found, plan) in zip(grid[row][1:], columns, strict=True):
            _overlay(axes, _on_white(found["image"][row]), found["grid"], plan, row)
            _answers(axes, plan["answers"][row], found["labels"][row])
            if row == 0:
                axes.set_title(title, fontsize=10)
    grid[0][0].set_title("scene and mask\ndense model's answers", fontsize=10)
    return figure


def _plan_words(plan: Mapping[str, Any]) -> str:
    kept = len(plan["kept"][0])
    return f"{kept} patches kept" if -1 in plan["assignment"][0] else f"{kept} parts; strength: mass"


def _on_white(image: Sequence[Any]) -> np.ndarray:
    """(h, w, 3) in [0, 1]; ink of one channel is dark on white."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    return 1.0 - np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels


def _draw(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest", vmin=0.0, vmax=1.0)


def _overlay(axes: Axes, picture: np.ndarray, grid: Sequence[int], plan: Mapping[str, Any], index: int) -> None:
    """The picture under the plan, with what is left of the attention's mass or the entropy of its parts below."""
    kept, assignment = plan["kept"][index], np.asarray(plan["assignment"][index])
    mass = np.asarray(plan["mass"][index])
    size = picture.shape[:2]
    if (assignment < 0).any():
        strength = np.where(assignment < 0, _FADED, 1.0)
        faded = 1.0 - (1.0 - picture) * _enlarged(strength, grid, size)[..., None]
        tint = _enlarged(np.where(assignment < 0, 0.0, 0.3), grid, size)[..., None]
        _draw(axes, _tinted(faded, np.broadcast_to(_KEPT, picture.shape), tint))
        axes.set_xlabel(f"{100 * mass[kept].sum():.0f} % of the attention", fontsize=8, color="#444444")
        _outline(axes, kept, grid, size, color="#B07000")
        return
    hues = np.array(_hues(len(kept)))[_by_mass(assignment, mass, len(kept))]
    strength = _STRONGEST * np.sqrt(mass / mass.max())
    color = np.stack([_enlarged(hues[assignment][:, channel], grid, size) for channel in range(3)], axis=-1)
    _draw(axes, _tinted(picture, color, _enlarged(strength, grid, size)[..., None]))
    parts = np.bincount(assignment, weights=mass, minlength=len(kept))
    entropy = -sum(share * math.log(share) for share in parts if share > 0)
    axes.set_xlabel(f"exp(H) = {math.exp(entropy):.1f} of {len(kept)} parts", fontsize=8, color="#444444")


def _tinted(picture: np.ndarray, color: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Multiplying keeps the ink dark under the colour."""
    return picture * (1.0 - strength + strength * color)


def _by_mass(assignment: np.ndarray, mass: np.ndarray, count: int) -> np.ndarray:
    """Rank of each part: the heaviest get the hues that differ most."""
    order = np.argsort(-np.bincount(assignment, weights=mass, minlength=count), kind="stable")
    ranks = np.empty(count, dtype=int)
    ranks[order] = np.arange(count)
    return ranks


def _hues(count: int) -> list[tuple[float, float, float]]:
    """Strong colours; steps of the golden ratio keep the first ones far apart whatever the number is."""
    from matplotlib.colors import hsv_to_rgb

    return [tuple(hsv_to_rgb(((0.58 + place * 0.618034) % 1.0, 0.95, 0.95))) for place in range(count)]


def _enlarged(patches: np.ndarray, grid: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Values of patches as values of pixels."""
    rows, columns = grid
    return np.kron(patches.reshape(rows, columns), np.ones((size[0] // rows, size[1] // columns)))


def _outline(
    axes: Axes, patches: Sequence[int], grid: Sequence[int], size: Sequence[int], color: str = OUTLINE
) -> None:
    """Edges between patches of the set and others."""
    from matplotlib.collections import LineCollection

    rows, columns = grid
    inside = np.zeros((rows + 2, columns + 2), dtype=bool)
    inside[1:-1, 1:-1].flat[np.asarray(patches, dtype=int)] = True
    high, wide = size[0] / rows, size[1] / columns
    edges = []
    for row, column in zip(*np.nonzero(inside[:, :-1] != inside[:, 1:]), strict=True):
        edges.append([(column * wide, (row - 1) * high), (column * wide, row * high)])
    for row, column in zip(*np.nonzero(inside[:-1] != inside[1:]), strict=True):
        edges.append([((column - 1) * wide, row * high), (column * wide, row * high)])
    # Pixels' centres lie at whole numbers.
    axes.add_collection(LineCollection(np.array(edges) - 0.5, colors=color, linewidths=1.0, clip_on=False))


def _answers(axes: Axes, answers: Sequence[int], labels: Sequence[int]) -> None:
    """The answers, green where right: at the corners when there are four, else along the top."""
    corners = [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    top = [((place + 0.5) / len(answers), 1.0) for place in range(len(answers))]
    sides = {0.0: ("left", 5), 1.0: ("right", -5)}
    for (x, y), answer, label in zip(corners if len(answers) == 4 else top, answers, labels, strict=True):
        side, shift = sides.get(x, ("center", 0))
        axes.annotate(
            str(answer),
            (x, y),
            xycoords="axes fraction",
            xytext=(shift, 5 if y == 0 else -5),
            textcoords="offset points",
            ha=side,
            va="bottom" if y == 0 else "top",
            fontsize=9,
            fontweight="bold",
            color="white",
            bbox={"boxstyle": "circle,pad=0.18", "facecolor": RIGHT if answer == label else WRONG, "linewidth": 0},
        )
