"""The sparse path in stock models: neutral settings and undo to the bit, plans against slow code on stock blocks."""

import copy
import math

import pytest
import torch
from torch import nn

from entreg.adapters import probe, sparsify
from entreg.errors import ConfigError, InputError
from entreg.sparse import (
    ColumnSparsity,
    Combined,
    EntropyBudget,
    TokenMerging,
    TokenSparsity,
    recorded_kernels,
)
from tests.adapters.small_models import KINDS, images, small_model

PATCHES = 16
PLANS = {
    "drop": TokenSparsity(keep=5),
    "stem": TokenSparsity(keep=5, before_layer=0),
    "previous": TokenSparsity(keep=5, score_source="previous"),
    "merge": TokenSparsity(keep=5, reduction="merge"),
    "partition": TokenSparsity(keep=5, reduction="partition"),
    "fuse": TokenSparsity(keep=5, reduction="fuse"),
    "columns": ColumnSparsity(keys=7),
    "merging": TokenMerging(2),
    "combined": Combined((TokenSparsity(keep=9), ColumnSparsity(keys=7))),
}


def embedded(model, x):
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def answer(model, tokens):
    return model.forward_head(model.norm(tokens))


def exact_scores(block, x, prefix):
    """Half received, half prefix attention over all rows, mean over the heads; plain operations, stock weights."""
    attention = block.attn
    b, n, _ = x.shape
    q, k, _ = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    rows = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    received = rows.mean(2)
    return (received if prefix == 0 else 0.5 * received + 0.5 * rows[:, :, :prefix].mean(2)).mean(1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sparsity_zero_gives_the_stock_logits_bit_for_bit(kind, fused):
    model, x = small_model(kind, fused=fused), images()
    wanted = model(x)
    for neutral in (0.0, TokenSparsity(sparsity=0.0), TokenSparsity(keep=PATCHES)):
        with sparsify(model, neutral):
            assert torch.equal(model(x), wanted)
        with sparsify(model, neutral), torch.autocast("cpu", dtype=torch.bfloat16):
            sparse = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sparse, model(x))


def test_sparsity_zero_gives_the_stock_gradients_in_training():
    model, x = small_model().train(), images()
    model(x).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with sparsify(model, 0.0):
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_remove_restores_the_model_bit_for_bit(name):
    model, x = small_model(), images()
    wanted = model(x)
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {module: set(vars(module)) for module in modules.values()}
    handle = sparsify(model, PLANS[name])
    assert handle.changed
    assert list(model.state_dict()) == list(state)
    assert not torch.equal(model(x), wanted)
    model.train()
    handle.remove()
    handle.remove()
    assert all(module.training for module in model.modules())
    model.eval()
    assert dict(model.named_modules()) == modules
    assert {module: set(vars(module)) for module in model.modules()} == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_a_second_call_replaces_the_first():
    model, x = small_model(), images()
    stock = model(x)
    with sparsify(model, TokenSparsity(keep=3)):
        wanted = model(x)
    first = sparsify(model, TokenSparsity(keep=9))
    second = sparsify(model, TokenSparsity(keep=3))
    assert torch.equal(model(x), wanted)
    first.remove()
    assert torch.equal(model(x), wanted)
    second.remove()
    assert torch.equal(model(x), stock)


