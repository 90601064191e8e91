"""What is measured on language models, against float64 loops, closed forms and values computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from entreg.adapters.language_models import random_language_model
from entreg.data.language_tasks import NeedleTask, SummaryTask
from entreg.data.text import Corpus
from entreg.errors import ConfigError, InputError
from entreg.experiments.language import evaluation as language_evaluation
from entreg.experiments.language import measures as language_measures
from entreg.experiments.language.evaluation import (
    Task,
    check_evaluation,
    check_model,
    evaluate_everything,
    expand_plans,
    open_tasks,
)
from entreg.experiments.language.measures import (
    SparsityMeter,
    greedy_continuation,
    require_plain_output,
    rouge_l,
    row_supports,
    token_losses,
)

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # The default initialisation is so small that all attention would be even.
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def model():
    return random_language_model("smollm2_135m", TINY).model


PERPLEXITY = {"contexts": [64], "count": 3, "splits": ["test"], "stride": None}


def windows(count, length, seed=0):
    return torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def evaluation(**changed):
    """The ``evaluation`` part of a configuration with one task."""
    tasks = {"perplexity": PERPLEXITY}
    return {"seed": 0, "tasks": tasks, "plans": {}, "effective_support": None, "harness": None, **changed}


def losses_in_float64(model, ids):
    """One row after the other, the whole vocabulary in double precision."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    found = []
    for place in range(len(ids) - 1):
        row = logits[place].tolist()
        highest = max(row)
        total = sum(math.exp(value - highest) for value in row)
        found.append(highest + math.log(total) - row[ids[place + 1]])
    return found


@pytest.mark.parametrize("chunk", [2**24, 97 * 7, 1])
def test_losses_are_those_of_a_loop_in_double_precision(model, monkeypatch, chunk):
    monkeypatch.setattr(language_measures, "_CHUNK_ELEMENTS", chunk)
    ids = windows(2, 40)
    found = token_losses(model, ids)
    expected = torch.tensor([losses_in_float64(model, row) for row in ids])
    assert found.shape == (2, 39)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(token_losses(model, ids, last=5), found[:, -5:])


def test_losses_of_more_tokens_than_there_are_are_refused(model):
    for last in (0, 40):
        with pytest.raises(InputError, match="1 to 39 tokens of 40"):
            token_losses(model, windows(1, 40), last=last)


def test_limited_logits_of_gemma_count_as_they_are():
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    gemma = transformers.Gemma2ForCausalLM(config).eval()
    ids = windows(1, 12)
    require_plain_output(gemma)
    expected = torch.tensor([losses_in_float64(gemma, ids[0])])
    torch.testing.assert_close(token_losses(gemma, ids).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_a_model_that_changes_its_logits_is_refused():
    import transformers

    config = transformers.CohereConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=9.0,
        initializer_range=0.5,
    )
    with pytest.raises(InputError, match="changes its logits"):
        require_plain_output(transformers.CohereForCausalLM(config).eval())


