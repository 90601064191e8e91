"""The cost of training steps on a tiny model: what a step computes, its record, its configuration."""

import json

import pytest
import torch
import yaml

from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.experiments.vision.speed.models import speed_model
from entreg.experiments.vision.speed.training_cost import run_training_cost, training_step
from entreg.training.penalties import penalty_from_mapping

OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
ENTROPY = {"penalties": {"key_entropy": {"quantity": "key_entropy", "weight": 3.0, "num_sampled_queries": None}}}
LOOP = {"sparsity": {"kind": "tokens", "keep": 4, "before_layer": 1, "straight_through": True}}
ARGUMENTS = {
    "model": "vit_base_patch16_224",
    "options": OPTIONS,
    "batch": 4,
    "precision": "float32",
    "methods": {"key_entropy": ENTROPY, "loop": LOOP},
    "ours": "key_entropy",
    "training_images": 100,
    "device": "cpu",
    "threads": 1,
    "profile": {
        "name": "smoke",
        "repeats": 2,
        "seeds": [0],
        "vision": {"speed": {"max_batch": 2, "model_options": {"num_classes": 12}}},
    },
    "command": "the command",
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return speed_model("vit_base_patch16_224", OPTIONS, "float32", torch.device("cpu"))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(2, 3, 16, 16, generator=generator),
        "labels": torch.randint(10, (2,), generator=generator),
    }


def gradients_of(step, model, monkeypatch):
    """What the optimiser is given in one step."""
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: seen.extend(p.grad.clone() for p in model.parameters()))
    step()
    assert all(parameter.grad is None for parameter in model.parameters())
    return seen


def test_a_plain_step_is_the_loss_and_a_penalty_adds_its_gradient(model, batch, monkeypatch):
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    plain = gradients_of(training_step(model, batch, {}, "float32", 0), model, monkeypatch)
    loss = torch.nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, expected, strict=True))
    # A penalty's gradient comes on top of it and is proportional to the weight; a sparse path changes it.
    penalty = ENTROPY["penalties"]["key_entropy"]
    added = []
    for weight in (1000.0, 2000.0):
        method = {"penalties": {"key_entropy": penalty | {"weight": weight}}}
        regularised = gradients_of(training_step(model, batch, method, "float32", 0), model, monkeypatch)
        added.append([a - b for a, b in zip(regularised, plain, strict=True)])
    for once, twice in zip(*added, strict=True):
        assert torch.allclose(2 * once, twice, atol=1e-3 * float(twice.abs().max()) + 1e-4)
    first_qkv = [name for name, _ in model.named_parameters()].index("blocks.0.attn.qkv.weight")
    loop = gradients_of(training_step(model, batch, LOOP, "float32", 0), model, monkeypatch)
    for difference in (added[0][first_qkv], loop[first_qkv] - plain[first_qkv]):
        assert difference.norm() > 1e-2 * plain[first_qkv].norm()
    monkeypatch.undo()
    training_step(model, batch, ENTROPY, "float32", 0)()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_low_precision_steps_are_close_to_the_full_ones(model, batch, monkeypatch):
    full = gradients_of(training_step(model, batch, ENTROPY, "float32", 0), model, monkeypatch)
    low = gradients_of(training_step(model, batch, ENTROPY, "bfloat16", 0), model, monkeypatch)
    difference = sum((a - b).square().sum() for a, b in zip(full, low, strict=True)).sqrt()
    assert 0 < difference < 0.1 * sum(a.square().sum() for a in full).sqrt()


def test_the_record_compares_each_method_with_the_plain_step(tmp_path):
    paths = run_training_cost(**ARGUMENTS, store=tmp_path)
    written = paths[0].read_text()
    assert run_training_cost(**ARGUMENTS | {"command": "another"}, store=tmp_path) == paths
    assert paths[0].read_text() == written
    record = json.loads(written)
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["plain", "key_entropy", "loop"]
    for row in rows.values():
        assert row["step_overhead"] == pytest.approx(row["seconds"] / rows["plain"]["seconds"] - 1)
        assert row["seconds_per_image"] == pytest.approx(row["seconds"] / 2)
    assert record["metrics"]["step_overhead"]["key_entropy"] == rows["key_entropy"]["step_overhead"]
    assert record["config"]["batch"] == 2
    assert record["config"]["options"]["num_classes"] == 12


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"precision": "float16"}, "precision must be"),
        ({"ours": "nothing"}, "ours must be"),
        ({"methods": {"plain": {}, "key_entropy": ENTROPY}}, "may be called 'plain'"),
        ({"methods": {"key_entropy": {"penalty": {}}}}, "unknown key 'penalty'"),
        ({"methods": {"key_entropy": {"penalties": {"a": {"quantity": "cubes", "weight": 1.0}}}}}, "cubes"),
        ({"batch": 0}, "at least 1"),
        ({"device": "tpu"}, "device must be"),
    ],
)
def test_impossible_settings_get_one_sentence(change, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        run_training_cost(**ARGUMENTS | change, store=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_names_penalties_that_exist():
    settings = yaml.safe_load((CONFIGS / "benchmark" / "training_cost.yaml").read_text())
    assert settings["ours"] in settings["methods"]
    for method in settings["methods"].values():
        for penalty in method.get("penalties", {}).values():
            penalty_from_mapping(penalty)
    # The images of the fine-tuning recipe at the paper's scale.
    recipe = yaml.safe_load((CONFIGS / "trainer" / "vit_finetune.yaml").read_text())
    assert settings["training_images"] == recipe["steps"] * recipe["batch_size"]
