"""Probes of decoders: captures against queries and keys by hand, masks of padding, gradients, and undo."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from entreg.adapters import probe, sparsify
from entreg.errors import InputError
from entreg.sparse import DecoderSparsity
from tests.adapters.small_decoders import DEPTH, FAMILIES, HEADS, WINDOW, padding, small_decoder, tokens, transformers

SPARSE = DecoderSparsity(sparsity=0.4, selection="pooled", block_size=4, pool_size=4, dense_tail_blocks=0, page_size=4)


def rotated(x, theta=10000.0):
    """Rotary positions as in Su et al. 2021, in LLaMA's order of halves: (batch, heads, n, d)."""
    n, d = x.shape[2:]
    angles = torch.arange(n)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    turned = torch.cat((-second, first), -1)
    return x * angles.cos().repeat(1, 2) + turned * angles.sin().repeat(1, 2)


@torch.no_grad()
def test_captures_are_queries_keys_and_values_by_hand():
    model, x, inputs = small_decoder(), tokens(), []
    wanted = model(x).logits
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _, args, output: inputs.append(output))
        for layer in model.model.layers
    ]
    with probe(model) as handle:
        assert torch.equal(model(x).logits, wanted)
    for hook in hooks:
        hook.remove()
    assert handle.changed == [f"model.layers.{layer}.self_attn" for layer in range(DEPTH)]
    assert [capture.layer for capture in handle.captures] == list(range(DEPTH))
    for capture, layer, hidden in zip(handle.captures, model.model.layers, inputs, strict=True):
        parts = [
            getattr(layer.self_attn, name)(hidden).unflatten(-1, (heads, 8)).transpose(1, 2)
            for name, heads in (("q_proj", HEADS), ("k_proj", 2), ("v_proj", 2))
        ]
        torch.testing.assert_close(capture.queries, rotated(parts[0]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(capture.keys, rotated(parts[1]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(capture.values, parts[2])
        assert (capture.scale, capture.causal, capture.num_prefix) == (pytest.approx(8**-0.5), True, 0)
        assert capture.mask is capture.key_mask is capture.query_mask is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_captures_explain_the_attention_of_every_family(family):
    """Causal attention of what was captured is what the output projection gets, and nothing is changed."""
    model, x, seen = small_decoder(family), tokens(), []
    mask = padding(side="left")
    wanted = model(x, attention_mask=mask).logits
    hooks = [
        getattr(layer.self_attn, "dense" if family == "phi" else "o_proj").register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        for layer in model.model.layers
    ]
    with probe(model) as handle:
        assert torch.equal(model(x, attention_mask=mask).logits, wanted)
    for hook in hooks:
        hook.remove()
    assert len(handle.captures) == DEPTH
    for capture, entering in zip(handle.captures, seen, strict=True):
        visible = torch.ones(40, 40, dtype=torch.bool).tril() & capture.key_mask[:, None, None]
        if family == "mistral":
            visible = visible.triu(1 - WINDOW)
        out = scaled_dot_product_attention(
            capture.queries, capture.keys, capture.values, attn_mask=visible, scale=capture.scale, enable_gqa=True
        )
        real = capture.query_mask
        assert torch.equal(real, mask.bool())
        torch.testing.assert_close(out.transpose(1, 2).flatten(2)[real], entering[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_masks_say_which_tokens_are_padding(family, side):
    model, x, mask = small_decoder(family), tokens(), padding(side=side)
    with probe(model, [1]) as handle:
        model(x, attention_mask=mask, use_cache=False)
        (capture,) = handle.captures
        assert torch.equal(capture.key_mask, mask.bool())
        assert torch.equal(capture.query_mask, mask.bool())
        for cache in (transformers.DynamicCache(config=model.config), transformers.StaticCache(model.config, 64)):
            model(x[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            model(x[:, 20:], attention_mask=mask, past_key_values=cache)
            (capture,) = handle.captures
            m = capture.keys.shape[2]
            # A sliding window's cache has forgotten the first keys.
            assert m == (40 if family == "llama" else min(40, WINDOW - 1 + 20))
            assert torch.equal(capture.key_mask, mask[:, -m:].bool())
            assert torch.equal(capture.query_mask, mask[:, 20:].bool())


@torch.no_grad()
def test_captures_of_decoding_hold_the_cache():
    model, x = small_decoder(), tokens()
    with probe(model) as handle:
        model(x)
        (wanted, *_) = handle.captures
        for cache in (transformers.DynamicCache(config=model.config), transformers.StaticCache(model.config, 64)):
            model(x[:, :39], past_key_values=cache)
            model(x[:, 39:], past_key_values=cache)
            capture = handle.captures[0]
            torch.testing.assert_close(capture.queries, wanted.queries[:, :, 39:])
            torch.testing.assert_close(capture.keys, wanted.keys)
            torch.testing.assert_close(capture.values, wanted.values)


@torch.no_grad()
def test_captures_are_of_the_last_pass_and_end_with_remove():
    model = small_decoder()
    handle = probe(model, [1])
    model(tokens(2))
    model(tokens(3))
    assert [(capture.layer, len(capture.queries)) for capture in handle.captures] == [(1, 3)]
    handle.remove()
    handle.remove()
    model(tokens(4))
    assert [len(capture.queries) for capture in handle.captures] == [3]
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("sparse_first", [True, False])
@pytest.mark.parametrize("remove_sparse_first", [True, False])
@torch.no_grad()
def test_probe_and_sparsify_in_either_order(sparse_first, remove_sparse_first):
    model, x = small_decoder(), tokens()
    stock = model(x).logits
    with sparsify(model, SPARSE):
        sparse = model(x).logits
    if sparse_first:
        path, watching = sparsify(model, SPARSE), probe(model)
    else:
        watching, path = probe(model), sparsify(model, SPARSE)
    assert torch.equal(model(x).logits, sparse)
    assert len(watching.captures) == DEPTH
    (path if remove_sparse_first else watching).remove()
    assert torch.equal(model(x).logits, stock if remove_sparse_first else sparse)
    assert model.config._attn_implementation == "entreg"
    (watching if remove_sparse_first else path).remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(x).logits, stock)


def penalty_gradients(model, x, handle):
    model.zero_grad()
    loss = model(x, labels=x).loss
    captures = list(handle.captures)
    (
        loss + sum((capture.queries @ capture.keys[:, [0, 0, 1, 1]].mT).square().mean() for capture in captures)
    ).backward()
    assert handle.captures == captures
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("sparsity", [None, SPARSE])
def test_gradients_through_captures_with_and_without_checkpointing(sparsity):
    model, x = small_decoder().train(), tokens()
    if sparsity is not None:
        sparsify(model, sparsity)
    with probe(model) as handle:
        plain = penalty_gradients(model, x, handle)
        model.gradient_checkpointing_enable()
        checkpointed = penalty_gradients(model, x, handle)
    assert len(handle.captures) == DEPTH
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    model.zero_grad()
    model(x, labels=x).loss.backward()
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight.grad, plain[1], rtol=1e-3)


def test_checkpointing_that_loses_gradients_is_refused():
    model, x = small_decoder().train(), tokens()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with probe(model) as handle:
        with pytest.raises(InputError, match="'use_reentrant': False"):
            model(x)
        with torch.no_grad():
            model(x)
        assert len(handle.captures) == DEPTH


def test_layers_that_do_not_exist_are_refused():
    model = small_decoder()
    for layers in ([DEPTH], [-1], []):
        with pytest.raises(InputError, match="layers"):
            probe(model, layers)
    assert model.config._attn_implementation == "sdpa"
