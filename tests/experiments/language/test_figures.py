"""Figures of the language experiments on records made by hand: what is drawn is what the records say."""

import math

import numpy as np
import pytest

from entreg.experiments.language.figures import quality_figure, speed_figure, support_figure, training_figure
from entreg.records.figures import render
from tests.experiments.language.samples import language_record, speed_record, text, timed


def words(axes):
    return [one.get_text() for one in axes.texts]


def line_of(axes, label):
    return next(line.get_xydata() for line in axes.lines if line.get_label() == label)


def quality_records(**changed):
    rows = [text("dense", 0.0, [2.0, 3.0]), text("dense", 0.0, [0.2], task="copy", context=2049)]
    for plan, factor in (("ours", 1.01), ("window", 1.04), ("oracle", 1.02)):
        for level in (0.9, 0.75):
            more = math.log(factor) + (level == 0.9) * 0.1
            rows.append(text(plan, level, [2.0 + more, 3.0 + more], realised=level + 0.01))
    rows += [text("window", level, [0.2 + 3 * level], task="copy", context=2049) for level in (0.75, 0.9)]
    return [language_record(rows, **changed)]


def test_quality_shows_every_plan_at_its_realised_sparsity():
    figure = quality_figure(quality_records())
    perplexity, copying = figure.axes
    expected = [(76.0, 1.0), (91.0, 100 * (1.01 * math.exp(0.1) - 1))]
    assert line_of(perplexity, "ours") == pytest.approx(np.array(expected))
    window = line_of(copying, "sink + window (StreamingLLM)")
    assert window == pytest.approx(np.array([(75.0, 2.25), (90.0, 2.7)]))
    assert set(words(perplexity)) == {"ours", "sink + window (StreamingLLM)", "best blocks (oracle)"}
    assert words(copying) == ["sink + window (StreamingLLM)"]
    assert perplexity.get_title(loc="left") == "SmolLM2-135M, offline, 2,048 tokens"
    assert copying.get_title(loc="left") == "copying, 2,049 tokens"
    low, high = perplexity.get_ylim()
    assert low < 0 < 12 < high
    assert render(figure, "llm-quality")["png"].startswith(b"\x89PNG")


def test_labels_do_not_overlap():
    rows = [text("dense", 0.0, [2.0]), *(text(f"pooled_{size}", 0.75, [2.01]) for size in (8, 16, 32, 64, 128))]
    panel = quality_figure([language_record(rows)]).axes[0]
    places = sorted(one.xyann[1] for one in panel.texts)
    assert len(places) == 5
    assert min(np.diff(places)) > 0.06
    assert places[-1] < 1.0
    colors = {line.get_color() for line in panel.lines if len(line.get_label()) > 6 and "blocks" in line.get_label()}
    assert len(colors) == 5


def test_models_and_scales_have_rows_of_their_own_and_no_copy_test_is_said():
    bare = [text("dense", 0.0, [2.0]), text("ours", 0.75, [2.1])]
    figure = quality_figure([*quality_records(), language_record(bare, scale="paper")])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "SmolLM2-135M, paper, 2,048 tokens",
        "copying: not run",
        "SmolLM2-135M, offline, 2,048 tokens",
        "copying, 2,049 tokens",
    ]


def speed_records(**changed):
    rows = []
    for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 8)):
        for context in (1024, 512):
            where = {"phase": phase, "batch": batch, "context": context}
            rows += [
                timed("dense", 1.0, role="baseline", **where),
                timed("ours", 1.0 / (context / 512), bound=context / 256, **where),
                timed("window", 0.4, role="rival", **where),
            ]
    return speed_record(rows, **changed)


def test_speed_by_context_with_the_bound_and_without_the_dense_line():
    figure = speed_figure([speed_records()])
    assert [axes.get_title(loc="left").split("\n")[1] for axes in figure.axes] == [
        *("prefill, batch 1", "decoding, batch 1", "decoding, batch 8")
    ]
    prefill = figure.axes[0]
    assert prefill.get_title(loc="left").startswith("SmolLM2-135M, bfloat16, CPU, 2 thread(s), offline\n")
    assert line_of(prefill, "ours").tolist() == [[512, 1.0], [1024, 2.0]]
    assert line_of(prefill, "sink + window (StreamingLLM)").tolist() == [[512, 2.5], [1024, 2.5]]
    assert any(line.get_xydata().tolist() == [[512, 2.0], [1024, 4.0]] for line in prefill.lines)
    assert set(words(prefill)) == {"ours", "sink + window (StreamingLLM)", "Amdahl's bound of ours"}
    assert [tick.get_text() for tick in prefill.get_xticklabels()] == ["512", "1k"]
    assert render(figure, "llm-speed")["png"].startswith(b"\x89PNG")


def test_settings_of_speed_are_never_in_one_panel():
    other = speed_records(scale="paper", weights="random", gpu="NVIDIA H100", number=1)
    figure = speed_figure([speed_records(), other])
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes[::3]]
    assert titles == [
        "SmolLM2-135M, random weights: speed only, bfloat16, NVIDIA H100, paper",
        "SmolLM2-135M, bfloat16, CPU, 2 thread(s), offline",
    ]


def test_speed_of_prefill_alone_and_without_bounds():
    record = speed_record([timed("ours", 0.5, bound=None), timed("ours", 0.5, context=1000, speedup_over_dense=None)])
    (axes,) = speed_figure([record]).axes
    assert line_of(axes, "ours").tolist() == [[4096, 2.0]]
    assert words(axes) == ["ours"]


def test_support_is_a_map_of_layers_and_heads():
    support = {"row": [[100.0, 300.0, 200.0], [10.0, 12.0, 15.0]], "context": 512}
    figure = support_figure([language_record([], effective_support=support)])
    axes = figure.axes[0]
    assert np.asarray(axes.images[0].get_array()).tolist() == support["row"]
    assert axes.get_title(loc="left") == "SmolLM2-135M, offline, 512 tokens"
    assert render(figure, "llm-support")["png"].startswith(b"\x89PNG")


def test_a_support_that_is_the_same_everywhere_is_drawn():
    support = {"row": [[1.0, 1.0]], "context": 512}
    assert render(support_figure([language_record([], effective_support=support)]), "llm-support")


def test_training_shows_ratios_to_plain_steps():
    losses = {"none": 3.5, "plain": 3.0, "row_entropy": 2.9}
    records = [
        language_record(
            [text("dense", 0.0, [2.0]), *(text("ours", level, [loss + seed * level]) for level in (0.75, 0.9))],
            method,
            seed,
            experiment="llm/training",
        )
        for method, loss in losses.items()
        for seed in (0, 1)
    ]
    figure = training_figure(records)
    (axes,) = figure.axes
    assert line_of(axes, "row entropy") == pytest.approx(np.array([(75, math.exp(-0.1)), (90, math.exp(-0.1))]))
    assert words(axes) == ["row entropy"]
    assert axes.get_title(loc="left") == "SmolLM2-135M, offline: ours"
    assert training_figure(records[:4]) is None


def test_no_figure_without_what_it_shows():
    assert quality_figure([language_record([text("dense", 0.0, [1.0])])]) is None
    assert support_figure([language_record([])]) is None
    assert speed_figure([speed_record([timed("dense", 1.0, role="baseline")])]) is None
    assert training_figure([]) is None
