"""What a profile leaves of an experiment, how models are named and loaded, and what is said when memory ends."""

import json

import pytest
import torch

from entreg.errors import ConfigError
from entreg.experiments.language import experiment as language_experiment
from entreg.experiments.language.experiment import LanguageRun, limited_evaluation
from entreg.experiments.language.printout import with_ratios
from entreg.runs.directory import RunDirectory

EVALUATION = {
    "seed": 0,
    "tasks": {
        "perplexity": {"contexts": [512, 2048], "count": None},
        "needle": {"contexts": [2048], "count": 3},
        "summary": {"contexts": [1024], "count": 9, "new_tokens": 64},
        "copy": None,
    },
    "plans": {"a": {"levels": [0.5, 0.75]}, "b": {"levels": [0.5]}, "c": {"sparsity": 0.6}, "d": None},
    "effective_support": {"context": 2048, "count": 2},
    "harness": None,
}


def test_no_limits_leave_everything():
    found = limited_evaluation(EVALUATION, {})
    left = {name: one for name, one in EVALUATION["tasks"].items() if one is not None}
    assert found["tasks"] == left
    assert found["plans"] == {name: one for name, one in EVALUATION["plans"].items() if one is not None}
    assert found["effective_support"] == EVALUATION["effective_support"]


def test_limits_apply_to_every_part():
    found = limited_evaluation(
        EVALUATION, {"max_count": 4, "max_context": 600, "plans": ["a", "b", "c"], "levels": [0.75]}
    )
    assert found["tasks"] == {
        "perplexity": {"contexts": [512], "count": 4},
        "needle": {"contexts": [600], "count": 3},
        "summary": {"contexts": [600], "count": 4, "new_tokens": 64},
    }
    # A plan without the level keeps its first one.
    assert found["plans"] == {"a": {"levels": [0.75]}, "b": {"levels": [0.5]}, "c": {"sparsity": 0.6}}
    assert found["effective_support"] == {"context": 600, "count": 2}
    assert list(limited_evaluation(EVALUATION, {"plans": ["c"]})["plans"]) == ["c"]
    assert EVALUATION["tasks"]["perplexity"]["contexts"] == [512, 2048]


def model(**changed):
    return {"name": "smollm2", "architecture": None, "dtype": "float32", "attention": "sdpa", "options": {}, **changed}


def test_a_folder_without_a_configuration_is_another_model(tmp_path):
    assert language_experiment._experiment(None, model(name=str(tmp_path))) == "llm/other"
    (tmp_path / "config.json").write_text("{")
    assert language_experiment._experiment(None, model(name=str(tmp_path))) == "llm/other"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi", "hidden_size": 2560}))
    assert language_experiment._experiment(None, model(name=str(tmp_path))) == "llm/other"
    with pytest.raises(ConfigError, match="is not the model of llm/phi_2"):
        language_experiment._experiment("llm/phi_2", model(name=str(tmp_path)))


def run(tmp_path, **changed):
    config = {"name": "llm/x", "seed": 0, "device": "cpu", "trainer": {"steps": 0}, "model": model(**changed)}
    return LanguageRun(config, tmp_path, None)


def test_random_models_read_bytes(tmp_path):
    options = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    language = language_experiment._load(run(tmp_path, architecture="smollm2_135m", options=options, dtype="bfloat16"))
    assert next(language.model.parameters()).dtype == torch.bfloat16
    ids = language.tokenizer("Zürich").input_ids
    assert len(ids) == len("Zürich".encode()) + 1
    assert max(ids) < 384
    assert language.tokenizer.decode(ids, skip_special_tokens=True) == "Zürich"


def test_too_little_memory_is_one_sentence(tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB\n...")

    monkeypatch.setattr(language_experiment, "run_language", no_memory)
    with pytest.raises(ConfigError, match="does not fit into the memory") as caught:
        run(tmp_path).make_record("x", RunDirectory(tmp_path))
    assert "\n" not in str(caught.value)


def test_ratios_are_to_the_dense_row_of_the_same_texts():
    def row(plan, task, context, loss):
        return {"plan": plan, "task": task, "context": context, "split": "test", "loss": loss}

    dense = [
        row("dense", "perplexity", 512, 2.0),
        row("dense", "perplexity", 1024, 1.0),
        row("dense", "copy", 512, 0.1),
    ]
    sparse = [row("a", "perplexity", 1024, 1.5), row("a", "copy", 512, 0.1)]
    needle = {"plan": "a", "task": "needle", "context": 512, "split": "test", "accuracy": 1.0}
    found = with_ratios({"seed": 0, "rows": [*dense, *sparse, needle]})
    assert [one.get("ratio_to_dense") for one in found["rows"]] == pytest.approx(
        [None, None, None, 1.6487213, 1.0, None]
    )
    assert "ratio_to_dense" not in sparse[0]
    assert found["seed"] == 0
