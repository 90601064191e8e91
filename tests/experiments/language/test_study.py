"""Pairing per window and seed, choices on validation and what is never mixed, on records known by hand."""

import math

import pytest

from entreg.experiments.language.study import (
    LanguageStudy,
    is_default,
    method_label,
    model_label,
    plan_label,
    quality_studies,
    training_studies,
    where,
)
from tests.experiments.language.samples import language_record, needle, speed_record, summary, text

DENSE = [2.0, 3.0, 4.0]
SPARSE = [2.1, 3.2, 4.3]
# Differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t quantile with two degrees of freedom 4.30265.
HALF = 4.302653 * 0.1 / math.sqrt(3)


def study(*rows, **changed):
    return LanguageStudy([language_record(list(rows), **changed)])


def test_losses_are_paired_by_window():
    found = study(text("dense", 0.0, DENSE), text("ours", 0.75, SPARSE)).increase(
        "none", "perplexity", "ours", 0.75, "loss"
    )
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - HALF, 0.2 + HALF), abs=1e-6)
    assert found.count == 3


def test_the_ratio_of_perplexities_is_the_exponential_of_the_difference():
    found = study(text("dense", 0.0, DENSE), text("ours", 0.75, SPARSE)).perplexity_ratio("none", "ours", 0.75)
    assert found.mean == pytest.approx(math.exp(3.2) / math.exp(3.0))
    assert found.interval == pytest.approx((math.exp(0.2 - HALF), math.exp(0.2 + HALF)), abs=1e-6)


def test_windows_of_several_seeds_are_one_sample_each():
    records = [
        language_record(
            [text("dense", 0.0, DENSE), text("ours", 0.75, [d + x for d, x in zip(DENSE, more, strict=True)])],
            seed=seed,
        )
        for seed, more in enumerate(([0.0, 0.2, 0.4], [0.2, 0.2, 0.2]))
    ]
    found = LanguageStudy(records).increase("none", "perplexity", "ours", 0.75, "loss")
    assert found.count == 3
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - HALF, 0.2 + HALF), abs=1e-6)


def test_without_losses_of_windows_there_is_no_interval():
    bare = {key: value for key, value in text("ours", 0.75, SPARSE).items() if key != "loss_per_item"}
    found = study(text("dense", 0.0, DENSE), bare).perplexity_ratio("none", "ours", 0.75)
    assert found.mean == pytest.approx(math.exp(0.2))
    assert found.interval is None


def test_the_mean_is_that_of_the_tokens_where_windows_differ_in_length():
    # As with a stride: the first window counts more tokens, so the row's loss is not the plain mean of the windows'.
    sparse = {**text("ours", 0.75, SPARSE), "loss": 3.25}
    found = study({**text("dense", 0.0, DENSE), "loss": 3.0}, sparse).increase(
        "none", "perplexity", "ours", 0.75, "loss"
    )
    assert found.mean == pytest.approx(0.25)
    assert found.interval == pytest.approx((0.25 - HALF, 0.25 + HALF), abs=1e-6)


def test_a_drop_of_rouge_is_paired_by_article():
    rows = [
        summary("dense", 0.0, 20.0, rouge_l_per_item=[10.0, 20.0, 30.0]),
        summary("ours", 0.75, 19.8, rouge_l_per_item=[9.9, 19.8, 29.7]),
    ]
    found = study(*rows).drop("none", "summary", "ours", 0.75, "rouge_l")
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - HALF, 0.2 + HALF), abs=1e-6)


def test_missing_measures_are_none_and_never_an_error():
    found = study(text("ours", 0.75, SPARSE))
    assert found.perplexity_ratio("none", "ours", 0.75) is None
    assert found.drop("none", "needle", "ours", 0.75, "accuracy") is None
    assert found.mean("none", "copy", "ours", 0.75, "loss") is None
    assert found.perplexity_over("none", "plain", "ours", 0.75) is None
    assert found.nearest_level("window") is None
    assert found.effective_support("none") is None
    assert found.best_plan("none", ["window"]) is None
    assert found.seeds("plain") == []


def test_plans_levels_and_contexts():
    rows = [
        text("dense", 0.0, DENSE),
        text("window", 0.9, DENSE),
        text("window", 0.6, DENSE),
        text("ours", 0.7, DENSE, context=1024),
        text("ours", 0.8, DENSE, context=4096),
        needle("ours", 0.7, 1.0, context=1024),
        text("ours", 0.8, DENSE, context=8192, split="validation"),
    ]
    found = study(*rows)
    assert found.plans() == ["ours", "window"]
    assert found.levels("window") == [0.6, 0.9]
    # Both 0.05 away: the sparser one.
    assert found.nearest_level("ours") == 0.8
    assert found.contexts("perplexity") == [1024, 2048, 4096]
    assert found.reference_context("perplexity") == 2048
    assert found.reference_context("needle") == 1024
    assert found.reference_context("copy") is None


def test_the_choice_is_made_on_validation():
    rows = [
        text(plan, 0.75, [loss], split=split)
        for plan, losses in {"pooled_64": (3.0, 3.2), "window": (3.1, 3.0)}.items()
        for split, loss in zip(("validation", "test"), losses, strict=True)
    ]
    assert study(*rows).best_plan("none", ["pooled_64", "window"]) == "pooled_64"
    assert study(*rows).mean("none", "perplexity", "pooled_64", 0.75, "loss") == 3.2


