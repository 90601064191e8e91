"""The sparse path in stock models: neutral settings and undo to the bit, plans against slow code on stock blocks."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from entreg.adapters import probe, sparsify
from entreg.errors import ConfigError, InputError
from entreg.sparse import (
    BlockSparsity,
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
        TokenSparsity(keep=5, before_layer=1, score="magnitude"): n**2 + 3 * 6**2,
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


@pytest.mark.parametrize("kind", ["class token", "no pooling"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_batch_without_images_has_no_logits(name, kind):
    model, stock = small_model(kind), small_model(kind)
    with sparsify(model, PLANS[name], record=True) as handle:
        some, out = model(images()), model(images(0))
        assert (out.shape, out.dtype) == ((0, *some.shape[1:]), some.dtype)
        assert handle.selections == []
        with pytest.raises(InputError, match="at least one image"):
            handle.realised_sparsity(images(0))
        # The pass after it is like any other.
        assert torch.equal(model(images()), some)
    with sparsify(model, 0.0):
        assert torch.equal(model(images(0)), stock(images(0)))


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
    with sparsify(model, Combined((TokenMerging(2), ColumnSparsity(keys=3, score="magnitude")))) as handle:
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
    second = TokenSparsity(sparsity=0.3, before_layer=3, score="magnitude")
    plan = Combined((TokenSparsity(keep=32, before_layer=1, score="magnitude"), second))
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


def changed_by(change, kind="class token", **options):
    """Two models, the second changed as ``change`` does it, and the path meanwhile in neither."""
    model, other = small_model(kind, **options), small_model(kind, **options)
    change(other)
    return model, other


CHANGES = {
    "pruned": lambda model: model.prune_intermediate_layers([1]),
    "pruned to the last": lambda model: model.prune_intermediate_layers([3], prune_head=False),
    "pruned norm": lambda model: model.prune_intermediate_layers([2], prune_norm=True),
    "head reset": lambda model: (torch.manual_seed(3), model.reset_classifier(7)),
    "averaged": lambda model: (torch.manual_seed(3), model.reset_classifier(7, "avg")),
    "input size": lambda model: model.set_input_size(img_size=48),
    "patch size": lambda model: model.set_input_size(img_size=64, patch_size=16),
    "unfused": lambda model: [setattr(block.attn, "fused_attn", False) for block in model.blocks],
    "head pruned": lambda model: halve_heads(model.blocks[1].attn),
    "further projection": lambda model: setattr(model.blocks[1].attn, "qkv", Added(model.blocks[1].attn.qkv)),
}


class Added(nn.Module):
    """A projection with a further one, that shows the weight of the first as its own, as low-rank additions do."""

    def __init__(self, stock):
        super().__init__()
        self.stock, self.weight, self.bias = stock, stock.weight, stock.bias
        self.further = nn.Linear(stock.in_features, stock.out_features, bias=False)
        nn.init.constant_(self.further.weight, 0.3)

    def forward(self, x):
        return self.stock(x) + self.further(x.sin())


def halve_heads(attention):
    """The first of two heads alone."""
    qkv, width = attention.qkv, attention.head_dim
    attention.num_heads, attention.attn_dim = 1, width
    attention.qkv = nn.Linear(qkv.in_features, 3 * width)
    attention.qkv.weight = nn.Parameter(torch.cat([part[:width] for part in qkv.weight.detach().chunk(3)]))
    attention.qkv.bias = nn.Parameter(torch.cat([part[:width] for part in qkv.bias.detach().chunk(3)]))
    attention.proj = nn.Linear(width, qkv.in_features)
    nn.init.ones_(attention.proj.weight), nn.init.zeros_(attention.proj.bias)


@pytest.mark.parametrize("name", ["drop", "stem", "previous", "columns", "merging", "combined"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_model_may_be_changed_under_the_path(change, name):
    """The path in the changed model is that which is put into the changed model, and removed it leaves that model."""
    model, other = changed_by(CHANGES[change])
    x = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    handle = sparsify(model, PLANS[name], record=True)
    model(x)
    CHANGES[change](model)
    x = torch.randn(3, 3, *other.patch_embed.img_size, generator=torch.Generator().manual_seed(2))
    wanted = other(x)
    with sparsify(other, PLANS[name], record=True) as again:
        assert torch.equal(model(x), other(x))
    kept = [(one.layer, one.kept.tolist()) for one in handle.selections]
    assert kept == [(one.layer, one.kept.tolist()) for one in again.selections]
    assert len(kept) > 0
    handle.remove()
    assert torch.equal(model(x), wanted)
    assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]
    assert list(model.state_dict()) == list(other.state_dict())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_what_is_added_to_a_projection_decides_too():
    model, x = small_model(), images()
    CHANGES["further projection"](model)
    with sparsify(model, TokenSparsity(keep=5, before_layer=1, num_sampled_queries=None), record=True) as handle:
        model(x)
    scores = exact_scores(model.blocks[1], model.blocks[0](embedded(model, x)), 1)
    torch.testing.assert_close(handle.selections[0].scores, scores, rtol=1e-5, atol=1e-6)


def put(model, blocks):
    model.blocks = blocks


REPLACEMENTS = {
    "blocks": lambda model, stock: put(model, stock.blocks),
    "blocks in a new container": lambda model, stock: put(model, nn.Sequential(*model.blocks)),
    "the last blocks": lambda model, stock: put(model, model.blocks[1:]),
    "every other block": lambda model, stock: put(model, model.blocks[::2]),
    "first block": lambda model, stock: model.blocks.__setitem__(0, stock.blocks[0]),
    "last block": lambda model, stock: model.blocks.__setitem__(3, stock.blocks[3]),
    "attention": lambda model, stock: setattr(model.blocks[1], "attn", stock.blocks[1].attn),
    "one more": lambda model, stock: model.blocks.append(stock.blocks[0]),
    "one less": lambda model, stock: model.blocks.__delitem__(1),
    "order": lambda model, stock: put(model, nn.Sequential(*reversed(model.blocks))),
}


@pytest.mark.parametrize("name", ["drop", "previous", "columns", "merging"])
@pytest.mark.parametrize("what", REPLACEMENTS)
@torch.no_grad()
def test_blocks_that_the_path_does_not_know_are_refused_and_stay(what, name):
    model, wanted = small_model(), small_model()
    REPLACEMENTS[what](wanted, small_model())
    handle = sparsify(model, PLANS[name])
    REPLACEMENTS[what](model, small_model())
    with pytest.raises(InputError, match="replaced, or others put beside them, after sparsify"):
        model(images())
    handle.remove()
    assert torch.equal(model(images()), wanted(images()))
    assert [type(module) for module in model.modules()] == [type(module) for module in wanted.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_path_replaces_what_is_left_of_another():
    model = small_model()
    sparsify(model, PLANS["columns"])
    put(model, nn.Sequential(*model.blocks))
    sparsify(model, PLANS["drop"]).remove()
    assert torch.equal(model(images()), small_model()(images()))
    assert [type(module) for module in model.modules()] == [type(module) for module in small_model().modules()]


@torch.no_grad()
def test_what_is_not_possible_any_more_is_refused_and_can_be_removed():
    budget = TokenSparsity(entropy_budget=EntropyBudget(0.6, 2, 14))
    for plan, change, sentence in (
        (TokenSparsity(keep=5, before_layer=3), CHANGES["pruned"], r"before_layer must be in \[0, 1\]"),
        (ColumnSparsity(keys=5, layers=(3,)), CHANGES["pruned"], "layers must be below 2"),
        (TokenMerging((1, 2, 3, 4)), CHANGES["pruned"], "one for each of 2 layers"),
        (TokenSparsity(sparsity=0.45), lambda model: model.prune_intermediate_layers([0]), "must be in"),
        (budget, CHANGES["averaged"], "answers with its class token"),
    ):
        model, other = changed_by(change)
        handle = sparsify(model, plan)
        change(model)
        with pytest.raises(ConfigError, match=sentence):
            model(images())
        handle.remove()
        assert torch.equal(model(images()), other(images()))


@torch.no_grad()
def test_a_probe_goes_on_in_a_pruned_model_and_misses_replaced_attention():
    model = small_model()
    with probe(model) as watched:
        model.prune_intermediate_layers([1])
        model(images())
        assert [capture.layer for capture in watched.captures] == [0, 1]
        model.blocks[1] = small_model().blocks[1]
        with pytest.raises(InputError, match="attention of block 1 was replaced after probe"):
            model(images())
    model(images())


@pytest.mark.parametrize("kind", ["class token", "registers", "average"])
def test_selections_are_in_original_coordinates_under_dropout_of_patches(kind):
    """The tokens that come to the blocks carry their number: the embedding gives it to them."""
    model, x = small_model(kind, patch_drop_rate=0.4).train(), images()
    stock = small_model(kind, patch_drop_rate=0.4).train()
    prefix = model.num_prefix_tokens
    left = max(1, int(PATCHES * 0.6)) + prefix
    seen = []
    model.norm_pre.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    plan = Combined(
        (TokenSparsity(keep=6, before_layer=1), TokenSparsity(keep=4, before_layer=2), ColumnSparsity(keys=4))
    )
    numbered = model._pos_embed(model.patch_embed(x)).detach()

    def positions(tokens):
        """Where each token is among all that were embedded."""
        return (tokens.unsqueeze(2) == numbered.unsqueeze(1)).all(-1).int().argmax(-1)

    with sparsify(model, plan, record=True) as handle:
        torch.manual_seed(7)
        model(x).sum().backward()
    (tokens,) = seen
    original = positions(tokens)
    assert original.shape == (3, left)
    first, second = (one for one in handle.selections if one.plan is None)
    # Each reduction is of what was left before it; scores are 0 where tokens were gone.
    for one, before, keep in ((first, original, 6), (second, first.kept, 4)):
        assert one.kept.shape == (3, keep + prefix)
        assert torch.equal(one.kept[:, :prefix], torch.arange(prefix).expand(3, -1))
        assert one.scores.shape == (3, PATCHES + prefix)
        for image in range(3):
            assert set(one.kept[image].tolist()) <= set(before[image].tolist())
            assert set(one.scores[image].nonzero()[:, 0].tolist()) <= set(before[image].tolist())
            # Those with the highest scores of what was there.
            patches = before[image, prefix:]
            best = patches[one.scores[image, patches].argsort(descending=True, stable=True)[:keep]]
            assert set(best.tolist()) == set(one.kept[image, prefix:].tolist())
    # Keys of the layers, too, are original tokens.
    for one, seen_by in zip(
        [one for one in handle.selections if one.plan is not None],
        [original, first.kept, second.kept, second.kept],
        strict=True,
    ):
        for image in range(3):
            assert set(one.kept[image].flatten().tolist()) <= set(seen_by[image].tolist())
    # Sparsity 0 draws what the stock model draws, and afterwards the dropout is the stock one.
    with sparsify(model, 0.0):
        torch.manual_seed(7)
        ours = model(x)
    torch.manual_seed(7)
    assert torch.equal(ours, stock(x))
    assert type(model.patch_drop) is type(stock.patch_drop)


@torch.no_grad()
def test_columns_of_fewer_tokens_are_in_original_coordinates():
    model, x = small_model(), images()
    with sparsify(
        model, Combined((TokenSparsity(keep=5, before_layer=2), ColumnSparsity(keys=4))), record=True
    ) as handle:
        model(x)
    (tokens,) = (one for one in handle.selections if one.plan is None)
    for one in handle.selections:
        if one.plan is not None and one.layer >= 2:
            wanted = tokens.kept.unsqueeze(1).expand(-1, 2, -1).gather(2, one.plan.keys)
            assert torch.equal(one.kept, wanted)


def test_no_images_give_every_weight_a_gradient_of_zero():
    model = small_model().train()
    with sparsify(model, TokenSparsity(keep=5, score="gate")) as handle:
        model(images()[:0]).sum().backward()
        assert handle.gates[0].shape == (0, PATCHES)
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["drop", "previous", "merge", "partition", "fuse", "columns", "merging", "combined"])
@torch.no_grad()
def test_a_traced_model_is_the_sparse_model(name):
    model, x = small_model(), images()
    with sparsify(model, PLANS[name]):
        traced = torch.jit.trace(model, x, check_trace=False)
        # Of other images it chooses other tokens.
        others = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        wanted = model(others)
    torch.testing.assert_close(traced(others), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"shape .* is invalid"):
        traced(others[:2])
    with sparsify(model, 0.0):
        traced = torch.jit.trace(model, x, check_trace=False)
    assert torch.equal(traced(others[:2]), model(others[:2]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_what_cannot_be_traced_is_refused():
    model, x = small_model("no pooling"), images()
    budget = TokenSparsity(entropy_budget=EntropyBudget(0.6, 2, 14))
    for plan in (budget, BlockSparsity(sparsity=0.3, block_size=4), TokenSparsity(keep=5, score="gate")):
        with sparsify(model, plan), pytest.raises(InputError, match=r"torch\.jit\.trace cannot follow"):
            torch.jit.trace(model, x)
    with (
        sparsify(model, PLANS["drop"], generator=torch.Generator()),
        pytest.raises(InputError, match="what a generator draws"),
    ):
        torch.jit.trace(model, x)


@pytest.mark.parametrize("name", ["drop", "columns", "merging"])
@torch.no_grad()
def test_a_pickled_model_is_sparse_and_can_be_made_stock_again(name):
    model, x = small_model(), images()
    wanted = model(x)
    with sparsify(model, PLANS[name]):
        other, sparse = pickle.loads(pickle.dumps(model)), model(x)
    assert torch.equal(other(x), sparse)
    sparsify(other, 0.0).remove()
    assert torch.equal(other(x), wanted)


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
