"""The figure of single scenes on a record made by hand: four patches of 2 x 2 pixels."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from entreg.experiments.vision.overlay_figures import RIGHT, WRONG, overlays_figure
from entreg.records.figures import render

GREY = 102  # 0.6 on white paper


def overlay_record(method, plan, *, labels=((1, 2, 3, 4),), image=None, mask=((0, 1),)):
    found = {
        "grid": [2, 2],
        "image": [np.full((4, 4), GREY).tolist()] if image is None else image,
        "labels": [list(label) for label in labels],
        "answers": [list(label) for label in labels],
        "mask": [None if one is None else list(one) for one in mask],
        "plans": {"setting_a": plan},
    }
    return {
        "id": f"vit/overlays-{method}",
        "experiment": "vit/overlays",
        "scale": "offline",
        "utc": "2026-01-01T00:00:00Z",
        "seed": 0,
        "config": {"method": method},
        "metrics": {"overlays": found},
        "rows": [],
    }


DROP = {"kept": [[0, 3]], "assignment": [[0, -1, -1, 1]], "mass": [[0.4, 0.1, 0.2, 0.3]], "answers": [[1, 2, 3, 9]]}
PARTS = {"kept": [[3, 1]], "assignment": [[1, 1, 0, 0]], "mass": [[0.05, 0.2, 0.25, 0.5]], "answers": [[1, 2, 3, 4]]}


def pixels(axes):
    return np.asarray(axes.images[0].get_array())


def answers(axes):
    return [(text.get_text(), to_hex(text.get_bbox_patch().get_facecolor()).upper()) for text in axes.texts]


def test_dropped_patches_fade_and_the_share_of_the_attention_is_told():
    scene, kept = overlays_figure([overlay_record("loop_a", DROP)]).axes
    assert pixels(scene) == pytest.approx(np.full((4, 4, 3), 0.6))
    shown = pixels(kept)
    for row, column in ((0, 2), (2, 0)):
        assert shown[row : row + 2, column : column + 2] == pytest.approx(1 - 0.22 * 0.4)
    assert (shown[:2, :2] < 0.65).all()
    assert np.array_equal(shown[:2, :2], shown[2:, 2:])
    assert kept.get_xlabel() == "70 % of the attention"
    assert kept.get_title() == "sparse in the loop\n2 patches kept"
    assert [word for word, _ in answers(kept)] == ["1", "2", "3", "9"]
    assert [color for _, color in answers(kept)] == [RIGHT] * 3 + [WRONG.upper()]
    assert [color for _, color in answers(scene)] == [RIGHT] * 4


def test_the_mask_is_outlined_without_inner_edges():
    scene, _ = overlays_figure([overlay_record("plain", DROP)]).axes
    edges = {tuple(map(tuple, path.vertices)) for path in scene.collections[0].get_paths()}
    # The upper half of the picture, whose pixels have their centres at 0 to 3.
    low, middle, high = -0.5, 1.5, 3.5
    upright = {((x, low), (x, middle)) for x in (low, high)}
    level = {((x, y), (x + 2, y)) for x in (low, middle) for y in (low, middle)}
    assert edges == upright | level


def test_parts_share_a_hue_whose_strength_is_the_mass():
    _, axes = overlays_figure([overlay_record("ours_a", PARTS)]).axes
    shown = pixels(axes)
    patches = np.array([shown[0, 0], shown[0, 2], shown[2, 0], shown[2, 2]])
    # What was multiplied away, of each colour: in proportion within a part, and to the root of the mass.
    taken = 1.0 - patches / 0.6
    mass = PARTS["mass"][0]
    assert taken[0] / np.sqrt(mass[0]) == pytest.approx(taken[1] / np.sqrt(mass[1]))
    assert taken[2] / np.sqrt(mass[2]) == pytest.approx(taken[3] / np.sqrt(mass[3]))
    assert np.argmax(taken[0]) != np.argmax(taken[2])
    # Parts of mass 1/4 and 3/4: exp(H) = 4 / 3^(3/4).
    assert axes.get_xlabel() == f"exp(H) = {4 / 3**0.75:.1f} of 2 parts"
    assert axes.get_title() == "ours\n2 parts; strength: mass"


def test_columns_stand_in_the_order_of_the_study_and_a_single_answer_in_the_middle():
    records = [
        overlay_record(method, {**plan, "answers": [[1]]}, labels=((2,),), mask=(None,))
        for method, plan in (("ours_a", PARTS), ("plain", DROP))
    ]
    figure = overlays_figure(records)
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes]
    assert titles == ["scene and mask", "plain", "ours"]
    assert answers(figure.axes[1]) == [("1", WRONG.upper())]
    assert not figure.axes[0].collections
    assert render(figure, "vision-overlays")["png"].startswith(b"\x89PNG")


def test_pictures_in_colour_are_shown_as_they_are():
    image = [np.arange(48).reshape(4, 4, 3).tolist()]
    scene = overlays_figure([overlay_record("plain", DROP, image=image)]).axes[0]
    assert pixels(scene) == pytest.approx(np.arange(48).reshape(4, 4, 3) / 255)


def test_no_figure_without_overlays():
    assert overlays_figure([{**overlay_record("plain", DROP), "metrics": {}}]) is None
