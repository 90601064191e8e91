"""The training loop against loops written out by hand, and how it stops."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entreg import progress
from entreg.errors import ConfigError, InputError, OutputError, TrainingError
from entreg.training.batches import Positions
from entreg.training.checkpoints import latest_checkpoint, load_model_weights
from entreg.training.loop import TrainingSettings, train
from tests.training.tiny import FAST, Digits, TinyNet, new_run, run


def plain_objective(model, batch, step):
    loss = F.cross_entropy(model(batch["images"]), batch["labels"])
    return loss, {"task": loss}


def fitted(directory, settings, dtype=torch.float32, **options):
    model = TinyNet(dropout=0.0).to(dtype)
    values = TrainingSettings(**{**FAST, **settings})
    return model, train(model, plain_objective, Digits(), values, directory, device="cpu", **options)


def learning_rate(step, settings):
    """The closed form of the schedules."""
    peak, final, warmup = settings["learning_rate"], settings.get("final_learning_rate", 0.0), settings["warmup_steps"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = step / settings["steps"]
    if settings.get("schedule") == "constant":
        return peak
    share = 1 - progress if settings.get("schedule") == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (peak - final) * share


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "linear", "final_learning_rate": 0.001, "clip_norm": None},
        {"schedule": "constant", "warmup_steps": 0, "ema_decay": 0.6, "weight_decay": 0.3},
        {"gradient_accumulation": 4, "clip_norm": 0.05},
        {"optimizer": "sgd"},
    ],
)
def test_training_is_the_loop_written_out_by_hand(tmp_path, changes):
    settings = {**FAST, "weight_decay": 0.05, "clip_norm": 1.0, "log_every": 1, **changes}
    model, result = fitted(tmp_path, settings, torch.float64)
    twin, data = TinyNet(dropout=0.0).double(), Digits()
    decayed = [value for value in twin.parameters() if value.dim() > 1]
    others = [value for value in twin.parameters() if value.dim() == 1]
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    if settings.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0)
    order = Positions(20, 8, seed=0, steps=range(12))
    average = copy.deepcopy(twin)
    for step in range(12):
        indices = order.batch(step) % 20
        loss = F.cross_entropy(twin(data.images[indices].double()), data.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(value.grad.square().sum().item() for value in twin.parameters()))
        if settings["clip_norm"] is not None:
            for value in twin.parameters():
                # torch adds a millionth to the norm.
                value.grad *= min(1.0, settings["clip_norm"] / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        row = result.history[step]
        assert row["step"] == step + 1
        # Logged as the mean in float32 of up to four parts of a batch.
        few_bits = 4 * torch.finfo(torch.float32).eps
        assert row["loss"] == row["task"] == pytest.approx(loss.item(), rel=few_bits)
        assert row["gradient_norm"] == pytest.approx(norm, rel=few_bits)
        assert row["learning_rate"] == pytest.approx(learning_rate(step, settings), rel=1e-12)
        decay = min(1 - (1 + step) ** (-2 / 3), settings.get("ema_decay", 0.0))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), twin.parameters(), strict=True):
                mean.copy_(decay * mean + (1 - decay) * value)
    for found, wanted in zip(model.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_averaged_weights_are_what_the_model_keeps_and_what_is_evaluated(tmp_path):
    seen = {}

    def evaluate(model, step):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen[step] = model.second.weight.clone()
        return {"size": model.second.weight.abs().sum()}

    model, result = fitted(tmp_path, {"ema_decay": 0.9, "evaluate_every": 5}, evaluate=evaluate)
    assert list(seen) == [5, 10, 12]
    assert torch.equal(seen[12], model.second.weight)
    assert not torch.equal(model.second.weight, latest_checkpoint(tmp_path / "checkpoints").model["second.weight"])
    rows = {row["step"]: row for row in result.history}
    assert list(rows) == [4, 5, 8, 10, 12]
    assert rows[10]["evaluation/size"] == pytest.approx(seen[10].abs().sum().item())
    assert "evaluation/size" not in rows[8]
    assert not model.training
    loaded = TinyNet()
    load_model_weights(loaded, tmp_path)
    assert torch.equal(loaded.second.weight, model.second.weight)


def test_rows_are_means_and_stand_in_the_file(tmp_path):
    _, each = fitted(tmp_path / "each", {"log_every": 1})
    _, result = fitted(tmp_path / "some", {"log_every": 5})
    losses = [row["task"] for row in each.history]
    wanted = [np.mean(losses[:5]), np.mean(losses[5:10]), np.mean(losses[10:])]
    assert [row["task"] for row in result.history] == pytest.approx(wanted, rel=1e-12)
    lines = (tmp_path / "some" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert result.steps == 12
    assert result.seconds >= result.history[-1]["seconds"] > 0


def test_extra_parameters_learn_without_weight_decay_and_frozen_ones_stay(tmp_path):
    model, gate = TinyNet(dropout=0.0), nn.Parameter(torch.ones(2))
    idle = nn.Parameter(torch.full((2,), 3.0))
    model.first.requires_grad_(False)
    first = model.first.weight.clone()

    def objective(model, batch, step):
        return plain_objective(model, batch, step)[0] + gate.square().sum() + 0.0 * idle.sum(), {}

    settings = TrainingSettings(**{**FAST, "weight_decay": 0.5})
    train(model, objective, Digits(), settings, tmp_path, extra_parameters=[gate, idle], device="cpu")
    assert (gate < 1).all()
    assert torch.equal(idle, torch.full((2,), 3.0))
    assert torch.equal(model.first.weight, first)
    assert model.second.weight.requires_grad


def broken(kind, at):
    """An objective that breaks in one step."""

    def objective(model, batch, step):
        task, _ = plain_objective(model, batch, step)
        penalty = torch.zeros(())
        if step == at and kind == "penalty":
            penalty = penalty / 0.0
        if step == at and kind == "gradient":
            # The root's derivative at zero is infinite, and times zero not a number.
            task = task + (0.0 * model.second.weight).square().sum().sqrt()
        if step == at and kind == "refusal":
            raise InputError("the entropies of term 'keys' must be finite.")
        return task + penalty, {"task": task, "penalty": penalty, "diagnosis": math.nan}

    return objective


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("penalty", "the term 'penalty' is nan in step 7"),
        ("gradient", "the norm of the gradient is nan in step 7"),
        ("refusal", "the entropies of term 'keys' must be finite, in step 7"),
    ],
)
def test_training_stops_where_it_breaks_and_keeps_the_last_good_checkpoint(tmp_path, kind, words):
    model = TinyNet(dropout=0.0)
    with pytest.raises(TrainingError, match=f"Training stopped: {words} .*the last good checkpoint is .*step-00000006"):
        train(model, broken(kind, 7), Digits(), TrainingSettings(**FAST), tmp_path, device="cpu")
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found.step == 6
    # On a CPU the bad step does not even reach the weights.
    assert all(torch.isfinite(value).all() for value in [*model.state_dict().values(), *found.model.values()])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # A number that is not part of the loss may be what it likes; JSON has no NaN.
    assert [(row["step"], row["diagnosis"]) for row in map(json.loads, lines)] == [(4, None)]
    # Mended, the run goes on.
    result = train(model, broken("", 7), Digits(), TrainingSettings(**FAST), tmp_path, device="cpu")
    assert result.steps == 12


def test_a_bad_loss_without_named_terms(tmp_path):
    def objective(model, batch, step):
        return model(batch["images"]).sum() * math.inf, {}

    with pytest.raises(TrainingError, match=r"the loss is -?(inf|nan) in step 0 \(the first is 0\); no checkpoint yet"):
        train(TinyNet(), objective, Digits(), TrainingSettings(**FAST), tmp_path, device="cpu")


def test_the_callers_random_state_is_left_alone(tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    run(tmp_path, {"mixup": 0.5, "num_classes": 3}, data="NoisyDigits", augment=True)
    assert states() == before


def test_gradient_checkpointing_changes_memory_and_not_weights(tmp_path):
    import timm

    def vit():
        torch.manual_seed(0)
        options = {"img_size": 6, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
        return timm.create_model("vit_base_patch16_224", num_classes=3, drop_path_rate=0.3, **options)

    values, models = {**FAST, "steps": 3, "layer_decay": 0.7}, []
    for name, flag in (("with", True), ("without", False)):
        settings = TrainingSettings(**values, gradient_checkpointing=flag)
        model = vit()
        calls = []
        model.blocks[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        train(model, plain_objective, Digits(), settings, tmp_path / name, device="cpu")
        assert len(calls) == (6 if flag else 3)
        assert not model.grad_checkpointing
        models.append(model)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ConfigError, match="TinyNet has no gradient checkpointing"):
        fitted(tmp_path / "tiny", {"gradient_checkpointing": True})


def test_layer_decay_slows_the_early_layers(tmp_path):
    class Layered(TinyNet):
        def group_matcher(self, coarse=False):
            return {"stem": r"^first", "blocks": [(r"^norm", None), (r"^second", (99,))]}

    def moved(decay):
        model, start = Layered(dropout=0.0), Layered(dropout=0.0)
        settings = TrainingSettings(
            **{**FAST, "steps": 1, "warmup_steps": 0, "layer_decay": decay, "weight_decay": 0.0}
        )
        train(model, plain_objective, Digits(), settings, tmp_path / str(decay), device="cpu")
        # Adam's first step is the learning rate in every entry with a gradient.
        return [
            (getattr(model, name).bias - getattr(start, name).bias).abs().max().item() for name in ("first", "second")
        ]

    assert moved(None) == pytest.approx([0.01, 0.01], rel=1e-3)
    first, last = moved(0.5)
    assert last == pytest.approx(0.01, rel=1e-3)
    assert first < 0.6 * last


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path):
    seen = set()

    def objective(model, batch, step):
        logits = model(batch["images"])
        seen.add(logits.dtype)
        return F.cross_entropy(logits.float(), batch["labels"]), {}

    model = TinyNet(dropout=0.0)
    settings = TrainingSettings(**{**FAST, "precision": "bfloat16"})
    train(model, objective, Digits(), settings, tmp_path, device="cpu")
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    plain, _ = fitted(tmp_path / "plain", {})
    torch.testing.assert_close(model.second.weight, plain.second.weight, rtol=0, atol=0.02)
    assert not torch.equal(model.second.weight, plain.second.weight)


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ({"steps": 0, "warmup_steps": 0}, {}, "at least one step"),
        ({"optimizer": "adamm"}, {}, "there is no optimizer 'adamm'"),
        ({}, {"resume": "yes"}, "resume must be auto or null, got 'yes'"),
    ],
)
def test_impossible_requests(tmp_path, settings, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fitted(tmp_path, settings, **options)


def test_other_impossible_requests(tmp_path):
    model, objective, _ = new_run()
    settings = TrainingSettings(**FAST)
    with pytest.raises(ConfigError, match="the device of training must be"):
        train(model, objective, Digits(), settings, tmp_path, device="tpu")
    with pytest.raises(ConfigError, match="nothing is to be trained"):
        train(TinyNet().requires_grad_(False), plain_objective, Digits(), settings, tmp_path, device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where the folder"):
        train(model, objective, Digits(), settings, tmp_path / "file", device="cpu")
    with pytest.raises(InputError, match="empty"):
        train(model, objective, Digits(0), settings, tmp_path / "run", device="cpu")


def test_the_progress_is_that_of_the_steps(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    fitted(tmp_path / "my-run", {})
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("training my-run: ")]
    assert "training my-run: 50 % in " in "\n".join(lines)
    assert "training my-run: 100 % in " in lines[-1]
