"""The sparse path in stock decoders: neutral settings and undo to the bit, plans against SDPA under their masks."""

import copy
import gc
from dataclasses import replace

import pytest
import torch

from entreg.adapters import probe, sparsify
from entreg.errors import ConfigError, InputError
from entreg.sparse import ColumnSparsity, DecoderSparsity
from tests.adapters.small_decoders import DEPTH, FAMILIES, VOCABULARY, padding, small_decoder, tokens, transformers

SPARSE = DecoderSparsity(sparsity=0.4, selection="pooled", block_size=4, pool_size=4, dense_tail_blocks=0, page_size=4)


def in_chunks(model, x, cache, sizes, mask=None):
    """Logits of a text given in parts, the parts before in the cache."""
    parts, start = [], 0
    for size in sizes:
        seen = None if mask is None else mask[:, : start + size]
        part = x[:, start : start + size]
        parts.append(model(part, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(parts, 1)


def written(model, x, **options):
    mask = padding(side="left", count=9)
    return model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)


CASES = {
    "prefill": lambda model, x: model(x).logits,
    "no cache": lambda model, x: model(x, use_cache=False).logits,
    "left padding": lambda model, x: model(x, attention_mask=padding(side="left")).logits,
    "right padding": lambda model, x: model(x, attention_mask=padding(side="right")).logits,
    "packed": lambda model, x: model(x, position_ids=torch.arange(40)[None] % 17, use_cache=False).logits,
    "chunks": lambda model, x: in_chunks(model, x, transformers.DynamicCache(config=model.config), (16, 15, 9)),
    "padded chunks": lambda model, x: in_chunks(
        model, x, transformers.DynamicCache(config=model.config), (16, 15, 9), padding(side="left")
    ),
    "decoding": lambda model, x: in_chunks(model, x, transformers.DynamicCache(config=model.config), (36, 1, 1, 1, 1)),
    "static cache": lambda model, x: in_chunks(model, x, transformers.StaticCache(model.config, 48), (20, 13, 5, 1, 1)),
    "padded static cache": lambda model, x: in_chunks(
        model, x, transformers.StaticCache(model.config, 48), (20, 13, 5, 1, 1), padding(side="left")
    ),
    "greedy": lambda model, x: written(model, x),
    "beams": lambda model, x: written(model, x, num_beams=3),
    "greedy, static cache": lambda model, x: written(model, x, cache_implementation="static"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sparsity_zero_gives_the_stock_outputs_bit_for_bit(family, case):
    model, x = small_decoder(family), tokens()
    wanted = CASES[case](model, x)
    with sparsify(model, 0.0):
        assert torch.equal(CASES[case](model, x), wanted)
    assert torch.equal(CASES[case](model, x), wanted)


@torch.no_grad()
def test_prompts_and_steps_can_each_be_dense():
    model, x = small_decoder(), tokens()
    cache = transformers.DynamicCache(config=model.config)
    prompt, step = model(x[:, :39], past_key_values=cache).logits, model(x[:, 39:], past_key_values=cache).logits
    for prompt_sparsity, step_sparsity in ((0.0, 0.4), (0.4, 0.0)):
        cache = transformers.DynamicCache(config=model.config)
        with sparsify(
            model,
            DecoderSparsity(
                sparsity=prompt_sparsity,
                selection="pooled",
                decode_sparsity=step_sparsity,
                block_size=4,
                pool_size=4,
                dense_tail_blocks=0,
                page_size=4,
            ),
        ):
            assert torch.equal(model(x[:, :39], past_key_values=cache).logits, prompt) == (prompt_sparsity == 0)
            if prompt_sparsity > 0:
                cache = transformers.DynamicCache(config=model.config)
                with sparsify(copy.deepcopy(model), 0.0) as dense:
                    dense.model(x[:, :39], past_key_values=cache)
            assert torch.equal(model(x[:, 39:], past_key_values=cache).logits, step) == (step_sparsity == 0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sparsity_zero_gives_the_stock_outputs_in_bfloat16(family):
    model, x = small_decoder(family).to(torch.bfloat16), tokens()
    for case in ("left padding", "decoding", "greedy"):
        wanted = CASES[case](model, x)
        with sparsify(model, 0.0):
            assert torch.equal(CASES[case](model, x), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sparsity_zero_gives_the_stock_gradients_in_training(checkpointing):
    model, x = small_decoder(attention_dropout=0.2).train(), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(x, labels=x).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    wanted = gradients()
    with sparsify(model, 0.0), probe(model):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))


def stock_logits_under(model, masks, x, **options):
    """The stock model with a mask of its own for the SDPA of every layer."""
    hooks = []
    for layer, mask in zip(model.model.layers, masks, strict=True):

        def swap(_, args, kwargs, mask=mask):
            given = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": mask if given is None else mask & given}

        hooks.append(layer.self_attn.register_forward_pre_hook(swap, with_kwargs=True))
    try:
        return model(x, **options).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sparse_logits_are_the_stock_models_under_the_plans_masks(family, side):
    model, x = small_decoder(family).double(), tokens()
    mask = None if side is None else padding(side=side)
    with sparsify(model, SPARSE, record=True) as handle:
        sparse = model(x, attention_mask=mask).logits
        plans = [selection.plan for selection in handle.selections]
    assert [selection.layer for selection in handle.selections] == list(range(DEPTH))
    assert all(plan.sparsity > 0.2 for plan in plans)
    wanted = stock_logits_under(model, [plan.to_mask() for plan in plans], x, attention_mask=mask)
    real = torch.ones_like(x) if mask is None else mask
    assert not torch.allclose(sparse, model(x, attention_mask=mask).logits, atol=1e-3)
    assert torch.isfinite(sparse).all()
    torch.testing.assert_close(sparse[real.bool()], wanted[real.bool()], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_sparse_chunks_and_decoding_are_the_stock_models_under_the_plans_masks():
    model, x = small_decoder().double(), tokens(length=96)
    sparse_cache, cache = transformers.DynamicCache(config=model.config), transformers.DynamicCache(config=model.config)
    start = 0
    for size in (60, 33, 1, 1, 1):
        part = x[:, start : start + size]
        start += size
        with sparsify(model, SPARSE, record=True) as handle:
            sparse = model(part, past_key_values=sparse_cache).logits
        masks = [selection.plan.to_mask() for selection in handle.selections]
        assert all(mask.shape[2:] == (size, start) and not mask.all() for mask in masks)
        wanted = stock_logits_under(model, masks, part, past_key_values=cache)
        torch.testing.assert_close(sparse, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_static_cache_makes_no_difference():
    model, x = small_decoder().double(), tokens(length=96)
    sizes = (60, 33, 1, 1, 1)
    with sparsify(model, SPARSE, record=True) as handle:
        wanted = in_chunks(model, x, transformers.DynamicCache(config=model.config), sizes)
        realised = [selection.plan.sparsity for selection in handle.selections]
        out = in_chunks(model, x, transformers.StaticCache(model.config, 128), sizes)
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
        assert [selection.plan.sparsity for selection in handle.selections] == pytest.approx(realised)


@torch.no_grad()
def test_other_layers_stay_dense():
    model, x = small_decoder(), tokens()
    only = replace(SPARSE, layers=(1,))
    with probe(model) as stock:
        model(x)
    with sparsify(model, only, record=True) as handle, probe(model) as sparse:
        model(x)
        assert handle.changed == ["model.layers.1.self_attn"]
        (selection,) = handle.selections
        assert selection.layer == 1
        # The second layer's input is the first one's output.
        assert torch.equal(sparse.captures[1].queries, stock.captures[1].queries)
        assert handle.realised_sparsity(x) == pytest.approx(selection.plan.sparsity / DEPTH)


@torch.no_grad()
def test_realised_sparsity_is_that_of_the_masks_and_changes_nothing():
    model, x = small_decoder().train(), tokens()
    handle = sparsify(model, SPARSE)
    realised = handle.realised_sparsity(x)
    assert model.training
    assert handle.selections == []
    assert not handle.record
    handle = sparsify(model, SPARSE, record=True)
    model(x)
    causal = torch.ones(40, 40).tril().sum().item()
    left = [1 - selection.plan.to_mask().double().sum((2, 3)).mean().item() / causal for selection in handle.selections]
    spent = [selection.plan.selection_entries / causal for selection in handle.selections]
    assert realised == pytest.approx((sum(left) - sum(spent)) / DEPTH)
    assert 0.4 <= realised < 0.8
    assert sparsify(model, 0.0).realised_sparsity(x, padding(side="left")) == 0
    assert len(handle.selections) == DEPTH


@torch.no_grad()
def test_kernels_name_what_runs():
    model, x = small_decoder(), tokens()
    assert sparsify(model, 0.0).kernels(x) == ["flash"] * DEPTH
    assert len(sparsify(model, SPARSE).kernels(x, padding(side="left"))) >= DEPTH


@torch.no_grad()
def test_summaries_of_pages_follow_the_cache_and_die_with_it():
    model, x = small_decoder(), tokens(3)
    handle = sparsify(model, DecoderSparsity(sparsity=0.0, decode_sparsity=0.6, page_size=4))
    cache, twin = transformers.DynamicCache(config=model.config), transformers.DynamicCache(config=model.config)

    def step(token, cache, twin):
        logits = model(token, past_key_values=cache).logits
        # The same keys in another cache of which nothing is known.
        handle.pages.pop(twin, None)
        torch.testing.assert_close(logits, model(token, past_key_values=twin).logits, rtol=0, atol=0)

    step(x[:, :30], cache, twin)
    assert not torch.equal(model(x[:, 30:31], past_key_values=copy.deepcopy(cache)).logits, model(x[:, :31]).logits)
    for place in range(30, 36):
        step(x[:, place : place + 1], cache, twin)
    for change in (
        lambda each: each.crop(-5),
        lambda each: each.reorder_cache(torch.tensor([2, 0, 0])),
        lambda each: each.batch_select_indices(torch.tensor([1, 0])),
    ):
        change(cache)
        change(twin)
        batch = cache.layers[0].keys.shape[0]
        for place in range(3):
            step(x[:batch, place : place + 1], cache, twin)
    assert set(handle.pages[cache]) == set(range(DEPTH))
    del cache, twin
    gc.collect()
    assert len(handle.pages) == 0


def test_gradients_pass_through_the_sparse_path_with_and_without_checkpointing():
    model, x = small_decoder().train(), tokens()
    wanted = None
    with sparsify(model, SPARSE, record=True) as handle:
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(x, labels=x).loss.backward()
            assert len(handle.selections) == DEPTH
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            if wanted is not None:
                assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
            wanted = gradients
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_remove_restores_the_stock_model():
    model, x = small_decoder(), tokens()
    wanted, keys = model(x).logits, list(model.state_dict())
    handle = sparsify(model, SPARSE)
    assert handle.active
    assert not torch.equal(model(x).logits, wanted)
    assert list(model.state_dict()) == keys
    assert "entreg" not in repr(model.config.to_dict())
    handle.remove()
    handle.remove()
    assert not handle.active
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(x).logits, wanted)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not any("entreg" in name for name in vars(module))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_models_own_attention_implementation_comes_back(implementation):
    model, x = small_decoder(), tokens()
    model.set_attn_implementation(implementation)
    wanted = model(x).logits
    with sparsify(model, SPARSE):
        assert model.config._attn_implementation == "entreg"
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(x).logits, wanted)


@torch.no_grad()
def test_a_second_sparsify_replaces_the_first():
    model, x = small_decoder(), tokens()
    wanted = model(x).logits
    first = sparsify(model, SPARSE)
    second = sparsify(model.model, DecoderSparsity(sparsity=0.0))
    assert (first.active, second.active) == (False, True)
    first.remove()
    assert torch.equal(model(x).logits, wanted)
    assert model.config._attn_implementation == "entreg"
    second.remove()
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_copy_of_the_model_has_the_path_and_loses_it_by_itself():
    model, x = small_decoder(), tokens()
    wanted = model(x).logits
    handle = sparsify(model, SPARSE, record=True)
    watching = probe(model)
    sparse = model(x).logits
    twin = copy.deepcopy(model)
    seen = watching.captures
    assert torch.equal(twin(x).logits, sparse)
    assert watching.captures is seen
    handle.remove()
    watching.remove()
    assert torch.equal(twin(x).logits, sparse)
    assert torch.equal(model(x).logits, wanted)
    replaced = sparsify(twin, 0.0)
    assert torch.equal(twin(x).logits, wanted)
    replaced.remove()
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "sdpa")
    assert not any(module._forward_pre_hooks for module in twin.modules())


@torch.no_grad()
def test_a_copy_of_a_model_that_is_only_watched_is_stock():
    model, x = small_decoder(), tokens()
    with probe(model):
        twin = copy.deepcopy(model)
    assert twin.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in twin.modules())
    assert torch.equal(twin(x).logits, model(x).logits)
    with sparsify(twin, SPARSE, record=True) as handle:
        twin(x)
        assert len(handle.selections) == DEPTH


def test_works_inside_a_peft_model():
    from peft import LoraConfig, get_peft_model

    model, x = small_decoder(), tokens()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
    wanted = adapted(x).logits
    with sparsify(adapted, 0.0), probe(adapted) as watching:
        assert torch.equal(adapted(x).logits, wanted)
        assert len(watching.captures) == DEPTH
    with sparsify(adapted, SPARSE, record=True) as handle:
        adapted(x, labels=x).loss.backward()
        assert len(handle.selections) == DEPTH
        assert handle.changed[0].endswith("model.layers.0.self_attn")
        assert handle.realised_sparsity(x) > 0.3
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
    assert torch.equal(adapted(x).logits, wanted)


def test_works_under_accelerate(request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # The state is the process's own: another precision, before or after this test, would be refused.
    AcceleratorState._reset_state(True)
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    model, x = small_decoder(), tokens()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    wanted = prepared(x).logits
    with sparsify(prepared, 0.0):
        assert torch.equal(prepared(x).logits, wanted)
    with sparsify(prepared, SPARSE, record=True) as handle:
        prepared(x)
        assert len(handle.selections) == DEPTH
    assert torch.equal(prepared(x).logits, wanted)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_runs_the_path():
    model, x = small_decoder(), tokens()
    compiled = torch.compile(model, backend="eager")
    with sparsify(model, SPARSE, record=True) as handle:
        wanted = CASES["static cache"](model, x)
        torch.testing.assert_close(
            in_chunks(compiled, x, transformers.StaticCache(model.config, 48), (20, 13, 5, 1, 1)), wanted
        )
        assert len(handle.selections) == DEPTH


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
UNSUPPORTED = {
    "encoder with a decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    ),
    "one causal attention": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "soft cap": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)),
    "sinks": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, num_local_experts=2)),
    "replaced": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
    "causal attention in every": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    ),
    "several models": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SMALL),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8
            ),
        )
    ),
    r"timm's .* and transformers' decoders": lambda: torch.nn.Linear(3, 3),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_models_that_cannot_have_it_are_refused_before_anything_changes(reason):
    model = UNSUPPORTED[reason]()
    for change in (lambda: sparsify(model, 0.5), lambda: probe(model)):
        with pytest.raises(InputError, match=rf"{reason}.*") as caught:
            change()
        assert "nothing was changed; supported are" in str(caught.value)
    assert not any("entreg" in name for module in model.modules() for name in vars(module))


def test_plans_that_do_not_fit_are_refused():
    model = small_decoder()
    for sparsity in (1.0, -0.1, "much", True, ColumnSparsity(sparsity=0.5)):
        with pytest.raises(ConfigError):
            sparsify(model, sparsity)
    with pytest.raises(ConfigError, match=f"layers must be below {DEPTH}.*, got {DEPTH}"):
        sparsify(model, DecoderSparsity(sparsity=0.5, layers=(0, DEPTH)))
    assert model.config._attn_implementation == "sdpa"


def test_what_the_path_cannot_do_is_an_error_not_a_dense_pass():
    model, x = small_decoder(attention_dropout=0.1), tokens()
    with sparsify(model, SPARSE):
        with pytest.raises(InputError, match="attention_dropout=0"):
            model.train()(x)
        model.eval()
        with pytest.raises(InputError, match="bool"):
            model(x, attention_mask=torch.zeros(2, 1, 40, 40))
        model.set_attn_implementation("eager")
        with pytest.raises(InputError, match="'eager'"):
            model(x)
    assert model.config._attn_implementation == "sdpa"
