"""Sparse attention of decoders against loops, dense softmax under the plan's mask, and counted work."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from entreg.errors import InputError
from entreg.sparse import DecoderSparsity, PageSummaries, decoder_attention, sparse_attention
from entreg.sparse.block_scores import visible_from_mask
from entreg.sparse.decoder import selection as selection_room
from entreg.sparse.decoder.selection import (
    _mixture,
    _validated,
    block_scores,
    counts_by_entropy,
    selection_entries,
)
from entreg.sparse.planning import block_densities
from tests.sparse.attention_oracle import attention_by_loops, attention_matrix, random_inputs

SELECTIONS = ["validated", "mixture", "pooled", "sampled", "oracle", "window"]


def small(**values):
    return DecoderSparsity(**{"block_size": 8, "pool_size": 4, "page_size": 8, "dense_tail_blocks": 0, **values})


def plain(**values):
    """Estimates as they are: the mean over heads, no neighbours."""
    return small(
        **{"group_reduction": "mean", "diagonal_radius": 0, "column_radius": 0, "dense_tail_blocks": 0, **values}
    )


def estimate(q, k, config, size=8, scale=None, mask=None, count=4):
    n, m = q.shape[2], k.shape[2]
    visible = visible_from_mask(causal_mask(n, m) if mask is None else mask, size)
    return block_scores(q, k, config, size, count, visible, scale=scale, mask=mask)


def causal_mask(n, m, padding=(0, 0)):
    mask = torch.ones(len(padding), 1, n, m, dtype=torch.bool).tril(m - n)
    for image, count in enumerate(padding):
        mask[image, :, :, :count] = False
    return mask


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("budget", ["uniform", "entropy", "mass"])
@pytest.mark.parametrize("padding", [None, (0, 13)])
@pytest.mark.parametrize(("n", "m"), [(96, 96), (50, 96), (33, 97), (1, 97), (1, 96)])
def test_output_is_the_softmax_over_the_entries_of_the_plan(selection, budget, padding, n, m):
    if selection == "window" and budget != "uniform":
        return
    q, k, v = random_inputs(heads=6, key_heads=2, n=n, m=m)
    mask = None if padding is None else causal_mask(n, m, padding)
    found, plan = decoder_attention(q, k, v, small(sparsity=0.3, selection=selection, budget=budget), mask=mask)
    assert plan.sparsity >= 0.3
    sees_itself = causal_mask(n, m, padding or (0, 0)).diagonal(m - n, 2, 3)
    assert (plan.to_mask().diagonal(m - n, 2, 3) | ~sees_itself).all()
    allowed = plan.to_mask() if mask is None else plan.to_mask() & mask
    logits = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    expected = torch.softmax(logits.masked_fill(~allowed, -math.inf), -1).nan_to_num() @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_all_shapes_with_gradients(data):
    n = data.draw(st.integers(2, 40))
    m = n + data.draw(st.integers(0, 25))
    key_heads, share = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    size = data.draw(st.sampled_from([2, 4, 6]))
    config = DecoderSparsity(
        sparsity=data.draw(st.sampled_from([0.1, 0.3, 0.6])),
        selection=data.draw(st.sampled_from(["validated", "pooled", "oracle"])),
        budget=data.draw(st.sampled_from(["uniform", "entropy", "mass"])),
        block_size=size,
        pool_size=2,
        num_sampled_queries=1,
    )
    q, k, v = random_inputs(heads=key_heads * share, key_heads=key_heads, n=n, m=m, seed=data.draw(st.integers(0, 99)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found, plan = decoder_attention(*leaves, config)
    mask = causal_mask(n, m) if plan is None else plan.to_mask()
    truth = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(share, 1) for x in truth[1:])
    logits = (truth[0] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    expected = torch.softmax(logits, -1) @ values
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for leaf, true in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad, true.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_sparsity_zero_is_dense(n, masked):
    q, k, v = random_inputs(heads=4, key_heads=2, n=n, m=40, dtype=torch.float32)
    mask = causal_mask(n, 40, (0, 7)) if masked else None
    found, plan = decoder_attention(q, k, v, small(sparsity=0.0), mask=mask)
    assert plan is None
    expected = scaled_dot_product_attention(
        q, k, v, attn_mask=causal_mask(n, 40) if mask is None else mask, enable_gqa=True
    )
    torch.testing.assert_close(found, expected)


def test_a_sequence_too_short_for_the_budget_is_dense():
    q, k, v = random_inputs(n=20, m=20)
    found, plan = decoder_attention(q, k, v, small(sparsity=0.75, selection="window"))
    assert plan is None
    expected = attention_by_loops(q, k, v, lambda b, h, i, j: j <= i)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_rows_of_padding_are_finite():
    q, k, v = random_inputs(heads=2, key_heads=1, n=64, m=64, dtype=torch.float32)
    found, plan = decoder_attention(q, k, v, small(sparsity=0.3, selection="pooled"), mask=causal_mask(64, 64, (0, 40)))
    assert plan is not None
    assert torch.isfinite(found).all()


def test_packed_documents_never_see_each_other():
    q, k, v = random_inputs(heads=2, key_heads=2, n=96, m=96)
    document = (torch.arange(96) >= 50).long()
    mask = causal_mask(96, 96) & (document[:, None] == document)
    config = small(sparsity=0.3, selection="pooled")
    packed, plan = decoder_attention(q, k, v, config, mask=mask)
    assert plan.sparsity >= 0.3
    changed = [torch.cat((x[:, :, :50] + 1.0, x[:, :, 50:]), 2) for x in (q, k, v)]
    again, _ = decoder_attention(*changed, config, mask=mask)
    assert torch.equal(packed[:, :, 50:], again[:, :, 50:])
    # The first block of the second document is its sink: kept in every row of it. So is a query's own key.
    kept = plan.to_mask()
    assert kept[:, :, 58:, 50:58].all()
    assert kept.diagonal(0, 2, 3).all()


@pytest.mark.parametrize("padding", [None, (0, 13)])
@pytest.mark.parametrize("selection", ["sampled", "oracle"])
def test_estimated_mass_is_attention_summed_over_blocks(selection, padding):
    n, m, size = 24, 34, 8
    q, k, _ = random_inputs(heads=4, key_heads=2, n=n, m=m)
    mask = causal_mask(n, m, (0, 0) if padding is None else padding)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    attention = torch.softmax(logits.masked_fill(~mask, -1e300), -1)
    config = plain(sparsity=0.5, selection=selection)
    found = estimate(q, k, config, size, 0.7, None if padding is None else mask)
    offsets = [4] if selection == "sampled" else range(size)
    # Queries 0 ... 23 stand at the keys 10 ... 33: blocks 1 to 4, the first and last cut short.
    for b, g, r, c in itertools.product(range(2), range(2), range(4), range(5)):
        rows = [min(max((r + 1) * size + offset - (m - n), 0), n - 1) for offset in offsets]
        columns = range(c * size, min(m, (c + 1) * size))
        expected = attention[b, 2 * g : 2 * g + 2][:, rows][..., list(columns)].sum(-1).mean()
        torch.testing.assert_close(found[b, g, r, c], expected, rtol=1e-9, atol=1e-12)


def test_the_whole_attention_is_the_oracle():
    q, k, _ = random_inputs(heads=2, key_heads=2, n=32, m=32)
    found = estimate(q, k, plain(sparsity=0.5, selection="oracle"))
    expected = attention_matrix(q, k, causal=True).unflatten(2, (4, 8)).unflatten(4, (4, 8)).sum(-1).mean(3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_estimates_are_shared_with_neighbours_and_heads():
    q, k, _ = random_inputs(heads=4, key_heads=2, n=48, m=48)
    each = estimate(q, k, plain(sparsity=0.5, selection="sampled"))
    assert each.shape == (2, 2, 6, 6)
    config = small(sparsity=0.5, selection="sampled", diagonal_radius=2, column_radius=1, group_reduction="mean")
    found = estimate(q, k, config)

    def at(values, row, column):
        inside = 0 <= row < 6 and 0 <= column < 6
        return values[row][column] if inside else 0.0

    for b, g in itertools.product(range(2), range(2)):
        values = each[b, g].tolist()
        weights = {-2: 1 / 3, -1: 2 / 3, 0: 1.0, 1: 2 / 3, 2: 1 / 3}
        along = [[sum(w * at(values, r + i, c + i) for i, w in weights.items()) for c in range(6)] for r in range(6)]
        for r, c in itertools.product(range(6), range(6)):
            expected = along[r][c] + 0.5 * (at(along, r - 1, c) + at(along, r + 1, c))
            assert float(found[b, g, r, c]) == pytest.approx(expected, rel=1e-9)
    config = plain(sparsity=0.5, selection="sampled", group_reduction="max")
    single = estimate(q, k.repeat_interleave(2, 1), config)
    torch.testing.assert_close(estimate(q, k, config), single.unflatten(1, (2, 2)).amax(2))


@pytest.mark.parametrize("budget", ["uniform", "entropy", "mass"])
def test_the_end_of_the_prompt_sees_everything_within_the_budget(budget):
    q, k, v = random_inputs(heads=2, key_heads=2, n=240, m=240)
    for tail in (1, 3):
        config = small(sparsity=0.5, selection="oracle", budget=budget, dense_tail_blocks=tail)
        _, plan = decoder_attention(q, k, v, config)
        seen = plan.to_mask().sum(-1)
        assert 0.5 <= plan.sparsity < 0.56
        assert (seen[:, :, -tail * 8 :] == torch.arange(240 - tail * 8, 240) + 1).all()
        assert (seen[:, :, -tail * 8 - 1] < 240 - tail * 8).all()


def test_local_blocks_are_always_kept():
    q, k, v = random_inputs(heads=2, key_heads=2, n=96, m=96)
    _, plan = decoder_attention(q, k, v, plain(sparsity=0.3, selection="pooled", local_blocks=2))
    for row, back in itertools.product(range(12), range(3)):
        assert plan.block_mask[:, :, row, max(row - back, 0)].all()


def test_validation_takes_the_estimate_that_predicts_the_samples():
    generator = torch.Generator().manual_seed(3)
    rows = 12
    sampled, pooled = (torch.rand(2, 2, rows, rows, generator=generator, dtype=torch.float64) for _ in range(2))
    # In the second half of head 0 attention lies along a diagonal, which means do not show.
    for row in range(6, rows):
        sampled[:, 0, row] = 0.01
        sampled[:, 0, row, row - 4] = 5.0
    neighbours = sampled + torch.rand(2, 2, rows, rows, generator=generator, dtype=torch.float64)
    for row in range(6, rows):
        neighbours[:, 0, row, row - 4] += 5.0
    visible = torch.ones(rows, rows, dtype=torch.bool).tril()
    config = small(sparsity=0.5, validation_radius=1, validation_margin=0.9)
    found = _validated(sampled, neighbours, pooled, config, 5, visible)

    def hits(scores, b, g, r):
        free = sorted(range(1, r), key=lambda c: -float(scores[b, g, r, c]))[:3]
        return sum(float(sampled[b, g, r, c]) for c in free)

    for b, g, r in itertools.product(range(2), range(2), range(rows)):
        stretch = [i for i in (r - 1, r, r + 1) if 0 <= i < rows]
        own = sum(hits(neighbours - sampled, b, g, i) for i in stretch)
        better = own > 0.9 * sum(hits(pooled, b, g, i) for i in stretch)
        expected = neighbours if better else pooled + sampled
        torch.testing.assert_close(found[b, g, r], expected[b, g, r])
    assert torch.equal(found[:, 0, 7:], neighbours[:, 0, 7:])


def test_the_mixture_is_the_most_likely_one(monkeypatch):
    monkeypatch.setattr(selection_room, "_FITTING_STEPS", 400)
    monkeypatch.setattr(selection_room, "_OWN_SAMPLE", 0.0)
    generator = torch.Generator().manual_seed(0)
    rows = 10
    sampled, own, pooled = (torch.rand(1, 1, rows, rows, generator=generator, dtype=torch.float64) for _ in range(3))
    # Rows from 6 on attend as the first estimate says, three quarters of the time.
    visible = torch.ones(rows, rows, dtype=torch.bool).tril()
    free = torch.ones(rows, rows, dtype=torch.bool).tril(-1)
    free[:, 0] = False

    def distribution(scores):
        scores = scores * free
        return scores / scores.sum(-1, keepdim=True).clamp_min(1e-300)

    sampled[:, :, 6:] = (0.75 * distribution(own) + 0.25 * distribution(pooled))[:, :, 6:]
    found = _mixture(sampled, sampled + own, pooled, 0, visible)
    for row in range(6, rows):
        first, second, seen = (distribution(x)[0, 0, row] for x in (own, pooled, sampled * free))
        grid = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)[:, None]
        likelihood = (seen * (grid * first + (1 - grid) * second).clamp_min(1e-12).log()).sum(-1)
        weight = grid[likelihood.argmax()]
        expected = weight * distribution(sampled + own)[0, 0, row] + (1 - weight) * second
        torch.testing.assert_close(found[0, 0, row], expected, atol=2e-3, rtol=0.0)
        assert abs(float(weight) - 0.75) < 1e-3


@pytest.mark.parametrize("selection", ["validated", "mixture", "pooled", "sampled"])
@pytest.mark.parametrize(("n", "m"), [(96, 96), (50, 97)])
def test_entries_of_the_selection_are_those_that_are_computed(selection, n, m):
    """A score entry is one product of width d: two floating-point operations per element."""
    config = small(sparsity=0.5, selection=selection)
    q, k, _ = random_inputs(heads=2, key_heads=2, n=n, m=m)
    with FlopCounterMode(display=False) as counter:
        estimate(q, k, config)
    per_head = counter.get_total_flops() / (2 * q.shape[-1] * q.shape[0] * q.shape[1])
    assert per_head == selection_entries(config, n, m)


@pytest.mark.parametrize("budget", ["entropy", "mass"])
def test_budgets_realise_the_same_sparsity(budget):
    q, k, v = random_inputs(heads=4, key_heads=4, n=256, m=256)
    # One head attends widely, one to its own block alone.
    q[:, 1] *= 0.1
    q[:, 0] = 9.0 * k[:, 0]
    uniform = decoder_attention(q, k, v, plain(sparsity=0.6, selection="oracle"))[1]
    shared = decoder_attention(q, k, v, plain(sparsity=0.6, selection="oracle", budget=budget))[1]
    assert 0.6 <= uniform.sparsity
    # Blocks are whole: the last one of each head may be left out.
    assert 0.6 - 1e-9 <= shared.sparsity <= uniform.sparsity + 0.04
    counts = shared.block_mask.sum((-1, -2)).double().mean(0)
    assert counts[1] > counts[0]
    # The budget by mass captures the most attention of all plans of that size.
    if budget == "mass":
        mass = attention_matrix(q, k, causal=True)
        assert (mass * shared.to_mask()).sum() > (mass * uniform.to_mask()).sum()


def test_counts_follow_the_effective_support():
    # Head 0 uses one block, head 1 all sixteen alike.
    scores = torch.zeros(1, 2, 16, 16)
    scores[0, 0] = torch.eye(16)
    scores[0, 1] = 1.0
    densities = block_densities(256, 256, 16, True)
    visible = torch.ones(16, 16, dtype=torch.bool).tril()
    # Between the densities of six and seven blocks for all.
    density = 0.3 * densities[5] + 0.7 * densities[6]
    counts = counts_by_entropy(scores, 3, density, visible, densities)
    assert counts[0, 0] == 3
    assert counts[0, 1] > 6
    mean = sum(densities[count - 1] for count in counts[0].tolist()) / 2
    larger = densities[counts[0, 1]] / 2 + densities[2] / 2
    assert mean <= density < larger


def test_topk_keeps_the_largest_entries_of_every_row():
    q, k, v = random_inputs(heads=2, key_heads=2, n=30, m=30)
    config = plain(sparsity=0.5, selection="topk", backend="reference")
    _, plan = decoder_attention(q, k, v, config)
    attention, mask = attention_matrix(q, k, causal=True), plan.to_mask()
    for b, h, i in itertools.product(range(2), range(2), range(30)):
        kept = set(torch.nonzero(mask[b, h, i]).flatten().tolist())
        assert {0, i} <= kept
        others = sorted((j for j in range(1, i)), key=lambda j: -float(attention[b, h, i, j]))
        assert kept - {0, i} == set(others[: len(kept - {0, i})])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_masks_within_plans_of_all_kinds(backend):
    q, k, v = random_inputs(n=20, m=28, key_heads=2)
    mask = causal_mask(20, 28, (3, 9))
    config = small(sparsity=0.2, selection="window", block_size=4, backend=backend)
    found, plan = decoder_attention(q, k, v, config, mask=mask)
    allowed = plan.to_mask() & mask
    heads = allowed.shape[1]
    expected = attention_by_loops(q, k, v, lambda b, h, i, j: bool(allowed[b, h % heads, i, j]))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_page_summaries_are_means_and_survive_what_happens_to_caches():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 2, 40, 4, generator=generator, dtype=torch.float64)
    summaries = PageSummaries(8)

    def expect(cache):
        expected = torch.stack([cache[:, :, 8 * p : 8 * p + 8].mean(2) for p in range(cache.shape[2] // 8)], 2)
        torch.testing.assert_close(summaries.update(cache), expected)

    assert summaries.update(keys[:, :, :7]).shape == (3, 2, 0, 4)
    for length in (16, 17, 24, 40):
        expect(keys[:, :, :length])
    # Cropped and written on differently; beams reordered; another cache; a smaller batch.
    expect(torch.cat((keys[:, :, :20], keys[:, :, 30:40]), dim=2))
    expect(keys[[2, 0, 1]])
    expect(torch.randn(3, 2, 33, 4, generator=generator, dtype=torch.float64))
    expect(keys[:1])


@pytest.mark.parametrize("room", [0, 6, 8, 24])
def test_pages_of_a_cache_with_room_behind_its_keys(room):
    q, k, v = random_inputs(heads=6, key_heads=2, n=1, m=90)
    held = [torch.full((2, 2, 90 + room, 5), torch.nan, dtype=torch.float64) for _ in range(2)]
    for buffer, filled in zip(held, (k, v), strict=True):
        buffer[:, :, :90] = filled
    found, plan = decoder_attention(q, held[0][:, :, :90], held[1][:, :, :90], small(sparsity=0.5))
    expected, same = decoder_attention(q, k, v, small(sparsity=0.5))
    assert torch.equal(plan.block_mask, same.block_mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    truth = sparse_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_kept_summaries_change_nothing():
    q, k, v = random_inputs(heads=4, key_heads=2, n=1, m=90)
    config, pages = small(sparsity=0.5), PageSummaries(8)
    for length in range(60, 91):
        with_pages, _ = decoder_attention(q, k[:, :, :length], v[:, :, :length], config, pages=pages)
        without, _ = decoder_attention(q, k[:, :, :length], v[:, :, :length], config)
        assert torch.equal(with_pages, without)


def test_decoding_reads_the_pages_of_highest_estimated_mass():
    q, k, v = random_inputs(heads=4, key_heads=2, n=1, m=100)
    _, plan = decoder_attention(q, k, v, plain(sparsity=0.9, decode_sparsity=0.5))
    means = torch.stack([k[:, :, 8 * p : 8 * p + 8].mean(2) for p in range(12)], 2).repeat_interleave(2, 1)
    mass = torch.softmax((q * means).sum(-1) * q.shape[-1] ** -0.5, -1).unflatten(1, (2, 2)).mean(2)
    # 50 entries, 12 for the summaries: 4 pages of 8, among them the first and the two newest.
    for b, g in itertools.product(range(2), range(2)):
        other = max(range(1, 11), key=lambda p: float(mass[b, g, p]))
        assert torch.nonzero(plan.block_mask[b, g, 0]).flatten().tolist() == sorted({0, other, 11, 12})
    # Three whole pages, four keys of the newest, twelve summaries.
    assert plan.sparsity == pytest.approx(1 - (3 * 8 + 4 + 12) / 100)


def test_bfloat16_lies_within_its_rounding_of_the_truth():
    q, k, v = random_inputs(heads=4, key_heads=2, n=128, m=128, width=32, value_width=32, dtype=torch.bfloat16)
    found, plan = decoder_attention(q / 2, k, v, plain(sparsity=0.5, selection="pooled"))
    truth = sparse_attention(q.double() / 2, k.double(), v.double(), plan, backend="reference")
    assert (found.double() - truth).abs().max() < 2**-6 * v.abs().max()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mask": torch.ones(2, 1, 9, 9)}, "mask must be bool of shape"),
        ({"mask": torch.ones(2, 1, 9, 8, dtype=torch.bool)}, r"mask must be bool of shape \(2, 1, 9, 9\)"),
    ],
)
def test_what_is_refused(arguments, sentence):
    q, k, v = random_inputs(n=9, m=9)
    with pytest.raises(InputError, match=sentence):
        decoder_attention(q, k, v, small(sparsity=0.5), **arguments)
    with pytest.raises(InputError, match="at least as many keys as queries, got 8 < 9"):
        decoder_attention(q, k[:, :, :8], v[:, :, :8], small(sparsity=0.5))


def test_blocks_with_an_allowed_entry_are_visible():
    mask = causal_mask(10, 15, (0, 6))
    seen = visible_from_mask(mask, 4)
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        entries = [mask[b, 0, i, j] for i in range(10) for j in range(15) if (i + 1) // 4 == r and j // 4 == c]
        assert bool(seen[b, 0, r, c]) == (any(entries) or c == r + 1)