def test_rouge_l_by_hand():
    # Longest common subsequences: all 5 of 5 words out of 6 (F1 = 10/11); 1 of 2 and 2; none; the same stems.
    pairs = [
        ("the cat sat on the mat", "the cat on the mat", 1000 / 11),
        ("red green", "green red", 50.0),
        ("one two", "three four", 0.0),
        ("cats were sitting", "cat were sit", 100.0),
    ]
    found = rouge_l([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert found == pytest.approx([pair[2] for pair in pairs])


def test_supports_are_those_of_the_whole_attention_matrix(model):
    ids = windows(3, 24)
    found = row_supports(model, ids, num_sampled_queries=None)
    eager = random_language_model("smollm2_135m", TINY, attention="eager").model
    with torch.no_grad():
        attentions = eager(input_ids=ids, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        entropy = -torch.special.xlogy(attention.double(), attention.double()).sum(-1)
        expected = entropy.mean((0, 2)).exp()
        assert found[layer] == pytest.approx(expected.tolist(), rel=1e-4)
    sampled = row_supports(model, ids, num_sampled_queries=20)
    assert sampled[0] == pytest.approx(found[0], rel=0.2)
    assert sampled != found


class Stub(nn.Module):
    """A model that knows some answers: after a token that it has read before comes what came then; else anything.

    Its logits are ``sharpness`` for the answer, 0 for the other tokens.
    """

    def __init__(self, vocabulary=30, sharpness=5.0, blind_before=0):
        super().__init__()
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        nn.init.eye_(self.head.weight)
        self.vocabulary, self.sharpness, self.blind_before = vocabulary, sharpness, blind_before
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.base_model = StubBody(self)
        self.generation_config = SimpleNamespace(eos_token_id=2)

    def get_output_embeddings(self):
        return self.head

    def answer(self, read):
        for place in range(len(read) - 2, self.blind_before - 1, -1):
            if read[place] == read[-1]:
                return read[place + 1]
        return None

    def generate(self, ids, attention_mask, generation_config):
        written = ids[0].tolist()
        for _ in range(generation_config.max_new_tokens):
            written.append(self.answer(written) or 0)
        return torch.tensor([written])


class StubBody(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, input_ids, use_cache):
        (owner,) = self.owner
        hidden = torch.zeros(*input_ids.shape, owner.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                answer = owner.answer(ids[: place + 1])
                if answer is not None:
                    hidden[row, place, answer] = owner.sharpness
        return SimpleNamespace(last_hidden_state=hidden)


def measured(model, task):
    with SparsityMeter(model, None):
        return language_evaluation._row(model, None, Words(), task, None)[0]


def test_the_harness_runs_dense_and_under_its_levels(model, monkeypatch):
    def answers(_, __, settings):
        # Whatever it does, it runs the model.
        model.base_model(input_ids=windows(1, 256), use_cache=False)
        return [{"task": f"lm_eval/{name}", "acc": 0.5} for name in settings["tasks"]]

    monkeypatch.setattr(language_evaluation, "harness_measures", answers)
    plans = {
        "window": {
            "kind": "decoder",
            "selection": "window",
            "block_size": 16,
            "dense_tail_blocks": 0,
            "levels": [0.5, 0.75],
        }
    }
    config = evaluation(plans=plans, harness={"tasks": ["a", "b"], "levels": [0.75]})
    _, rows = evaluate_everything(model, Words(), [], config)
    assert [(row["task"], row["plan"], row["level"]) for row in rows] == [
        ("lm_eval/a", "dense", 0.0),
        ("lm_eval/b", "dense", 0.0),
        ("lm_eval/a", "window", 0.75),
        ("lm_eval/b", "window", 0.75),
    ]
    assert [row["realised_sparsity"] > 0.7 for row in rows] == [False, False, True, True]


class Words:
    """A tokenizer of whole words."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(f"word{one}" for one in ids)


def test_copying_is_scored_on_the_second_copy_alone():
    text = torch.stack([torch.randperm(25, generator=torch.Generator().manual_seed(seed)) + 3 for seed in range(2)])
    task = Task("copy", "test", 50, torch.cat([text, text], dim=1), scored=(25, 25))
    row = measured(Stub(), task)
    # The first token of the second copy cannot be known; the other 24 have e^5 against 29 others.
    known, unknown = math.log1p(29 * math.exp(-5.0)), math.log(30)
    assert row["loss"] == pytest.approx((24 * known + unknown) / 25, rel=1e-5)
    assert row["loss_per_item"] == pytest.approx([row["loss"]] * 2, rel=1e-5)
    assert (row["items"], row["tokens"], row["context"], row["split"]) == (2, 50, 50, "test")
    assert row["realised_sparsity"] == 0.0
    assert row["decode_sparsity"] is None
    assert "perplexity" not in row


def test_needles_are_found_when_all_their_tokens_are_written():
    def needle(depth, place):
        # The question ends with token 7, which stands before the answer 11, 12, 13 in the text.
        text = [20, 21, 22, 23, 24, 25]
        text[place:place] = [7, 11, 12, 13]
        return NeedleTask(torch.tensor([*text, 7]), torch.tensor([11, 12, 13]), depth)

    items = [needle(0.0, 0), needle(0.0, 1), needle(1.0, 6)]
    row = measured(Stub(), Task("needle", "test", 14, items))
    assert row["accuracy"] == 1.0
    # A model that sees nothing before the sixth token finds the last only.
    row = measured(Stub(blind_before=6), Task("needle", "test", 14, items))
    assert row["accuracy"] == pytest.approx(1 / 3)
    assert (row["depths"], row["accuracy_per_depth"]) == ([0.0, 1.0], [0.0, 1.0])
    assert (row["items"], row["tokens"]) == (3, 9)


def test_summaries_are_compared_with_references_and_with_the_dense_model():
    # After 5 comes 6, then 7, then 8; references in words.
    items = [SummaryTask(torch.tensor([5, 6, 7, 8, 9, 5]), "word6 word7 word9 word9")]
    task = Task("summary", "test", 16, items, new_tokens=3)
    dense, written = language_evaluation._row(Stub(), None, Words(), task, None)
    # Written: 6 7 8. Two of three and of four: F1 = 2 * (2/3) * (2/4) / (2/3 + 2/4).
    assert dense["rouge_l"] == pytest.approx(400 / 7)
    assert "rouge_l_to_dense" not in dense
    handle = SimpleNamespace(selections=[SimpleNamespace(plan=SimpleNamespace(sparsity=0.5))], depth=2)
    sparse, _ = language_evaluation._row(Stub(blind_before=9), handle, Words(), task, written)
    # It cannot see the pairs and writes zeros.
    assert sparse["rouge_l"] == sparse["rouge_l_to_dense"] == 0.0
    assert sparse["tokens"] == 3


def test_the_meter_tells_reading_from_writing():
    model = Stub()
    handle = SimpleNamespace(selections=[], depth=4)
    with SparsityMeter(model, handle) as meter:
        assert meter.decode is None
        # Two of four layers are sparse, one more ran dense.
        handle.selections = [SimpleNamespace(plan=plan) for plan in (SimpleNamespace(sparsity=0.8),) * 2 + (None,)]
        model.base_model(input_ids=windows(1, 6) % 30, use_cache=False)
        handle.selections = [SimpleNamespace(plan=SimpleNamespace(sparsity=0.5))] * 4
        model.base_model(input_ids=torch.tensor([[3]]), use_cache=False)
        handle.selections = []
        model.base_model(input_ids=torch.tensor([[3]]), use_cache=False)
    assert meter.prefill == pytest.approx(0.4)
    assert meter.decode == pytest.approx(0.25)
    model.base_model(input_ids=torch.tensor([[3]]), use_cache=False)
    assert meter.decode == pytest.approx(0.25)


def test_greedy_text_is_that_of_a_loop_without_a_cache(model):
    ids = windows(1, 10, seed=4)[0]
    written = ids.tolist()
    for _ in range(6):
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].argmax()))
        if written[-1] == model.generation_config.eos_token_id:
            break
    assert greedy_continuation(model, ids, 6).tolist() == written[10:]


class Bytes:
    """A tokenizer of characters."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=[3 + ord(one) % 90 for one in text])

    def decode(self, ids, **_):
        return "".join(chr(one) for one in ids)


def text_corpus(characters=4000):
    return Corpus("text", "0", ("a b. " * (characters // 5),), ("test",))


def test_items_are_opened_once_for_all_plans():
    tasks = {
        "perplexity": {"contexts": [32, 64], "count": 3, "splits": ["test"], "stride": 16},
        "copy": {"contexts": [33], "count": 2, "splits": ["test"], "levels": [0.5]},
        "needle": {"contexts": [160], "count": 1, "depths": [0.0, 1.0], "splits": ["test"]},
        "summary": None,
    }
    short, long, copies, needles = open_tasks(evaluation(tasks=tasks), {("text", "test"): text_corpus()}, Bytes())
    assert [(one.name, one.context) for one in (short, long, copies, needles)] == [
        ("perplexity", 32),
        ("perplexity", 64),
        ("copy", 33),
        ("needle", 160),
    ]
    # Overlapping windows: each begins 16 tokens after the one before, and only what is new counts.
    assert torch.equal(short.items[0, 16:], short.items[1, :16])
    assert short.scored == (31, 16, 16)
    assert long.scored == (63, 16, 16)
    assert torch.equal(copies.items[:, 1:17], copies.items[:, 17:])
    assert (copies.scored, copies.levels) == ((16, 16), (0.5,))
    assert len(needles.items) == 2


def test_a_corpus_that_is_too_small_is_one_sentence():
    tasks = {"perplexity": {**PERPLEXITY, "count": 1000}}
    # 800 characters and the end of the document.
    with pytest.raises(InputError, match="801 tokens: 12 windows of 64 fit, 1000 are wanted"):
        open_tasks(evaluation(tasks=tasks), {("text", "test"): text_corpus(800)}, Bytes())


def test_strided_losses_are_those_of_the_whole_text(model):
    stretch = windows(1, 96, seed=2)[0]
    task = Task("perplexity", "test", 64, stretch.unfold(0, 64, 16), scored=(63, 16, 16))
    row = measured(model, task)
    expected = losses_in_float64(model, stretch[:64])
    for start in (16, 32):
        expected += losses_in_float64(model, stretch[start : start + 64])[-16:]
    assert row["tokens"] == len(expected) == 95
    assert row["loss"] == pytest.approx(sum(expected) / 95, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(sum(expected) / 95), rel=1e-4)
    assert row["loss_per_item"][1] == pytest.approx(sum(expected[63:79]) / 16, rel=1e-5)


def test_levels_stand_for_one_plan_each():
    plans = {
        "a": {"kind": "decoder", "selection": "window", "levels": [0.5, 0.75]},
        "b": {"kind": "decoder", "sparsity": 0.6},
        "left_out": None,
    }
    found = expand_plans(plans)
    assert [(name, level, plan.sparsity) for name, level, plan in found] == [
        ("a", 0.5, 0.5),
        ("a", 0.75, 0.75),
        ("b", 0.6, 0.6),
    ]
    assert found[0][2].selection == "window"


def test_varied_fields_stand_for_one_plan_per_combination():
    varied = {"selection": ["pooled", "sampled"], "block_size": [16, 32]}
    found = expand_plans({"a": {"kind": "decoder", "vary": varied, "levels": [0.5, 0.75]}})
    assert [(name, level) for name, level, _ in found] == [
        (f"{selection}_{size}", level)
        for selection in ("pooled", "sampled")
        for size in (16, 32)
        for level in (0.5, 0.75)
    ]
    assert {(name, plan.selection, plan.block_size) for name, _, plan in found} == {
        (f"{selection}_{size}", selection, size) for selection in ("pooled", "sampled") for size in (16, 32)
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": {"perplxity": PERPLEXITY}}, "unknown task 'perplxity'"),
        ({"tasks": {"perplexity": {**PERPLEXITY, "windows": 3}}}, "unknown key 'windows'"),
        ({"tasks": {"copy": {"contexts": [64], "count": 3}}}, "needs splits"),
        ({"tasks": {"perplexity": {**PERPLEXITY, "contexts": [8]}}}, "at least 16, got 8"),
        ({"tasks": {"perplexity": {**PERPLEXITY, "contexts": []}}}, "must not be empty"),
        ({"tasks": {"perplexity": {**PERPLEXITY, "count": 0}}}, "at least 1, got 0"),
        (
            {"tasks": {"perplexity": {**PERPLEXITY, "splits": ["train"]}}},
            "unknown split 'train' of evaluation.tasks.per",
        ),
        ({"tasks": {"perplexity": {**PERPLEXITY, "stride": 0}}}, "stride"),
        (
            {"tasks": {"needle": {"contexts": [256], "count": 1, "splits": ["test"], "depths": [2.0]}}},
            r"depths must be numbers in \[0, 1\]",
        ),
        ({"plans": {"a": {"kind": "decoder", "sparsity": 1.0}}}, r"in \[0, 1\)"),
        ({"plans": {"a": {"kind": "decoder", "budget": "luck", "sparsity": 0.5}}}, "luck"),
        ({"plans": {"a": {"kind": "columns", "sparsity": 0.5}}}, "must be of kind decoder"),
        ({"plans": {"a": {"kind": "decoder"}}}, "sparsity"),
        ({"plans": {"a": {"kind": "decoder", "levels": [0.5, 0.5]}}}, "two plans a of sparsity 0.5"),
        ({"harness": {"tasks": []}}, "needs tasks"),
        ({"harness": {"tasks": ["arc_easy"], "limits": 3}}, "unknown key 'limits'"),
        ({"effective_support": {"context": 0, "count": 1}}, "effective_support"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(changed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_evaluation(evaluation(**changed))
    assert "\n" not in str(caught.value)


def test_a_context_longer_than_the_models_is_refused(model):
    tasks = {"perplexity": {**PERPLEXITY, "contexts": [513]}}
    with pytest.raises(InputError, match="513 tokens is longer than the 512"):
        check_model(model, "tiny", evaluation(tasks=tasks))


def test_rows_of_every_task_and_plan(model):
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    ids = windows(2, 256)
    tasks = [
        Task("perplexity", "validation", 256, ids, scored=(255, 255)),
        Task("needle", "test", 256, [NeedleTask(ids[0], torch.tensor([5, 6]), 0.5)], levels=(0.75,)),
    ]
    plans = {
        "window": {"kind": "decoder", "selection": "window", "block_size": 16, "dense_tail_blocks": 0, "page_size": 16}
    }
    config = evaluation(
        plans={"window": {**plans["window"], "levels": [0.0, 0.75]}},
        effective_support={"context": 128, "count": 1, "num_sampled_queries": 8},
    )
    metrics, rows = evaluate_everything(model, Words(), tasks, config)
    assert [(row["plan"], row["level"], row["task"]) for row in rows] == [
        ("dense", 0.0, "perplexity"),
        ("dense", 0.0, "needle"),
        ("window", 0.0, "perplexity"),
        ("window", 0.75, "perplexity"),
        ("window", 0.75, "needle"),
    ]
    dense, needle, nothing, sparse, written = rows
    expected = [sum(losses_in_float64(model, one)) / 255 for one in ids]
    assert dense["loss_per_item"] == pytest.approx(expected, rel=1e-5)
    assert nothing["loss_per_item"] == pytest.approx(expected, rel=1e-5)
    assert nothing["realised_sparsity"] == 0.0
    # Whole blocks of 16 x 16: the budget is kept, and missed by less than one block per row.
    assert 0.75 <= sparse["realised_sparsity"] < 0.75 + 2 * 16 / 256
    assert sparse["loss"] != pytest.approx(dense["loss"], rel=1e-5)
    # The first of two tokens is read off the prompt; one step of decoding is left.
    assert needle["decode_sparsity"] == 0.0
    assert 0.75 <= written["decode_sparsity"] < 0.75 + 16 / 256
    assert (metrics["effective_support"]["context"], len(metrics["effective_support"]["row"])) == (128, 2)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())
    assert token_losses(model, ids).double().mean(1).tolist() == pytest.approx(expected, rel=1e-5)
