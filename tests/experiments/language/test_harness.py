"""The harness's tasks on a model in memory, against probabilities from plain losses."""

import importlib.util
import json

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from entreg.adapters.language_models import random_language_model
from entreg.errors import ConfigError
from entreg.experiments.language import harness as language_harness
from entreg.experiments.language.harness import check_harness, harness_measures
from entreg.experiments.language.measures import token_losses

OPTIONS = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
OPTIONS |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
QUESTIONS = [("The sky is", [" blue", " seven", " on"], 0), ("Two and two is", [" five", " four"], 1)]
QUESTIONS += [(f"After {one} comes", [f" {one + 1}", f" {one - 1}"], one % 2) for one in range(3, 9)]


def byte_tokenizer():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    text = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, []))
    text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<s>", eos_token="</s>")


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(language_harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        check_harness({"tasks": ["arc_easy"]})


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is optional")
def test_choices_are_those_of_the_lowest_loss(tmp_path):
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"""
task: own_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    model, tokenizer = random_language_model("smollm2_135m", OPTIONS).model, byte_tokenizer()
    settings = {"tasks": ["own_questions"], "limit": None, "num_fewshot": 0, "include_path": str(tmp_path)}
    (row,) = harness_measures(model, tokenizer, settings)

    def loss(question, choice):
        asked, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, choice))
        return token_losses(model, torch.tensor([asked + said]), last=len(said)).sum().item()

    right = [
        min(range(len(choices)), key=lambda place: loss(question, choices[place])) == answer
        for question, choices, answer in QUESTIONS
    ]
    assert row["acc"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)
    assert (row["task"], row["items"], row["split"]) == ("lm_eval/own_questions", 8, "test")
    with pytest.raises(ConfigError, match="has no task 'no_such_task'"):
        harness_measures(model, tokenizer, {"tasks": ["no_such_task"]})
