"""Figures of the vision experiments on records made by hand: what is drawn is what the records say."""

import numpy as np
import pytest

from entreg.data.corruptions import EXTRA_CORRUPTIONS as EXTRA_OF_THE_DATA
from entreg.experiments.vision.figures import (
    EXTRA_CORRUPTIONS,
    KINDS,
    corruptions_figure,
    curves_figure,
    kind_of,
    method_words,
    settings_figure,
)
from entreg.records.figures import render
from entreg.records.statistics import mean_and_interval

PLANS = {
    "setting_a": {"kind": "tokens", "keep": 14, "before_layer": 1},
    "setting_b": {"kind": "tokens", "sparsity": 0.9, "before_layer": 0},
}
DENSE = (0.95, 0.97, 0.96)
# Test accuracy in setting A by seed.
SETTING_A = {
    "plain": (0.40, 0.44, 0.42),
    "key_entropy": (0.5, 0.5, 0.5),
    "loop_a": (0.90, 0.91, 0.92),
    "ours_a": (0.93, 0.94, 0.95),
    "loop_b": (0.1, 0.1, 0.1),
}


def row(plan, split, top1, *, score="mixed", level=None, reduction="drop", sparsity=0.8):
    fields = {"plan": plan, "level": level, "reduction": reduction, "score": score, "sparsity": sparsity}
    return {**fields, "split": split, "top1": top1}


def record(method, seed, rows, experiment="vit/digit_scenes", metrics=()):
    return {
        "id": f"{experiment}-{method}-{seed}",
        "experiment": experiment,
        "scale": "offline",
        "utc": "2026-01-01T00:00:00Z",
        "seed": seed,
        "config": {"method": method, "evaluation": {"plans": PLANS}},
        "metrics": dict(metrics),
        "rows": rows,
    }


def setting_records():
    records = []
    for method, values in SETTING_A.items():
        for seed, value in enumerate(values):
            rows = [row("dense", split, DENSE[seed], score=None, reduction=None) for split in ("validation", "test")]
            # What is best on validation is not what would be best on the test images.
            rows += [row("setting_a", "validation", 0.9), row("setting_a", "validation", 0.3, score="received")]
            rows += [row("setting_a", "test", value), row("setting_a", "test", 0.99, score="received")]
            records.append(record(method, seed, rows))
    return records


def curve_records():
    """``tempting`` is the best rival on test, ``l1_gate`` on validation."""
    validation = {"plain": 0.5, "l1_gate": 0.7, "tempting": 0.6, "ours_a": 0.8, "ours_b": 0.6}
    test = {"plain": 0.4, "l1_gate": 0.5, "tempting": 0.9, "ours_a": 0.75, "ours_b": 0.9}
    records = []
    for method, value in validation.items():
        rows = [row("dense", split, 0.96, score=None, sparsity=0.0) for split in ("validation", "test")]
        for level in (0.5, 0.9):
            for split, found in (("validation", value), ("test", test[method])):
                rows.append(row("tokens", split, found - 0.1 * level, level=level, sparsity=level + 0.01))
        records.append(record(method, 0, rows))
    return records


def corruption_records():
    records = []
    for method, shift in (("plain", 0.1), ("label_smoothing", 0.05), ("ours", 0.0), ("ball", 0.3)):
        for seed in range(2):
            rows = [
                {"plan": "robustness", "split": "test", "setting": setting, "corruption": name, "severity": severity}
                | {"error": error + shift + 0.01 * severity + 0.02 * seed + (setting == "sparse")}
                for name, error in (("fog", 0.2), ("snow", 0.4), ("jpeg", 0.3), ("spatter", 0.9))
                for severity in (1, 3)
                for setting in ("dense", "sparse")
            ]
            mean = {"mce_dense": 0.3 + shift + 0.02 * seed}
            records.append(record(method, seed, rows, "cifar/digits", mean))
    return records


def words(axes):
    return [text.get_text() for text in axes.texts]


def dots(axes):
    """Height to the horizontal places of the dots there."""
    found = {}
    for collection in axes.collections:
        for x, y in np.asarray(collection.get_offsets()):
            found.setdefault(float(y), []).append(float(x))
    return found


