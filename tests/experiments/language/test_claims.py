"""The measures of the claims on language models on records whose answers are known by hand, up to the verdict."""

import math

import pytest

from entreg.experiments.language.claims import perplexity_increase, prefill_speedup, rouge_drop
from entreg.records.claims import judge_all, load_claims
from entreg.records.registry import discover
from tests.experiments.language.samples import language_record, speed_record, summary, text, timed

PAPER = {"experiment": "llm/llama_2_7b", "model": "meta-llama/Llama-2-7b-hf", "scale": "paper"}


def verdict(claim_id, records):
    discover()
    claim = next(claim for claim in load_claims() if claim.id == claim_id)
    return judge_all([claim], records)[0]


def quality(increase=0.9, drop=0.35, realised=0.75, **changed):
    """Dense perplexity 10; ours ``increase`` above it, at two windows that differ; the window 3 above it."""
    dense = [math.log(10) - 1, math.log(10) + 1]
    ours = [value + math.log(1 + increase / 10) for value in dense]
    window = [value + math.log(1.3) for value in dense]
    rows = [
        text("dense", 0.0, dense),
        text("ours", 0.75, ours, realised=realised),
        text("window", 0.75, window),
        text("window", 0.75, window, split="validation"),
        text("pooled_64", 0.75, window),
        text("pooled_64", 0.75, dense, split="validation"),
        # Better on validation than all others, but it knows the exact scores.
        text("oracle", 0.75, [0.0, 0.0], split="validation"),
        text("dense", 0.0, [0.2], task="copy", context=2049),
        text("ours", 0.75, [0.21], task="copy", context=2049),
        text("window", 0.75, [3.2], task="copy", context=2049),
        summary("dense", 0.0, 20.0),
        summary("ours", 0.75, 20.0 - drop, 88.0, realised=realised),
        summary("window", 0.75, 19.0),
    ]
    return language_record(rows, **changed)


def test_perplexity_is_the_increase_of_ours_over_dense():
    evidence = perplexity_increase([quality()])
    assert evidence.value == pytest.approx(0.9)
    assert evidence.interval == pytest.approx((0.9, 0.9))
    assert (evidence.unit, evidence.scale) == ("", "offline")
    for words in (
        "SmolLM2-135M on wikipedia_sample, float32, CPU, 2 thread(s), context 2,048, 75.0 % realised: dense 10.00",
        "ratio 1.090x [1.090, 1.090]",
        "loss of copying 0.0100 nats above dense",
        "best other plan on validation, mean-pooled, blocks of 64: ratio 1.300x",
        "sink + window (StreamingLLM): ratio 1.300x, loss of copying 3.00 above dense",
    ):
        assert words in evidence.reason
    at = verdict("llm-ppl", [quality()])
    assert (at["offline"].verdict, at["paper"].verdict) == ("reproduced", "not run")


def test_rouge_is_the_drop_of_ours_below_dense():
    evidence = rouge_drop([quality()])
    assert evidence.value == pytest.approx(0.35)
    assert evidence.unit == "points"
    for words in (
        "30 articles, 75.0 % realised, 75.0 % in decoding: dense 20.0",
        "dense model's own text 88.0",
        "sink + window (StreamingLLM): drop 1.00",
    ):
        assert words in evidence.reason
    assert verdict("llm-rouge", [quality()])["offline"].verdict == "reproduced"


def test_the_drop_of_rouge_has_an_interval_over_articles():
    rows = [
        summary("dense", 0.0, 20.0, rouge_l_per_item=[10.0, 30.0]),
        summary("ours", 0.75, 19.7, rouge_l_per_item=[9.8, 29.6]),
    ]
    # Drops 0.2 and 0.4: half width 12.7062 times 0.1.
    assert rouge_drop([language_record(rows)]).interval == pytest.approx((0.3 - 1.27062, 0.3 + 1.27062), abs=1e-4)


def test_the_worst_of_several_models_counts():
    records = [
        quality(0.5, 0.1, **PAPER),
        quality(1.2, 0.7, experiment="llm/phi_2", model="microsoft/phi-2", scale="paper"),
    ]
    evidence = perplexity_increase(records)
    assert evidence.value == pytest.approx(1.2)
    assert evidence.reason.startswith("Phi-2 on ")
    assert evidence.reason.endswith("other models LLaMA-2 7B 0.500")
    assert rouge_drop(records).value == pytest.approx(0.7)
    at = verdict("llm-ppl", records)
    assert (at["offline"].verdict, at["paper"].verdict) == ("not run", "partly")


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(quality(scale="paper"), id="the offline model is not one of the paper's"),
        pytest.param(quality(experiment="llm/other", model="/models/mine", scale="paper"), id="another model, paper"),
        pytest.param(quality(experiment="llm/other", model="/models/mine"), id="another model, offline"),
        pytest.param(quality(weights="random"), id="random weights"),
        pytest.param(quality(realised=0.6), id="less sparse than claimed"),
        pytest.param(quality(realised=0.8), id="sparser than claimed"),
        pytest.param(language_record([]), id="nothing measured"),
        pytest.param(language_record([text("ours", 0.75, [1.0])]), id="no dense model"),
        pytest.param(quality(experiment="llm/training"), id="fine-tuned models have a table of their own"),
    ],
)
def test_what_gives_no_verdict(record):
    assert perplexity_increase([record]) is None
    assert rouge_drop([record]) is None


