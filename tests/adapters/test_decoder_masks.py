"""Sparse decoders in padded and packed batches, and under speculative decoding: as one text alone, token by token."""

import pytest
import torch
from transformers import DynamicCache

from entreg.adapters import sparsify
from entreg.sparse import DecoderSparsity
from entreg.sparse.decoder.decoding import MOST_WRITTEN
from tests.adapters.small_decoders import FAMILIES, small_decoder, tokens

SPARSE = {
    "sparsity": 0.4,
    "selection": "pooled",
    "block_size": 4,
    "pool_size": 4,
    "page_size": 4,
    "dense_tail_blocks": 0,
}
LENGTHS = (96, 57, 70)


def padded(x, side):
    """Texts of several lengths in one batch, and the mask of their tokens."""
    mask = torch.zeros_like(x)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(x.shape[1] - length, None) if side == "left" else slice(length)] = 1
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_neither_logits_nor_sparsity(family, side):
    model, x = small_decoder(family).double(), tokens(3, 96)
    mask = padded(x, side)
    other = torch.where(mask.bool(), x, (x + 5) % 50 + 2)
    # As generate counts them: rotary positions are rounded to float32.
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with sparsify(model, DecoderSparsity(**SPARSE), record=True) as handle:
        found = model(x, **options).logits
        plans = [selection.plan for selection in handle.selections]
        assert torch.equal(
            torch.where(mask.bool()[..., None], found, 0.0),
            torch.where(mask.bool()[..., None], model(other, **options).logits, 0.0),
        )
        left_out = 0.0
        for row in range(3):
            real = mask[row].bool()
            alone = model(x[row][real][None]).logits
            torch.testing.assert_close(found[row][real][None], alone, rtol=1e-9, atol=1e-9)
            plan = handle.selections[0].plan
            assert plan.sparsity >= 0.4
            left_out += plan.sparsity * plan.allowed_entries
        together = plans[0]
        assert together.sparsity * together.allowed_entries == pytest.approx(left_out)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_a_padded_prompt_writes_what_it_writes_alone(family, cache):
    # In float64, so that no choice between equal tokens hangs on rounding.
    model, x = small_decoder(family).double(), tokens(3, 96)
    mask = padded(x, "left")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    with sparsify(model, DecoderSparsity(**SPARSE), record=True) as handle:
        together = model.generate(x, attention_mask=mask, **options)[:, 96:]
        last = handle.selections[0].plan
        assert last is not None
        for row, length in enumerate(LENGTHS):
            text = x[row, 96 - length :][None]
            assert torch.equal(model.generate(text, **options)[0, length:], together[row])
            assert handle.selections[0].plan.sparsity > 0.3
        dense = sparsify(model, 0.0)
        assert not torch.equal(model.generate(x, attention_mask=mask, **options)[:, 96:], together)
        dense.remove()


@torch.no_grad()
def test_packed_documents_are_as_alone():
    model, x = small_decoder().double(), tokens(1, 120)
    lengths = (50, 70)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with sparsify(model, DecoderSparsity(**SPARSE), record=True) as handle:
        packed = model(x, position_ids=positions, use_cache=False).logits
        assert handle.selections[0].plan.sparsity >= 0.4
        alone = [model(part, use_cache=False).logits for part in x.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decode_sparsity", [None, 0.6, 0.0])
@torch.no_grad()
def test_speculative_decoding_is_lossless(decode_sparsity):
    model, x = small_decoder().double(), tokens(1, 80)
    # Something to look up, often rightly.
    x[:, 40:] = x[:, :40]
    options = {"max_new_tokens": 40, "do_sample": False}
    passes = []
    hook = model.model.register_forward_hook(lambda _, args, out: passes.append(out.last_hidden_state.shape[1]))
    with sparsify(model, DecoderSparsity(**SPARSE, decode_sparsity=decode_sparsity), record=True) as handle:
        wanted = model.generate(x, **options)
        assert passes[1:] == [1] * (len(passes) - 1)
        assert (handle.selections[0].plan is None) == (decode_sparsity == 0.0)
        passes.clear()
        # More guesses a time, too, than a pass may have otherwise and be decoding.
        for guesses, least in ((10, 2), (MOST_WRITTEN + 8, MOST_WRITTEN + 1)):
            assert torch.equal(model.generate(x, prompt_lookup_num_tokens=guesses, **options), wanted)
            assert max(passes[1:]) >= least
            passes.clear()
        # Twenty guesses a time, as by default, whatever the assistant thinks of them.
        assistant = small_decoder(num_hidden_layers=1).double()
        assistant.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(model.generate(x, assistant_model=assistant, **options), wanted)
        assert max(passes[1:]) == 21
    hook.remove()


@torch.no_grad()
def test_logits_of_more_tokens_than_there_are_may_be_asked_for():
    model, x = small_decoder().double(), tokens(2, 60)
    with sparsify(model, DecoderSparsity(**SPARSE)):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(x[:, :40], past_key_values=cache)
        wanted = model(x[:, 40:], past_key_values=caches[0]).logits
        assert torch.equal(model(x[:, 40:], past_key_values=caches[1], logits_to_keep=30).logits, wanted)