def test_gaps_and_pairs_of_methods_are_by_shared_seeds():
    def record(method, seed, dense, sparse):
        return language_record([text("dense", 0.0, [dense]), text("ours", 0.75, [sparse])], method, seed)

    found = LanguageStudy(
        [
            record("plain", 0, 3.0, 3.1),
            record("plain", 1, 3.2, 3.4),
            record("row_entropy", 1, 3.2, 3.3),
            record("row_entropy", 2, 9.0, 9.9),
        ]
    )
    assert found.gaps("plain", "ours", 0.75) == pytest.approx({0: 100 * math.expm1(0.1), 1: 100 * math.expm1(0.2)})
    assert found.perplexity_over("row_entropy", "plain", "ours", 0.75).mean == pytest.approx(math.exp(-0.1))


def test_the_newest_record_of_a_method_and_seed_counts():
    old = language_record([text("dense", 0.0, [2.0])], utc="2026-01-01T00:00:00Z")
    new = language_record([text("dense", 0.0, [3.0])], utc="2026-01-02T00:00:00Z")
    new["id"] = "newest"
    for records in ([old, new], [new, old]):
        assert LanguageStudy(records).losses("none", "dense") == {0: 3.0}
        assert LanguageStudy(records).record_ids == ["newest"]


def test_effective_support_is_the_mean_over_seeds():
    supports = ([[1.0, 3.0], [10.0, 20.0]], [[3.0, 5.0], [30.0, 40.0]])
    records = [
        language_record([], seed=seed, effective_support={"row": rows, "context": 512})
        for seed, rows in enumerate(supports)
    ]
    assert LanguageStudy(records).effective_support("none") == ([[2.0, 4.0], [20.0, 30.0]], 512)
    records[1]["metrics"]["effective_support"]["context"] = 1024
    assert LanguageStudy(records).effective_support("none") is None


def test_scales_models_and_experiments_are_studies_of_their_own():
    records = [
        language_record([]),
        language_record([], scale="paper"),
        language_record([], seed=1),
        language_record([], experiment="llm/llama_2_7b", model="meta-llama/Llama-2-7b-hf", scale="paper"),
        language_record([], "plain", experiment="llm/training"),
        language_record([], "plain", experiment="llm/training", model="phi_2"),
        language_record([], experiment="llm/other", model="/models/My_Decoder"),
        speed_record([]),
    ]
    found = [(study.title, len(study.records)) for study in quality_studies(records)]
    assert found == [
        ("LLaMA-2 7B, paper", 1),
        ("SmolLM2-135M, paper", 1),
        ("My Decoder, offline", 1),
        ("SmolLM2-135M, offline", 2),
    ]
    assert [study.title for study in training_studies(records)] == ["Phi-2, offline", "SmolLM2-135M, offline"]
    assert quality_studies([]) == training_studies([]) == []


def test_data_precision_and_device_are_told():
    assert study().circumstances == "wikipedia_sample, float32, CPU, 2 thread(s)"
    record = language_record([summary("dense", 0.0, 20.0)])
    record["dataset"] |= {"text": "wikitext_2", "summaries": "cnn_dailymail"}
    assert LanguageStudy([record]).circumstances.startswith("wikitext_2, articles of cnn_dailymail, float32, ")
    record["rows"] = []
    assert LanguageStudy([record]).circumstances.startswith("wikitext_2, float32, ")
    assert where(speed_record([], gpu="NVIDIA H100")) == "NVIDIA H100"
    # A CPU run on a machine with a GPU.
    record = language_record([])
    record["device"]["gpu"] = "NVIDIA H100"
    assert where(record) == "CPU, 2 thread(s)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ours", "ours"),
        ("ours_75", "ours, 75 %"),
        ("window", "sink + window (StreamingLLM)"),
        ("window_75", "sink + window (StreamingLLM), 75 %"),
        ("pooled_64", "mean-pooled, blocks of 64"),
        ("sampled_32_entropy", "sampled queries, blocks of 32, entropy budget"),
        ("topk", "best keys per row (oracle)"),
        ("flash_attention", "flash, attention"),
    ],
)
def test_words_of_plans(name, words):
    assert plan_label(name) == words


def test_words_of_models_and_methods():
    assert [model_label(name) for name in ("smollm2", "meta-llama/Llama-2-7b-hf", "phi_2", "tiny_one")] == [
        *("SmolLM2-135M", "LLaMA-2 7B", "Phi-2", "tiny one")
    ]
    assert [method_label(name) for name in ("none", "plain", "block_entropy", "row_entropy")] == [
        *("no further training", "plain steps (cross-entropy only)", "block entropy", "row entropy")
    ]
    assert [name for name in ("ours", "ours_75", "ours_shared", "oursome", "window") if is_default(name)] == [
        *("ours", "ours_75")
    ]


def test_methods_come_in_a_fixed_order_and_the_untrained_model_is_the_base():
    names = ("row_entropy", "plain", "block_entropy", "none")
    found = LanguageStudy([language_record([], name) for name in names])
    assert found.methods == ["none", "plain", "block_entropy", "row_entropy"]
    assert found.base == "none"
    assert LanguageStudy([language_record([], "row_entropy")]).base == "row_entropy"
