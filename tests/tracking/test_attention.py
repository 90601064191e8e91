"""What is tracked of attention, against attention written out by hand; looking does not change the training."""

import math

import pytest
import torch

from entreg.adapters import sparsify
from entreg.adapters.language_models import random_language_model
from entreg.sparse import TokenSparsity
from entreg.tracking import NoTracker, TrackerSettings
from entreg.tracking.attention import AttentionWatch
from entreg.training.loop import TrainingSettings, train
from entreg.training.penalties import Penalties
from entreg.training.vision import VisionObjective
from tests.tracking.vit import Images, transformer
from tests.training.tiny import FAST


class Told(NoTracker):
    """Remembers what it was told."""

    def __init__(self):
        self.histograms, self.rows = {}, {}

    def histogram(self, name, values, step):
        self.histograms[name, step] = values

    def log(self, row, step):
        self.rows[step] = dict(row)


def entropies(q, k, scale, causal):
    """(batch, heads) mean row entropies, the sums written out."""
    logits = (q @ k.transpose(-1, -2)).double() * scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    weights = torch.softmax(logits, -1)
    return -(weights * weights.clamp_min(1e-300).log()).sum(-1).mean(-1)


def test_histograms_and_supports_of_a_vit_are_those_of_its_attention():
    model, images, told = transformer(), Images().images[:4], Told()
    with torch.no_grad():
        AttentionWatch(told, TrackerSettings(attention_queries=None), lambda model: model(images))(model, 7)
        tokens = model.patch_embed(images)
        tokens = model._pos_embed(tokens)
        for layer, block in enumerate(model.blocks):
            qkv = block.attn.qkv(block.norm1(tokens)).reshape(4, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
            wanted = entropies(qkv[0], qkv[1], 8**-0.5, causal=False)
            found = told.histograms[f"row_entropy/layer_0{layer}", 7]
            assert found.double().numpy() == pytest.approx(wanted.numpy(), rel=1e-5)
            support = told.rows[7][f"row_support/layer_0{layer}"]
            assert support == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
            assert 1 < support < 17
            tokens = block(tokens)
    assert set(told.rows) == {7}


def test_those_of_a_decoder_are_causal():
    language = random_language_model(
        "smollm2_135m",
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        seed=0,
        dtype="float32",
        device="cpu",
        attention="sdpa",
    )
    model, told = language.model.eval(), Told()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        AttentionWatch(told, TrackerSettings(attention_queries=None), lambda model: model(input_ids=ids))(model, 0)
        # With nearly equal weights row i has entropy log(i + 1).
        uniform = sum(math.log(row + 1) for row in range(12)) / 12
    assert told.histograms["row_entropy/layer_00", 0].shape == (2, 2)
    assert told.histograms["row_entropy/layer_00", 0].numpy() == pytest.approx(uniform, rel=0.02)


def test_looking_leaves_the_training_as_it_is_to_the_bit(tmp_path):
    weights, rows, data = [], [], Images()
    for name, watched in (("with", True), ("without", False)):
        model, told = transformer(), Told()
        # A path that draws rows at random while training.
        sparse = sparsify(model, TokenSparsity(keep=6, before_layer=1, score="mixed", num_sampled_queries=4))
        watch = AttentionWatch(told, TrackerSettings(attention_every=5), lambda model: model(data.images[:3]))
        settings = TrainingSettings(**{**FAST, "ema_decay": 0.5})
        objective = VisionObjective(Penalties({}), sparse=sparse)
        result = train(
            model, objective, data, settings, tmp_path / name, device="cpu", watch=watch if watched else None
        )
        sparse.remove()
        assert set(told.rows) == ({5, 10, 12} if watched else set())
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in result.history])
    assert torch.equal(*weights)
    assert rows[0] == rows[1]


def test_a_look_that_fails_is_told_once_and_stops_nothing(tmp_path, capfd):
    def forward(model):
        raise torch.OutOfMemoryError("no memory for this")

    model = transformer()
    watch = AttentionWatch(Told(), TrackerSettings(attention_every=2), forward)
    settings = TrainingSettings(**FAST)
    result = train(model, VisionObjective(Penalties({})), Images(), settings, tmp_path, device="cpu", watch=watch)
    assert result.steps == 12
    assert capfd.readouterr().err.count("no memory for this") == 1
