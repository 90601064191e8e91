"""Probes: what they capture against the stock modules, gradients through it, and undo."""

import copy

import pytest
import torch

from entreg.adapters import probe, sparsify
from entreg.errors import InputError
from entreg.regularizer import Term
from entreg.sparse import TokenMerging, TokenSparsity
from entreg.training.penalties import Penalties, PenaltySettings
from tests.adapters.small_models import KINDS, images, small_model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_captures_are_the_stock_modules_inputs(kind):
    model, x = small_model(kind), images()
    wanted, inputs = model(x), []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    with probe(model) as handle:
        assert torch.equal(model(x), wanted)
    for hook in hooks:
        hook.remove()
    assert [capture.layer for capture in handle.captures] == [0, 1, 2, 3]
    for capture, block, tokens in zip(handle.captures, model.blocks, inputs, strict=True):
        attention, n = block.attn, tokens.shape[1]
        assert capture.num_prefix == model.num_prefix_tokens
        rows = (capture.scale * capture.queries @ capture.keys.mT).softmax(-1)
        out = attention.proj(attention.norm((rows @ capture.values).transpose(1, 2).reshape(len(x), n, -1)))
        torch.testing.assert_close(out, attention(block.norm1(tokens)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(capture.tokens, block(tokens), rtol=0, atol=0)


def test_gradient_reaches_the_weights_through_captures():
    model = small_model().train()
    with probe(model, [2]) as handle:
        model(images())
        (capture,) = handle.captures
        for part in (capture.queries, capture.keys, capture.values, capture.tokens):
            model.zero_grad()
            part.square().sum().backward(retain_graph=True)
            assert model.blocks[2].attn.qkv.weight.grad.abs().sum() > 0
            assert model.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
            assert model.blocks[3].attn.qkv.weight.grad is None


@torch.no_grad()
def test_captures_are_of_the_last_pass_and_end_with_remove():
    model = small_model()
    handle = probe(model, [1, 3])
    model(images(2))
    model(images(3))
    assert [len(capture.queries) for capture in handle.captures] == [3, 3]
    handle.remove()
    handle.remove()
    model(images(4))
    assert [len(capture.queries) for capture in handle.captures] == [3, 3]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layers", [[], [4], [-1]])
def test_wrong_layers_are_refused(layers):
    with pytest.raises(InputError, match="layers"):
        probe(small_model(), layers)
    with pytest.raises(InputError, match="supported"):
        probe(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("plan", [TokenSparsity(keep=5, before_layer=2, score_source="previous"), TokenMerging(3)])
def test_block_outputs_are_captured_where_a_path_looks_into_the_block(plan):
    model, x = small_model().train(), images()
    penalties = Penalties({"ball": PenaltySettings("ball", Term(1.0), points="tokens", num_cells=4)})
    with probe(model) as dense:
        model(x)
    penalties.prepare(dense.captures, seed=0)
    with sparsify(model, plan), probe(model) as handle:
        last = model.forward_features(x)
    sizes = [17, 17, 6, 6] if isinstance(plan, TokenSparsity) else [14, 11, 8, 5]
    assert [capture.tokens.shape for capture in handle.captures] == [(3, n, 32) for n in sizes]
    assert torch.equal(model.norm(handle.captures[-1].tokens), last)
    if isinstance(plan, TokenSparsity):
        assert torch.equal(handle.captures[1].tokens, dense.captures[1].tokens)
    penalty, _ = penalties(handle.captures, (), step=0)
    penalty.backward()
    assert all(block.mlp.fc2.weight.grad.abs().sum() > 0 for block in model.blocks)


@torch.no_grad()
def test_a_copy_of_the_model_does_not_report_to_the_probe():
    model = small_model()
    with probe(model) as handle:
        other = copy.deepcopy(model)
        model(images(2))
        tokens = handle.captures[3].tokens
        other(images(3))
        assert [len(capture.queries) for capture in handle.captures] == [2] * 4
        assert handle.captures[3].tokens is tokens
        model.forward_intermediates(images(4))
        assert [len(capture.queries) for capture in handle.captures] == [4] * 4
