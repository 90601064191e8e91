"""Training of language models against transformers' own loss and whole logits, and what low-rank training touches."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entreg.adapters import probe, sparsify
from entreg.errors import AssetError, ConfigError, InputError, TrainingError
from entreg.sparse import DecoderSparsity
from entreg.training.checkpoints import latest_checkpoint, load_model_weights
from entreg.training.language import (
    LanguageObjective,
    TokenWindows,
    full,
    low_rank,
    merge_low_rank,
    prepare_language_training,
)
from entreg.training.loop import TrainingSettings, train
from entreg.training.penalties import Penalties, penalty_from_mapping, prepare_penalties
from entreg.weights import frozen_copy
from tests.adapters.small_decoders import DEPTH, FAMILIES, VOCABULARY, WINDOW, padding, small_decoder, tokens

import transformers  # isort: skip - after the bridge of small_decoders

FAST = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 2}
LORA = {"kind": "lora", "rank": 3, "alpha": 6.0, "dropout": 0.1}
ENTROPY = {"quantity": "row_entropy", "weight": 0.5, "num_sampled_queries": 8, "normalize": True}


def penalties(**terms):
    return Penalties({name: penalty_from_mapping(one) for name, one in terms.items()})


def objective_of(model, chunk_size=None, **terms):
    chosen = penalties(**terms)
    captures = probe(model) if terms else None
    return LanguageObjective(chosen, captures=captures, chunk_size=chunk_size)


def windows(count=10, length=20):
    return TokenWindows(tokens(count, length))


def fitted(folder, adaptation, *, settings=(), terms=(), seed=0, **options):
    """Train a tiny model; gives it and the result."""
    model = small_decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1 * seed
    prepare_language_training(model, adaptation)
    objective = objective_of(model, chunk_size=16, **dict(terms))
    chosen = TrainingSettings(**{**FAST, **dict(settings)})
    try:
        return model, train(model, objective, windows(), chosen, folder, device="cpu", **options)
    finally:
        if objective.captures is not None:
            objective.captures.remove()


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_transformers_own(family):
    model, ids = small_decoder(family), tokens()
    loss, parts = objective_of(model, chunk_size=7)(model, {"input_ids": ids}, 0)
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    assert parts["task"] == loss.detach()


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_wanted_tokens_are_predicted_and_padding_is_neither_target_nor_context(side):
    model, ids = small_decoder(), tokens()
    attention = padding(side=side)
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    batch = {"input_ids": ids, "attention_mask": attention, "loss_mask": wanted}
    loss, _ = objective_of(model, chunk_size=7)(model, batch, 0)
    labels = ids.masked_fill(~wanted | (attention == 0), -100)
    if side == "left":
        labels[0, 7] = -100  # the first token has no context but padding
    torch.testing.assert_close(loss, model(ids, attention_mask=attention, labels=labels).loss)
    with pytest.raises(InputError, match="leave no token"):
        objective_of(model)(model, {**batch, "loss_mask": torch.zeros_like(wanted)}, 0)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_give_the_gradient_of_the_whole_logits(chunk_size):
    model, ids = small_decoder().double(), tokens(2, 12)
    teacher = frozen_copy(small_decoder("llama", initializer_range=0.2).double())
    # As above, in one piece; the distance of distributions written out.
    logits, wanted = model(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
    task = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    student, truth = (part.float().div(2.0).log_softmax(-1) for part in (logits, wanted))
    distance = 4.0 * (truth.exp() * (truth - student)).sum(-1).mean()
    (0.7 * task + 0.3 * distance).backward()
    expected = gradients(model)
    model.zero_grad()
    objective = LanguageObjective(
        Penalties({}), teacher=teacher, distillation=0.3, temperature=2.0, chunk_size=chunk_size
    )
    loss, parts = objective(model, {"input_ids": ids}, 0)
    loss.backward()
    torch.testing.assert_close(parts["task"], task.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["distillation"], distance.detach().double(), rtol=1e-5, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The distillation is in float32.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert all(value.grad is None for value in teacher.parameters())


def test_chunks_without_distillation_are_exact_in_float64():
    model, ids = small_decoder().double(), tokens(2, 12)
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = gradients(model)
    model.zero_grad()
    objective_of(model, chunk_size=5)(model, {"input_ids": ids}, 0)[0].backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-13)


def test_logits_of_all_tokens_are_never_held():
    model, ids = small_decoder("llama", vocab_size=4000), tokens(2, 40)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = objective_of(model, chunk_size=8)(model, {"input_ids": ids}, 0)
    loss.backward()
    hook.remove()
    # The head's own weight is what it is.
    assert max(size for size in sizes if size != model.lm_head.weight.numel()) <= 8 * 4000


def test_a_head_that_is_more_than_a_linear_map_is_refused():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        final_logit_softcapping=1.0,
        pad_token_id=0,
    )
    model = transformers.Gemma2ForCausalLM(config)
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM does more than a linear map"):
        objective_of(model)(model, {"input_ids": tokens()}, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_additions_start_at_nothing_and_merge_into_the_stock_model(family):
    stock, ids = small_decoder(family), tokens()
    model = prepare_language_training(copy.deepcopy(stock), {**LORA, "dropout": 0.0})
    assert type(model) is type(stock)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 4 * DEPTH
    assert all("lora_" in name and "attn" in name for name in trained)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in trained:
                value.normal_(std=0.1)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, stock(ids).logits, atol=1e-2)
    merged = merge_low_rank(model)
    assert merged is model
    assert list(merged.state_dict()) == list(stock.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in stock.modules()]
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(merge_low_rank(stock)(ids).logits, stock(ids).logits)


def test_the_merged_weight_is_w_plus_scaled_b_times_a():
    model = low_rank(small_decoder(), rank=2, alpha=5.0, targets=["q_proj"])
    layer = model.model.layers[1].self_attn.q_proj
    weight = layer.weight.detach().clone()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
    expected = weight + 5.0 / 2 * b @ a
    merge_low_rank(model)
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, expected.detach())


def test_low_rank_weights_are_float32_and_a_function_of_their_seed():
    def additions(seed):
        model = small_decoder().bfloat16()
        state = torch.get_rng_state()
        low_rank(model, rank=2, alpha=2.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: value for name, value in model.state_dict().items() if "lora_" in name}, model

    first, model = additions(3)
    again, _ = additions(3)
    other, _ = additions(4)
    assert all(torch.equal(value, again[name]) and value.dtype is torch.float32 for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype is torch.bfloat16
    assert {value.dtype for value in full(small_decoder().bfloat16()).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["k_proj", "down_proj"], {"k_proj", "down_proj"}),
        (["layers.1.mlp.up_proj"], {"up_proj"}),
    ],
)
def test_targets(targets, ends):
    model = low_rank(small_decoder(), targets=targets)
    found = {name.split(".lora_A")[0] for name in model.state_dict() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in found} == ends
    assert len(found) == (1 if ends == {"up_proj"} else DEPTH * len(ends))


def test_low_rank_training_moves_only_the_additions_and_its_checkpoints_hold_only_them(tmp_path):
    stock = small_decoder()
    model, result = fitted(tmp_path, LORA, terms={"row": ENTROPY}, settings={"ema_decay": 0.5})
    assert result.history[-1]["task"] < result.history[0]["task"]
    assert {"row/entropy", "row/weight", "row/penalty"} <= result.history[0].keys()
    base = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, base[name]) for name, value in stock.state_dict().items())
    found = latest_checkpoint(tmp_path / "checkpoints")
    for weights in (found.model, found.averaged):
        assert all("lora_" in name for name in weights)
        assert len(weights) == 2 * 4 * DEPTH
    # A prepared stock model and the checkpoint are the trained model.
    loaded = prepare_language_training(small_decoder(), {**LORA, "seed": 9})
    load_model_weights(loaded, tmp_path)
    assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)
    for other, words in (
        (small_decoder(), "the model has no"),
        (prepare_language_training(small_decoder("llama", initializer_range=0.1), LORA), "frozen weights"),
    ):
        before = other(tokens()).logits
        with pytest.raises(AssetError, match=words):
            load_model_weights(other, tmp_path)
        assert torch.equal(other(tokens()).logits, before)


class Killed(BaseException):
    """Stands for a signal."""


VARIANTS = {
    "low rank": {"adaptation": LORA, "terms": {"row": ENTROPY}},
    "full": {
        "adaptation": {"kind": "full"},
        "terms": {
            "blocks": {
                "quantity": "block_entropy",
                "block_size": 4,
                "weight": 0.1,
                "schedule": "target",
                "target": 1.0,
                "num_sampled_queries": 6,
            }
        },
        "settings": {"precision": "bfloat16", "gradient_checkpointing": True},
    },
    "low rank, average, accumulation": {
        "adaptation": LORA,
        "settings": {"gradient_accumulation": 2, "ema_decay": 0.9},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, name):
    variant = VARIANTS[name]
    model, whole = fitted(tmp_path / "whole", **variant)

    def kill(model, done):
        raise Killed

    stopped = {**variant, "settings": {**variant.get("settings", {}), "evaluate_every": 5}, "evaluate": kill}
    with pytest.raises(Killed):
        fitted(tmp_path / "halves", **stopped)
    assert latest_checkpoint(tmp_path / "halves" / "checkpoints").step == 4
    again, resumed = fitted(tmp_path / "halves", **variant)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    strip = [[{key: row[key] for key in row if key != "seconds"} for row in one.history] for one in (whole, resumed)]
    assert strip[0] == strip[1]


def test_a_low_rank_run_is_not_resumed_on_another_base(tmp_path):
    fitted(tmp_path, LORA)
    with pytest.raises(ConfigError, match="trained on top of frozen weights that are not the model's"):
        fitted(tmp_path, LORA, seed=1)


@pytest.mark.parametrize("adaptation", [{"kind": "full"}, {**LORA, "dropout": 0.0}])
def test_gradient_checkpointing_changes_nothing_and_is_switched_off_again(tmp_path, adaptation):
    results = []
    for flag in (False, True):
        calls = []
        model = prepare_language_training(small_decoder(), adaptation).double()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        objective = objective_of(model, row=ENTROPY)
        settings = TrainingSettings(**{**FAST, "steps": 2}, gradient_checkpointing=flag)
        result = train(model, objective, windows(), settings, tmp_path / str(flag), device="cpu")
        assert len(calls) == (4 if flag else 2)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not model.get_input_embeddings()._forward_hooks
        results.append((model.state_dict(), [row[key] for row in result.history for key in ("loss", "gradient_norm")]))
    # Logged in float32.
    assert results[0][1] == pytest.approx(results[1][1], rel=4 * torch.finfo(torch.float32).eps)
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quantity", ["row_entropy", "block_entropy", "key_entropy", "l1_logits", "ball"])
@pytest.mark.parametrize("adaptation", [{"kind": "full"}, LORA])
def test_penalties_reach_queries_and_keys_of_their_layers(quantity, adaptation):
    model = prepare_language_training(small_decoder(), adaptation)
    one = {"quantity": quantity, "weight": 1.0, "layers": [1], "block_size": 8, "num_cells": 4, "sharpness": 2.0}
    chosen = penalties(one=one)
    prepare_penalties(model, chosen, tokens(), seed=0)
    objective = LanguageObjective(chosen, captures=probe(model))
    task = objective(model, {"input_ids": tokens()}, 0)[0]
    plain = objective_of(model)(model, {"input_ids": tokens()}, 0)[0]
    (task - plain).backward()
    found = gradients(model)
    projections = ("k_proj",) if quantity == "ball" else ("q_proj", "k_proj")
    for projection in projections:
        assert any(
            f"layers.1.self_attn.{projection}" in name and value.abs().sum() > 1e-6 for name, value in found.items()
        )
    assert all(value.abs().max() < 1e-5 for name, value in found.items() if "layers.1.mlp" in name)


def test_entropy_penalty_lowers_the_entropy(tmp_path):
    settings = {"steps": 12, "learning_rate": 0.005}
    ends = {}
    for weight in (0.0, 3.0):
        term = {**ENTROPY, "weight": weight}
        _, result = fitted(tmp_path / str(weight), {"kind": "full"}, terms={"row": term}, settings=settings)
        ends[weight] = result.history[-1]["row/entropy"]
    assert ends[3.0] < ends[0.0] - 0.05


def test_training_with_the_sparse_path_active_logs_what_it_realises(tmp_path):
    model = prepare_language_training(small_decoder(), {"kind": "full"})
    ids = tokens(8, 64)
    handle = sparsify(model, DecoderSparsity(0.5, "pooled", 8, 4, dense_tail_blocks=0), record=True)
    objective = LanguageObjective(Penalties({}), sparse=handle)
    settings = TrainingSettings(**{**FAST, "steps": 2})
    result = train(model, objective, TokenWindows(ids), settings, tmp_path, device="cpu")
    expected = handle.realised_sparsity(ids[:4])
    assert expected > 0.2
    assert result.history[0]["realised_sparsity"] == pytest.approx(expected, abs=0.05)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = prepare_language_training(small_decoder(), {"kind": "full"})
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingError, match="'task' is nan in step 0"):
        train(model, LanguageObjective(Penalties({})), windows(), TrainingSettings(**FAST), tmp_path, device="cpu")


def test_windows_are_read_one_by_one_or_many_at_once():
    ids, mask = tokens(5, 9), torch.arange(45).view(5, 9) % 2 == 0
    data = TokenWindows(ids, mask)
    assert len(data) == 5
    assert torch.equal(data[3]["input_ids"], ids[3])
    many = data.__getitems__([4, 0])
    assert torch.equal(many[0]["loss_mask"], mask[4])
    assert torch.equal(many[1]["input_ids"], ids[0])
    for wrong in (ids.float(), ids[0], ids[:, :1]):
        with pytest.raises(InputError, match="windows must be int64"):
            TokenWindows(wrong)
    with pytest.raises(InputError, match="loss_mask must be bool"):
        TokenWindows(ids, mask[:, 1:])


@pytest.mark.parametrize(
    ("adaptation", "sentence"),
    [
        ({"kind": "prefix"}, "must be one of full, lora, got 'prefix'"),
        ({}, "must be one of full, lora, got None"),
        ({"kind": "full", "rank": 4}, "unknown key 'rank' of the adaptation full"),
        ({**LORA, "scale": 1.0}, "unknown key 'scale' of the adaptation lora"),
        ({**LORA, "rank": 0}, "rank of at least 1"),
        ({**LORA, "alpha": -1.0}, "alpha above 0"),
        ({**LORA, "dropout": "none"}, r"dropout in \[0, 1\), got 3, 6.0 and none"),
        ({**LORA, "targets": ["q_prog"]}, "no linear layer 'q_prog'; targets may be attention, linear, down_proj"),
        ({**LORA, "targets": []}, "at least one target"),
    ],
)
def test_an_impossible_adaptation_is_one_sentence_and_changes_nothing(adaptation, sentence):
    model = small_decoder()
    with pytest.raises(ConfigError, match=sentence) as caught:
        prepare_language_training(model, adaptation)
    assert "\n" not in str(caught.value)
    assert all(value.requires_grad for value in model.parameters())


def test_other_models_and_double_additions_are_refused():
    with pytest.raises(ConfigError, match="Linear is no causal language model"):
        prepare_language_training(nn.Linear(2, 2), {"kind": "full"})
    with pytest.raises(ConfigError, match="LlamaModel is no causal language model"):
        prepare_language_training(small_decoder().model, {"kind": "full"})
    with pytest.raises(ConfigError, match="low-rank additions already"):
        low_rank(low_rank(small_decoder()))


@pytest.mark.parametrize(
    ("term", "options", "sentence"),
    [
        ({"quantity": "selection_entropy"}, {}, "a decoder selects no tokens"),
        ({"quantity": "l1_gate"}, {}, "a decoder selects no tokens"),
        ({"quantity": "ball", "points": "tokens"}, {}, "set points: keys"),
        ({"quantity": "row_entropy"}, {}, "need a probe"),
        (None, {"distillation": 0.5}, "needs a teacher"),
        (None, {"distillation": 1.5}, r"distillation must be in \[0, 1\]"),
        (None, {"temperature": 0.0}, "temperature above 0"),
    ],
)
def test_what_an_objective_cannot_have(term, options, sentence):
    chosen = Penalties({}) if term is None else penalties(one={**term, "weight": 1.0})
    with pytest.raises(ConfigError, match=sentence):
        LanguageObjective(chosen, **options)


def test_penalties_of_windows_beyond_the_sliding_window_are_refused():
    model = small_decoder("mistral")
    objective = objective_of(model, row=ENTROPY)
    objective(model, {"input_ids": tokens(2, WINDOW)}, 0)
    with pytest.raises(ConfigError, match="longer than the model's sliding window"):
        objective(model, {"input_ids": tokens(2, WINDOW + 9)}, 0)


def test_mixing_needs_images(tmp_path):
    model = prepare_language_training(small_decoder(), {"kind": "full"})
    objective = LanguageObjective(Penalties({}))
    settings = TrainingSettings(**FAST, mixup=0.5, num_classes=3)
    with pytest.raises(ConfigError, match="mix images, the items of this data set have input_ids"):
        train(model, objective, windows(), settings, tmp_path, device="cpu")