def prefill(ours=1 / 1.5, context=8192, **more):
    return [
        timed("dense", 1.0, role="baseline", context=context, **more),
        timed("ours", ours, context=context, bound=2.25, attention_share=0.74, **more),
        timed("window", 0.5, role="rival", context=context, **more),
    ]


def test_speed_is_that_of_the_longest_prefill():
    rows = [
        *prefill(1 / 1.5),
        *prefill(1 / 1.4, context=4096),
        timed("ours_shared", 0.1, context=8192),
        *(timed("ours", 0.5, phase="decode", batch=8, context=context) for context in (1024, 4096)),
    ]
    records = [speed_record(rows)]
    evidence = prefill_speedup(records)
    assert evidence.value == pytest.approx(1.5)
    assert (evidence.unit, evidence.record_ids) == ("x", [records[0]["id"]])
    # What the slowest round of one and the fastest of the other allow.
    assert evidence.interval == pytest.approx((1.5 * 0.995 / 1.005, 1.5 * 1.005 / 0.995))
    assert evidence.interval_is == "range of the rounds"
    for words in (
        "prefill of SmolLM2-135M, bfloat16, CPU, 2 thread(s), offline, context 8,192, batch 1",
        "ours at 75.0 % realised, kernel gather over fastest dense",
        "Amdahl allows 2.25x; attention takes 74.0 %",
        "there also sink + window (StreamingLLM) 2.00x (75.0 %)",
        "at other contexts 4,096 1.40x",
        "decoding 2.00x at 4,096, batch 8",
    ):
        assert words in evidence.reason
    assert verdict("llm-speed", records)["offline"].verdict == "reproduced"


def test_speed_is_the_least_of_the_models_on_their_best_settings():
    gpu = {"scale": "paper", "weights": "random", "gpu": "NVIDIA H100"}
    records = [
        speed_record(prefill(1 / 1.7, model="llama_2_7b"), model="llama_2_7b", **gpu),
        speed_record(prefill(1 / 1.3, model="phi_2"), model="phi_2", **gpu),
        # A CPU, and a precision, that count only where there is nothing better.
        speed_record(prefill(1 / 1.1, model="phi_2"), model="phi_2", scale="paper", weights="random"),
        speed_record(prefill(1 / 1.1, model="phi_2", dtype="float32"), model="phi_2", number=1, **gpu),
        # Not one of the paper's models.
        speed_record(prefill(1.0), number=2, **gpu),
    ]
    evidence = prefill_speedup(records)
    assert evidence.value == pytest.approx(1.3)
    assert "Phi-2, random weights: speed only, bfloat16, NVIDIA H100, paper" in evidence.reason
    assert "other models LLaMA-2 7B 1.70x at 8,192" in evidence.reason
    at = verdict("llm-speed", records)
    assert (at["offline"].verdict, at["paper"].verdict) == ("not run", "partly")


def test_rounds_that_reach_above_the_papers_range_leave_it_reproduced():
    rows = prefill(1 / 1.7)
    for row in rows:
        row |= {"seconds_min": 0.95 * row["seconds"], "seconds_max": 1.05 * row["seconds"]}
    found = verdict("llm-speed", [speed_record(rows)])["offline"]
    assert found.verdict == "reproduced"
    assert "the range of the rounds reaches from reproduced to exceeded" in found.reason


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="nothing"),
        pytest.param([timed("dense", 1.0, role="baseline")], id="dense only"),
        pytest.param([timed("ours", 0.1, realised=0.5)], id="less sparse than claimed"),
        pytest.param([timed("ours", 0.1, realised=0.9)], id="sparser than claimed"),
        pytest.param([timed("window", 0.1, role="rival")], id="a rival only"),
        pytest.param([timed("ours", 0.1, phase="decode")], id="decoding only"),
        pytest.param([timed("ours", 0.1, model="tiny")], id="an unknown model"),
        pytest.param([timed("ours", 0.1, realised=None, bound=None)], id="no sparsity told"),
        pytest.param([timed("ours", 0.1, speedup_over_dense=None)], id="nothing to compare with"),
    ],
)
def test_speed_needs_the_default_plan_at_the_claimed_sparsity(rows):
    assert prefill_speedup([speed_record(rows)]) is None


def test_absent_parts_of_the_reason_are_left_out():
    evidence = prefill_speedup([speed_record([timed("ours", 0.5, bound=None, kernel=None)])])
    assert evidence.reason == (
        "prefill of SmolLM2-135M, bfloat16, CPU, 2 thread(s), offline, context 4,096, batch 1; ours at 75.0 % realised "
        "over fastest dense"
    )


@pytest.mark.parametrize("claim_id", ["llm-speed", "llm-rouge", "llm-ppl"])
def test_the_claims_are_built_and_have_their_commands(claim_id):
    claim = next(claim for claim in load_claims() if claim.id == claim_id)
    assert claim.status == "built"
    assert claim.commands == {
        "offline": "make study-llm STUDY=outputs/study",
        "reproduce": "make reproduce-llm",
        "paper": "make reproduce-llm PROFILE=paper MODEL=meta-llama/Llama-2-7b-hf",
    }
