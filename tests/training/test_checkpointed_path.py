"""Gradient checkpointing of a ViT with the sparse path in it: less memory, the same weights to the bit."""

import pytest
import torch

from entreg.adapters import probe, sparsify, vision_model
from entreg.errors import ConfigError
from entreg.sparse import sparsity_from_mapping
from entreg.training.loop import TrainingSettings, train
from entreg.training.penalties import Penalties, penalty_from_mapping
from entreg.training.vision import VisionObjective
from tests.training.tiny import FAST, Digits

PLANS = {
    "tokens": {"kind": "tokens", "keep": 4, "before_layer": 1, "score": "received", "straight_through": True},
    "previous": {"kind": "tokens", "keep": 4, "before_layer": 2, "score": "received", "score_source": "previous"},
    "partition": {"kind": "tokens", "keep": 4, "before_layer": 1, "reduction": "partition"},
    "columns": {"kind": "columns", "keys": 4, "score": "mixed"},
    "gate": {"kind": "tokens", "keep": 4, "before_layer": 0, "score": "gate"},
}


def vit():
    torch.manual_seed(0)
    options = {"img_size": 6, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 3, "num_heads": 2}
    return vision_model("vit_base_patch16_224", num_classes=3, drop_path_rate=0.3, **options)


def trained(directory, plan, flag):
    """The model after three steps, how often its last block ran, and the log."""
    model = vit()
    sparse = sparsify(model, sparsity_from_mapping(PLANS[plan]), record=True)
    penalty = penalty_from_mapping({"quantity": "row_entropy", "weight": 0.5, "num_sampled_queries": None})
    captures = probe(model)
    objective = VisionObjective(Penalties({"rows": penalty}), captures=captures, sparse=sparse)
    runs = []
    model.blocks[2].mlp.register_forward_hook(lambda *_: runs.append(1))
    settings = TrainingSettings(**{**FAST, "steps": 3, "log_every": 1}, gradient_checkpointing=flag)
    extra = sparse.gate.parameters() if sparse.gate is not None else ()
    result = train(model, objective, Digits(), settings, directory, extra_parameters=extra, device="cpu")
    assert not model.blocks.checkpointing
    captures.remove()
    sparse.remove()
    return model, len(runs), result.history


@pytest.mark.parametrize("plan", PLANS)
def test_checkpointing_changes_memory_and_not_weights(tmp_path, plan):
    model, runs, rows = trained(tmp_path / "with", plan, True)
    twin, once, expected = trained(tmp_path / "without", plan, False)
    assert (runs, once) == (6, 3)
    for one, two in zip(rows, expected, strict=True):
        assert {key: one[key] for key in one if key != "seconds"} == {key: two[key] for key in two if key != "seconds"}
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def kept_for_backward(flag):
    """Numbers that a forward pass keeps."""
    model, sizes = vit().train(), []
    sparsify(model, sparsity_from_mapping(PLANS["tokens"]))
    model.blocks.set_checkpointing(flag)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
        model(Digits().images)
    return sum(sizes)


def test_less_is_kept_for_the_backward_pass():
    assert kept_for_backward(True) < 0.5 * kept_for_backward(False)


def test_what_would_choose_otherwise_the_second_time_is_refused():
    for path, options in (
        ({"kind": "token_merging", "r": 1}, {}),
        (PLANS["tokens"], {"generator": torch.Generator()}),
    ):
        model = vit()
        sparsify(model, sparsity_from_mapping(path), **options)
        with pytest.raises(ConfigError, match="gradient checkpointing is not possible with token merging"):
            model.blocks.set_checkpointing(True)
