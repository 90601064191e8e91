"""The cache that grows in place against transformers' dynamic cache: the same numbers, bit for bit, and no copies."""

import pytest
import torch
from transformers import DynamicCache

from entreg.adapters import sparsify
from entreg.adapters.growing_cache import GrowingCache, GrowingLayer
from entreg.errors import InputError
from entreg.sparse import DecoderSparsity
from tests.adapters.small_decoders import FAMILIES, padding, small_decoder, tokens

FULL_ATTENTION = sorted(set(FAMILIES) - {"mistral"})


def generated(model, cache, **options):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(tokens(), past_key_values=cache, pad_token_id=0, **settings, **options)
    return out.sequences, torch.stack(out.logits)


def assert_equal(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_generate_gives_the_same_bits_as_with_the_dynamic_cache(family):
    model = small_decoder(family)
    assert_equal(generated(model, GrowingCache(model.config)), generated(model, DynamicCache(config=model.config)))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"attention_mask": padding(side="left")}])
def test_beams_and_padding_too(options):
    model = small_decoder()
    # Beam search has no logits of its sequences, only scores.
    ours, stock = (
        model.generate(tokens(), past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
        for cache in (GrowingCache(model.config), DynamicCache(config=model.config))
    )
    assert torch.equal(ours, stock)


def test_the_sparse_path_reads_it_like_any_other_cache():
    model = small_decoder()
    sparsity = DecoderSparsity(
        sparsity=0.3, selection="pooled", block_size=8, pool_size=8, dense_tail_blocks=0, page_size=8
    )
    with sparsify(model, sparsity):
        assert_equal(generated(model, GrowingCache(model.config)), generated(model, DynamicCache(config=model.config)))


def layer_states(batch=2, heads=3, length=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, length, width, generator=generator) for _ in range(2))


def test_nothing_is_copied_while_there_is_room():
    layer = GrowingLayer()
    keys, _ = layer.update(*layer_states())
    place = keys.data_ptr()
    for seed in range(1, 50):
        keys, values = layer.update(*layer_states(length=1, seed=seed))
        assert keys.data_ptr() == place
    assert keys.shape == values.shape == (2, 3, 54, 4)


def test_all_that_is_stored_stays_when_room_is_made_again_and_again():
    layer, parts = GrowingLayer(), []
    for seed, length in enumerate([1, 300, 1, 400, 7, 900]):
        parts.append(layer_states(length=length, seed=seed))
        keys, values = layer.update(*parts[-1])
    assert torch.equal(keys, torch.cat([part[0] for part in parts], dim=2))
    assert torch.equal(values, torch.cat([part[1] for part in parts], dim=2))


def test_what_is_cropped_is_overwritten_and_what_is_replaced_is_taken_over():
    layer = GrowingLayer()
    first, new = layer_states(), layer_states(length=2, seed=1)
    layer.update(*first)
    layer.crop(-3)
    keys, _ = layer.update(*new)
    assert torch.equal(keys, torch.cat((first[0][:, :, :2], new[0]), dim=2))
    layer.reorder_cache(torch.tensor([1, 1]))
    keys, _ = layer.update(*new)
    assert torch.equal(keys, torch.cat((first[0][[1, 1], :, :2], new[0][[1, 1]], new[0]), dim=2))
    layer.batch_repeat_interleave(2)
    repeated = tuple(part.repeat_interleave(2, dim=0) for part in new)
    keys, _ = layer.update(*repeated)
    assert torch.equal(keys[:, :, -2:], repeated[0])
    assert keys.shape == (4, 3, 8, 4)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(*first)[0], first[0])


def test_given_buffers_are_written_in_place():
    keys, values = layer_states(length=8)
    layer = GrowingLayer.over(keys, values, 6)
    new = layer_states(length=1, seed=1)
    layer.update(*new)
    assert torch.equal(keys[:, :, 6:7], new[0])
    assert torch.equal(values[:, :, 6:7], new[1])
    assert layer.get_seq_length() == 7


def test_gradients_pass_as_in_the_dynamic_cache():
    keys, values = (part.requires_grad_() for part in layer_states())
    layer = GrowingLayer()
    layer.update(keys, values)
    everything, _ = layer.update(keys, values)
    everything.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))


def test_sliding_windows_are_refused():
    with pytest.raises(InputError, match="sliding window of 24"):
        GrowingCache(small_decoder("mistral").config)