def test_settings_shows_every_seed_of_every_method_of_the_setting_worst_first():
    figure = settings_figure(setting_records())
    (axes,) = figure.axes
    order = ["plain", "key_entropy", "loop_a", "ours_a"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [method_words(method) for method in order]
    assert [tick.get_fontweight() for tick in axes.get_yticklabels()] == ["normal"] * 3 + ["bold"]
    for place, method in enumerate(order):
        assert dots(axes)[place] == pytest.approx([100 * value for value in SETTING_A[method]])
        assert f"{100 * np.mean(SETTING_A[method]):.1f}" in words(axes)
    assert "plain, dense 96.0" in words(axes)
    lines = [line.get_xydata() for line in axes.lines]
    assert any(np.allclose(line[:, 0], 96.0) for line in lines)
    interval = mean_and_interval([100 * value for value in SETTING_A["plain"]]).interval
    assert any(line.shape == (2, 2) and np.allclose(line, [(interval[0], 0), (interval[1], 0)]) for line in lines)
    assert axes.get_title(loc="left") == "Setting A: 14 tokens from layer 1 on, 80 % sparse"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == list(KINDS)
    assert render(figure, "vision-settings")["png"].startswith(b"\x89PNG")


def test_a_setting_given_by_sparsity_has_its_own_panel_and_one_seed_no_interval():
    rows = [row("setting_b", split, 0.7, sparsity=0.912) for split in ("validation", "test")]
    figure = settings_figure([record("plain", 0, rows)])
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Setting B: fewer tokens from layer 0 on, 91 % sparse"
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[70.0, 0.0]]]


def test_kinds_and_words_follow_from_the_names():
    names = ["plain", "l1_gate", "loop_b", "ours_entropy_a", "ours"]
    assert [list(KINDS).index(kind_of(name)) for name in names] == [0, 1, 2, 3, 3]
    assert [method_words(name) for name in ("loop_a", "row_entropy")] == ["sparse in the loop", "row entropy"]


def test_curves_choose_rival_and_ours_on_validation():
    (axes,) = curves_figure(curve_records()).axes
    labels = ["plain", "best rival: L1 gate", "ours, setting A"]
    assert [line.get_label() for line in axes.lines] == labels
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    for line, value in zip(axes.lines, (0.4, 0.5, 0.75), strict=True):
        expected = [(1.0, 96.0), (0.49, 100 * value - 5), (0.09, 100 * value - 9)]
        assert line.get_xydata() == pytest.approx(np.array(expected))
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["dense", "50", "90"]


def test_corruptions_are_ordered_by_the_plain_model_and_those_that_do_not_count_stand_apart():
    (axes,) = corruptions_figure(corruption_records()).axes
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["spatter", "fog", "jpeg", "snow"]
    places = list(axes.get_yticks())
    assert places[1] - places[0] > places[2] - places[1]
    # Mean over severities 1 and 3 is 0.02, over the seeds 0.01; plain, label smoothing, ours.
    for place, error in zip(places, (90, 20, 30, 40), strict=True):
        assert dots(axes)[place] == pytest.approx([error + 13, error + 8, error + 3])
    means = [line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]]
    assert means == pytest.approx([41, 36, 31])


def test_a_curve_needs_both_splits_and_every_level():
    records = curve_records()
    for one, split in zip(records[1:3], ("validation", "test"), strict=True):
        one["rows"] = [r for r in one["rows"] if r["split"] != split or r["level"] != 0.9]
    (axes,) = curves_figure(records).axes
    assert [line.get_label() for line in axes.lines] == ["plain", "ours, setting A"]


def test_no_figure_without_what_it_shows():
    bare = [record("plain", 0, [row("dense", "test", 0.9)])]
    assert settings_figure(bare) is None
    assert curves_figure(bare) is None
    assert corruptions_figure([record("plain", 0, [], "cifar/digits")]) is None


def test_the_corruptions_that_do_not_count_are_those_of_the_data():
    assert EXTRA_CORRUPTIONS == EXTRA_OF_THE_DATA