@pytest.mark.parametrize("before_layer", [0, 2])
@pytest.mark.parametrize("kind", ["class token", "average", "registers", "qk norm", "distilled"])
@torch.no_grad()
def test_dropping_is_the_stock_blocks_on_the_highest_scores(kind, before_layer):
    model, x = small_model(kind), images()
    prefix = model.num_prefix_tokens
    tokens = embedded(model, x)
    for block in model.blocks[:before_layer]:
        tokens = block(tokens)
    scores = exact_scores(model.blocks[before_layer], tokens, prefix)
    order = scores[:, prefix:].argsort(dim=-1, descending=True)[:, :5].sort(-1).values + prefix
    kept = torch.cat((torch.arange(prefix).expand(len(x), -1), order), 1)
    tokens = torch.stack([one[rows] for one, rows in zip(tokens, kept, strict=True)])
    for block in model.blocks[before_layer:]:
        tokens = block(tokens)
    wanted = answer(model, tokens)
    plan = TokenSparsity(keep=5, before_layer=before_layer, num_sampled_queries=None)
    with sparsify(model, plan, record=True) as handle:
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    (selection,) = handle.selections
    assert torch.equal(selection.kept, kept)
    torch.testing.assert_close(selection.scores, scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_merged_tokens_attract_attention_by_their_size(fused):
    """Stock blocks on the unmerged tokens, all members of a part replaced by its mean, are the same attention."""
    model, x = small_model(fused=fused), images()
    with sparsify(model, TokenSparsity(keep=5, before_layer=3, reduction="merge"), record=True) as handle:
        merged = model.forward_features(x)
    assignment = handle.selections[0].assignment
    tokens = embedded(model, x)
    for block in model.blocks[:3]:
        tokens = block(tokens)
    copies = torch.empty_like(tokens)
    for image in range(len(x)):
        for part in range(merged.shape[1]):
            members = assignment[image] == part
            copies[image, members] = tokens[image, members].mean(0)
    wanted = model.norm(model.blocks[3](copies))
    for image in range(len(x)):
        torch.testing.assert_close(merged[image, assignment[image]], wanted[image], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_columns_are_stock_attention_under_the_mask_of_their_plan(fused):
    model, x = small_model(fused=fused), images()
    with sparsify(model, ColumnSparsity(keys=7), record=True) as handle:
        sparse = model(x)
    tokens = embedded(model, x)
    assert [selection.layer for selection in handle.selections] == [0, 1, 2, 3]
    for block, selection in zip(model.blocks, handle.selections, strict=True):
        mask = torch.zeros(len(x), 2, 1, 17, dtype=torch.bool).scatter_(-1, selection.kept.unsqueeze(2), True)
        assert mask.sum(-1).eq(7).all()
        assert mask[..., 0].all()
        tokens = block(tokens, attn_mask=mask.expand(-1, -1, 17, -1))
    torch.testing.assert_close(sparse, answer(model, tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_selections_are_in_original_coordinates_after_several_reductions():
    model, x = small_model("registers"), images()
    prefix = model.num_prefix_tokens
    plan = Combined(
        tuple(TokenSparsity(keep=k, before_layer=b, num_sampled_queries=None) for b, k in ((1, 10), (2, 6), (3, 3)))
    )
    with sparsify(model, plan, record=True) as handle:
        sparse = model(x)
    tokens, positions = model.blocks[0](embedded(model, x)), torch.arange(PATCHES + prefix).expand(len(x), -1)
    for layer, keep in ((1, 10), (2, 6), (3, 3)):
        scores = exact_scores(model.blocks[layer], tokens, prefix)
        best = scores[:, prefix:].argsort(dim=-1, descending=True)[:, :keep].sort(-1).values + prefix
        rows = torch.cat((torch.arange(prefix).expand(len(x), -1), best), 1)
        tokens, positions = torch.take_along_dim(tokens, rows[..., None], 1), positions.gather(1, rows)
        assert torch.equal(handle.selections[layer - 1].kept, positions)
        tokens = model.blocks[layer](tokens)
    torch.testing.assert_close(sparse, answer(model, tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_realised_sparsity_is_the_count_of_entries():
    model, x = small_model(), images()
    n, sampled = 17, 4
    rows = (sampled + 1) * n  # sampled queries and the class token's row
    cases = {
        TokenSparsity(keep=5, before_layer=1, num_sampled_queries=sampled): n**2 + rows + 3 * 6**2,
        TokenSparsity(keep=5, before_layer=0, num_sampled_queries=sampled): rows + 4 * 6**2,
        TokenSparsity(keep=5, before_layer=1, score="random"): n**2 + 3 * 6**2,
        ColumnSparsity(keys=5, num_sampled_queries=sampled): 4 * (rows + 5 * n),
        ColumnSparsity(keys=5, num_sampled_queries=sampled, layers=(2,)): 3 * n**2 + rows + 5 * n,
        TokenMerging(2): 17**2 + 15**2 + 13**2 + 11**2,
    }
    for plan, entries in cases.items():
        with sparsify(model, plan) as handle:
            assert handle.realised_sparsity(x) == pytest.approx(1 - entries / (4 * n**2)), plan


@torch.no_grad()
def test_an_image_of_its_own_budget_does_not_depend_on_its_batch():
    model, x = small_model("no pooling"), images(8)
    prefix = model.num_prefix_tokens
    plan = TokenSparsity(entropy_budget=EntropyBudget(0.6, 2, 14))
    with sparsify(model, plan, record=True) as handle:
        together = model(x)[:, :prefix]
        counts = (handle.selections[0].kept >= 0).sum(-1)
        alone = torch.cat([model(one[None])[:, :prefix] for one in x])
    assert len(counts.unique()) > 1
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_scores_and_gate():
    model, x = small_model(), images()
    logits, gradients = [], []
    for straight_through in (False, True):
        model.zero_grad()
        with sparsify(model, TokenSparsity(keep=5, straight_through=straight_through)):
            logits.append(model(x))
            logits[-1].square().sum().backward()
        gradients.append(model.blocks[1].attn.qkv.weight.grad.clone())
    # The value is that of dropping; the projection that the scores come from gets more gradient.
    torch.testing.assert_close(*logits)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3 * gradients[0].abs().max()
    model.zero_grad()
    with sparsify(model, TokenSparsity(keep=5), record=True) as handle:
        model(x)
        handle.selections[0].scores.square().sum().backward()
    assert model.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
    with sparsify(model, TokenSparsity(keep=5, score="gate", straight_through=True)) as handle:
        assert not {id(p) for p in handle.gate.parameters()} & {id(p) for p in model.parameters()}
        model(x).square().sum().backward()
        assert handle.gates[0].shape == (3, PATCHES)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.gate.parameters())


@torch.no_grad()
def test_a_forward_pass_can_be_repeated():
    model, x = small_model(), images()
    for plan in PLANS.values():
        with sparsify(model, plan):
            assert torch.equal(model(x), model(x))


def test_what_does_not_fit_is_refused_and_nothing_changed():
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(InputError, match="supported"):
        sparsify(other, 0.5)
    model = small_model()
    modules = dict(model.named_modules())
    budget = TokenSparsity(entropy_budget=EntropyBudget())
    for wrong in (
        *(1.0, -0.1, True, "tokens", TokenSparsity(keep=2, before_layer=4), TokenMerging((1, 1))),
        Combined((budget, ColumnSparsity(keys=3))),
        Combined((TokenMerging(2), TokenSparsity(keep=2, score_source="previous"))),
    ):
        with pytest.raises(ConfigError):
            sparsify(model, wrong)
    with pytest.raises(ConfigError, match=r"largest possible is 0\.4974"):
        sparsify(model, TokenSparsity(sparsity=0.9))
    assert dict(model.named_modules()) == modules


def test_a_number_reduces_before_layer_one_where_that_is_enough_and_before_layer_zero_else():
    model, x = small_model(), images()
    # At most 0.4974 before layer 1 and 0.7465 before layer 0, see test_budgets.
    for sparsity, layer in ((0.45, 1), (0.6, 0)):
        with sparsify(model, sparsity, record=True) as handle:
            assert sparsity <= handle.realised_sparsity(x) < sparsity + 0.1
            assert [selection.layer for selection in handle.selections] == [layer]
    with pytest.raises(ConfigError, match=r"largest possible is 0\.7465"):
        sparsify(model, 0.9)
    assert sparsify(small_model(depth=1, img_size=64), 0.1).realised_sparsity(torch.randn(1, 3, 64, 64)) >= 0.1


@torch.no_grad()
def test_of_a_model_for_any_image_size_the_forward_pass_knows_what_is_possible():
    model = small_model(dynamic_img_size=True)
    with sparsify(model, 0.45) as handle:
        assert 0.45 <= handle.realised_sparsity(images()) < 0.5
        assert handle.realised_sparsity(torch.randn(1, 3, 64, 64)) >= 0.45
    with sparsify(model, 0.6), pytest.raises(ConfigError, match=r"largest possible is 0\.4974"):
        model(images())


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_batch_without_images_has_no_logits(name):
    model = small_model()
    wanted = model(images(0))
    with sparsify(model, PLANS[name], record=True) as handle:
        out = model(images(0))
        assert (out.shape, out.dtype) == (wanted.shape, wanted.dtype)
        assert handle.selections == []
        with pytest.raises(InputError, match="at least one image"):
            handle.realised_sparsity(images(0))
        # The pass after it is like any other.
        assert model(images()).shape == (3, 5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_trace_is_of_the_dense_model_or_refused(name):
    model, x = small_model(), images()
    wanted = model(x)
    with sparsify(model, PLANS[name]), pytest.raises(InputError, match=r"torch\.jit\.trace"):
        torch.jit.trace(model, x)
    with sparsify(model, 0.0):
        traced = torch.jit.trace(model, images(2), check_trace=False)
    assert torch.equal(traced(x), wanted)


@pytest.mark.xdist_group("compiling")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["drop", "columns"])
@torch.no_grad()
def test_compiled_model_gives_the_same(name):
    model, x = small_model(depth=2), images()
    with sparsify(model, PLANS[name]):
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model)(x), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_columns_act_beside_token_merging():
    model, x = small_model(), images()
    with sparsify(model, TokenMerging(2)):
        merging = model(x)
    with sparsify(model, Combined((TokenMerging(2), ColumnSparsity(keys=17)))):
        torch.testing.assert_close(model(x), merging, rtol=1e-4, atol=1e-5)
    with sparsify(model, Combined((TokenMerging(2), ColumnSparsity(keys=3, score="random")))) as handle:
        assert not torch.allclose(model(x), merging, rtol=1e-2)
        entries = 3 * (17 + 15 + 13 + 11)
        assert handle.realised_sparsity(x) == pytest.approx(1 - entries / (4 * 17**2))


@torch.no_grad()
def test_columns_act_in_the_layer_that_previous_reads():
    model, x = small_model(), images()
    tokens = TokenSparsity(keep=5, before_layer=2, score_source="previous", num_sampled_queries=None)
    with sparsify(model, Combined((tokens, ColumnSparsity(keys=3, layers=(1,)))), record=True) as handle:
        sparse = model(x)
    assert [selection.layer for selection in handle.selections] == [1, 2]
    mask = torch.zeros(len(x), 2, 1, 17, dtype=torch.bool).scatter_(-1, handle.selections[0].kept.unsqueeze(2), True)
    read = model.blocks[0](embedded(model, x))
    scores = exact_scores(model.blocks[1], read, 1)
    kept = torch.cat((torch.zeros(len(x), 1, dtype=torch.int64), scores[:, 1:].topk(5).indices.sort(-1).values + 1), 1)
    seen = model.blocks[1](read, attn_mask=mask.expand(-1, -1, 17, -1))
    left = model.blocks[3](model.blocks[2](torch.take_along_dim(seen, kept[..., None], 1)))
    torch.testing.assert_close(sparse, answer(model, left), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_later_parts_sparsity_is_of_what_the_parts_before_leave():
    model, x = small_model(depth=8, img_size=64), images()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    second = TokenSparsity(sparsity=0.3, before_layer=3, score="random")
    plan = Combined((TokenSparsity(keep=32, before_layer=1, score="random"), second))
    with sparsify(model, plan) as handle:
        realised = handle.realised_sparsity(x)
    left = 65**2 + 7 * 33**2
    assert 1 - (1 - realised) * 8 * 65**2 / left >= 0.3


@pytest.mark.parametrize("name", ["drop", "stem", "previous", "columns", "merging"])
@torch.no_grad()
def test_no_entry_of_the_model_runs_dense_silently(name):
    model, x = small_model(), images()
    mask = torch.ones(17, 17, dtype=torch.bool)
    with sparsify(model, PLANS[name]):
        wanted = model(x)
        for run in (
            lambda: model(x, attn_mask=mask),
            lambda: model.forward_features(x, attn_mask=mask),
            lambda: model.forward_intermediates(x),
            lambda: model.forward_intermediates(x, indices=[0], stop_early=True),
            lambda: model.get_intermediate_layers(x),
        ):
            with pytest.raises(InputError, match=r"mask, gradient checkpointing or intermediate"):
                run()
        model.set_grad_checkpointing(True)
        for run in (model, model.forward_features):
            with pytest.raises(InputError, match="checkpointing"):
                run(x)
        model.set_grad_checkpointing(False)
        assert torch.equal(model.forward_head(model.forward_features(x)), wanted)
    model.forward_intermediates(x)


@torch.no_grad()
def test_merging_keeps_a_models_choice_of_unfused_attention():
    model, x = small_model(fused=False), images()
    with recorded_kernels() as stock:
        model(x)
    with sparsify(model, TokenMerging(2)), recorded_kernels() as merging:
        model(x)
    assert merging == stock == ["math"] * 4


@torch.no_grad()
def test_a_copy_of_a_sparse_model_can_be_made_stock_again():
    model, x = small_model(), images()
    wanted, names = model(x), list(model.state_dict())
    for name, plan in PLANS.items():
        with sparsify(model, plan, record=True) as handle:
            sparse, selections = model(x), handle.selections
            other = copy.deepcopy(model)
            # Two models, nothing shared: the copy has the path, and the original's handle does not hear of it.
            assert torch.equal(other(x), sparse), name
            assert handle.selections is selections
            nn.init.zeros_(other.blocks[0].mlp.fc1.weight)
            assert torch.equal(model(x), sparse)
            other.load_state_dict(model.state_dict())
            second = sparsify(other, plan)
            assert torch.equal(other(x), sparse)
            second.remove()
            assert torch.equal(model(x), sparse)
        assert torch.equal(other(x), wanted), name
        assert list(other.state_dict()) == names
        stock = [type(module) for module in small_model().modules()]
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()] == stock
        assert not any(module._forward_pre_hooks for module in [*model.modules(), *other.modules()])


def test_a_model_can_be_copied_after_a_recorded_training_pass():
    model = small_model().train()
    with sparsify(model, TokenSparsity(keep=5, score="gate"), record=True) as handle:
        model(images())
        other = copy.deepcopy(handle)
        assert other.model is not model
        assert other.model.blocks.handle is other
        assert other.selections == other.gates == []
        assert len(handle.selections) == 1
        assert other.gate is not handle.gate
        other.remove()
        assert handle.active
    assert type(other.model.blocks) is nn.Sequential


@torch.no_grad()
def test_probe_and_path_in_either_order():
    model, x = small_model(), images()
    wanted = model(x)
    for first, second in ((probe, sparsify), (sparsify, probe)):
        handles = [make(model) if make is probe else make(model, TokenSparsity(keep=5)) for make in (first, second)]
        model(x)
        captures = next(handle for handle in handles if hasattr(handle, "captures")).captures
        assert [capture.queries.shape[2] for capture in captures] == [17, 6, 6, 6]
        for handle in handles:
            handle.remove()
        assert torch.equal(model(x), wanted)
