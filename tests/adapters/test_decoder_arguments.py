"""What a decoder's forward pass may be given (masks, arguments, caches), and what may be done with such a model."""

import pickle
import subprocess
import sys

import pytest
import torch

from entreg.adapters import probe, sparsify
from entreg.errors import ConfigError, InputError
from entreg.sparse import DecoderSparsity
from tests.adapters.every_decoder import build
from tests.adapters.small_decoders import DEPTH, VOCABULARY, small_decoder, tokens, transformers

SPARSE = DecoderSparsity(sparsity=0.4, selection="pooled", block_size=4, pool_size=4, dense_tail_blocks=0, page_size=4)
STEPS_ONLY = DecoderSparsity(sparsity=0.0, decode_sparsity=0.4, page_size=4)
PREFIX = 11


def prefix_mask(batch=2, length=40):
    """(batch, 1, n, n): all tokens of the prefix see each other."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:PREFIX, :PREFIX] = True
    return mask.expand(batch, 1, -1, -1)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mask", [prefix_mask(), prefix_mask(1), additive(prefix_mask())], ids=["bool", "one", "added"])
@torch.no_grad()
def test_masks_that_look_ahead_are_honoured_where_dense_and_refused_where_sparse(mask):
    model, x = small_decoder(), tokens()
    wanted = model(x, attention_mask=mask).logits
    # The test is of no use where the mask does not matter.
    assert not torch.allclose(wanted, model(x).logits, atol=0.1)
    with sparsify(model, 0.0), probe(model) as watching:
        assert torch.equal(model(x, attention_mask=mask).logits, wanted)
    for capture in watching.captures:
        assert not capture.causal
        assert torch.equal(capture.mask, mask)
    with sparsify(model, STEPS_ONLY):
        cache = transformers.DynamicCache(config=model.config)
        assert torch.equal(model(x, attention_mask=mask, past_key_values=cache).logits, wanted)
        assert torch.isfinite(model(x[:, :1], past_key_values=cache).logits).all()
    reason = "bool" if mask.is_floating_point() else "see later ones"
    with sparsify(model, SPARSE), pytest.raises(InputError, match=reason):
        model(x, attention_mask=mask)


@torch.no_grad()
def test_a_decoder_that_is_used_in_both_directions_is_dense_or_refused():
    model, x = small_decoder(), tokens()
    wanted = model(x, is_causal=False).logits
    assert not torch.allclose(wanted, model(x).logits, atol=0.1)
    with sparsify(model, 0.0), probe(model) as watching:
        assert torch.equal(model(x, is_causal=False).logits, wanted)
        assert [(capture.causal, capture.mask) for capture in watching.captures] == [(False, None)] * DEPTH
    with sparsify(model, SPARSE), pytest.raises(InputError, match="both directions"):
        model(x, is_causal=False)


@torch.no_grad()
def test_a_mask_for_one_text_is_for_all():
    model, x = small_decoder().double(), tokens()
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[20:, :20] = False
    with sparsify(model, SPARSE):
        wanted = model(x, attention_mask=mask.expand(2, 1, -1, -1)).logits
        assert torch.equal(model(x, attention_mask=mask[None, None]).logits, wanted)


@torch.no_grad()
def test_masks_that_differ_by_head_are_refused_where_sparse():
    model, x = small_decoder(), tokens()
    mask = torch.ones(2, 4, 40, 40, dtype=torch.bool).tril()
    mask[:, 1, 20:, :20] = False
    wanted = model(x, attention_mask=mask).logits
    with sparsify(model, 0.0), probe(model) as watching:
        assert torch.equal(model(x, attention_mask=mask).logits, wanted)
    assert watching.captures[0].key_mask.all()
    with sparsify(model, SPARSE), pytest.raises(InputError, match="alike for all heads, got 4"):
        model(x, attention_mask=mask)


@torch.no_grad()
def test_the_language_model_of_gemma_3_keeps_its_images_mask():
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 24,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=60
    )
    model, x = transformers.Gemma3ForConditionalGeneration(config).eval(), tokens() % 59 + 1
    x[:, 5:21] = 60
    inputs = {
        "input_ids": x,
        "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "token_type_ids": (x == 60).long(),
    }
    wanted = model(**inputs).logits
    with pytest.raises(InputError, match="pass its language model"):
        sparsify(model, 0.5)
    with sparsify(model.model.language_model, 0.0), probe(model.model.language_model) as watching:
        assert torch.equal(model(**inputs).logits, wanted)
        assert not any(capture.causal for capture in watching.captures)
    with sparsify(model.model.language_model, SPARSE):
        with pytest.raises(InputError, match="see later ones"):
            model(**inputs)
        # Without an image the mask is causal.
        text_only = {"input_ids": x % 60, "token_type_ids": torch.zeros_like(x)}
        assert torch.isfinite(model(**text_only).logits).all()


def test_penalties_do_not_take_a_mask_that_looks_ahead_for_causal():
    from entreg.training.penalties import Penalties, penalty_from_mapping

    model, x = small_decoder(), tokens()
    with probe(model) as watching:
        model(x, attention_mask=prefix_mask())
    penalties = Penalties({"row": penalty_from_mapping({"quantity": "row_entropy", "weight": 0.1})})
    with pytest.raises(ConfigError, match=r"penalty row .*later"):
        penalties(watching.captures, (), 0)


@torch.no_grad()
def test_arguments_that_nobody_knows_are_refused_by_name_and_never_ignored():
    model, x = small_decoder(), tokens()
    wanted = model(x, novelty=1).logits
    known = {"output_hidden_states": True, "position_ids": torch.arange(40)[None], "num_items_in_batch": 4, "new": None}
    with sparsify(model, SPARSE) as handle:
        with pytest.raises(InputError, match="'novelty'"):
            model(x, novelty=1)
        assert torch.isfinite(model(x, **known).logits).all()
        handle.remove()
    with probe(model):
        with pytest.raises(InputError, match="'novelty'"):
            model(x, novelty=1)
        model(x, **known)
    # Stock SDPA ignores it as well ...
    with sparsify(model, 0.0):
        assert torch.equal(model(x, novelty=1).logits, wanted)
    # ... which another implementation may not.
    model.set_attn_implementation("eager")
    with sparsify(model, 0.0):
        with pytest.raises(InputError, match=r"'novelty'.*'eager'"):
            model(x, novelty=1)
        model(x, **known)
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_attention_weights_are_refused():
    model, x = small_decoder(), tokens()
    for change in (lambda: sparsify(model, 0.0), lambda: sparsify(model, SPARSE), lambda: probe(model)):
        with change():
            for options in ({"output_attentions": True}, {"output_attentions": True, "output_hidden_states": True}):
                with pytest.raises(InputError, match="output_attentions=True"):
                    model(x, **options)
            assert torch.isfinite(model(x, output_attentions=False).logits).all()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(x).attentions) == DEPTH
    with sparsify(model, 0.0), pytest.raises(InputError, match="output_attentions=True"):
        model(x)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_layers_that_share_keys_read_them_in_the_cache_of_their_writer(family, implementation):
    model, x = build(family).double(), tokens(1, 60)
    modes = model.config.get_text_config().kv_sharing_modes
    assert "reuse" in modes

    def written():
        return model.generate(
            x, max_new_tokens=5, do_sample=False, cache_implementation=None if implementation == "dynamic" else "static"
        )

    wanted = written()
    with sparsify(model, 0.0), probe(model) as watching:
        assert torch.equal(written(), wanted)
        lengths = [capture.keys.shape[2] for capture in watching.captures]
    # Four of the written tokens were read.
    assert lengths[modes.index("reuse")] in (64, model.config.sliding_window, model.config.sliding_window - 1 + 1)
    with sparsify(model, SPARSE, record=True) as handle:
        ours = written()
        plans = [selection.plan for selection in handle.selections]
    assert ours.shape == wanted.shape
    assert plans[-1] is not None
    assert plans[-1].num_keys == lengths[-1]


@torch.no_grad()
def test_a_stored_model_has_its_path_when_it_is_read_again():
    model, x = small_decoder(), tokens()
    stock = model(x).logits
    with sparsify(model, SPARSE, record=True), probe(model):
        model.generate(x, max_new_tokens=2, do_sample=False)
        wanted = model(x).logits
        twin = pickle.loads(pickle.dumps(model))
    assert not torch.equal(wanted, stock)
    assert torch.equal(twin(x).logits, wanted)
    with sparsify(twin, 0.0):
        assert torch.equal(twin(x).logits, stock)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(twin(x).logits, stock)


@pytest.mark.exhaustive
@torch.no_grad()
def test_a_stored_model_has_its_path_in_a_process_that_has_not_seen_the_adapter(tmp_path):
    model, x = small_decoder(), tokens()
    with sparsify(model, SPARSE):
        stored = {"model": model, "x": x, "wanted": model(x).logits}
        torch.save(stored, tmp_path / "stored.pt")
    script = (
        "import sys, torch\n"
        "from entreg.compat import ensure_torchvision\n"
        "ensure_torchvision()\n"
        "stored = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(stored['model'](stored['x']).logits, stored['wanted'])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "stored.pt")], check=True, timeout=300)


@torch.no_grad()
def test_a_stored_model_that_was_only_watched_is_stock():
    model, x = small_decoder(), tokens()
    model.set_attn_implementation("eager")
    wanted = model(x).logits
    with probe(model):
        twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x).logits, wanted) or twin.config._attn_implementation == "eager"
    assert torch.equal(twin(x).logits, wanted)
    assert not any(module._forward_pre_hooks for module in twin.modules())


class Logits(torch.nn.Module):
    """A model whose output is a tensor, as a trace wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_trace_is_of_the_dense_model_or_refused():
    model, x = small_decoder(), tokens()
    wanted = model(x).logits
    assert torch.equal(torch.jit.trace(Logits(model), x, check_trace=False)(x), wanted)
    with sparsify(model, 0.0), probe(model):
        traced = torch.jit.trace(Logits(model), x, check_trace=False)
        assert torch.equal(traced(x), wanted)
    with sparsify(model, SPARSE), pytest.raises(InputError, match=r"torch\.jit\.trace"):
        torch.jit.trace(Logits(model), x)
