"""What a mask hides decides nothing: every sequence and document is planned and computed as if it stood alone."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.errors import InputError
from entreg.sparse import (
    DecoderSparsity,
    PageSummaries,
    SegmentedPlan,
    decoder_attention,
    decoder_plan,
    is_decoding,
    mask_form,
    sparse_attention,
)
from tests.sparse.attention_oracle import random_inputs

SELECTIONS = ["validated", "mixture", "pooled", "sampled", "oracle", "window", "topk"]
BUDGETS = ["uniform", "entropy", "mass"]
CHOICES = [
    (selection, budget)
    for selection, budget in itertools.product(SELECTIONS, BUDGETS)
    if budget == "uniform" or selection not in ("window", "topk")
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def config_of(selection="validated", budget="uniform", **values):
    backend = "reference" if selection == "topk" else "gather"
    small = {"block_size": 16, "pool_size": 8, "page_size": 8, "dense_tail_blocks": 0, "sparsity": 0.3}
    return DecoderSparsity(**{**small, "selection": selection, "budget": budget, "backend": backend, **values})


def causal_within(documents, n, window=None):
    """The mask of tokens (batch, m) by the number of their document, -1 for padding; of the last n queries."""
    m = documents.shape[1]
    mask = (documents[:, :, None] == documents[:, None]) & torch.ones(m, m, dtype=torch.bool).tril()
    if window is not None:
        mask = mask & torch.ones(m, m, dtype=torch.bool).triu(1 - window)
    # Padding sees the text before it, as transformers has it, and is not seen.
    mask = (mask | ((documents < 0)[:, :, None] & torch.ones(m, m, dtype=torch.bool).tril())) & (documents >= 0)[
        :, None
    ]
    return mask[:, None, m - n :]


M = 240
PADDINGS = ["left", "right", "packed", "everything", "holes"]
PASSES = {"prompt": M, "chunk": 150, "verification": 5, "step": 1}


def documents_of(kind):
    """Two sequences of M tokens; the last token of the first one is real."""
    documents = torch.zeros(2, M, dtype=torch.int64)
    if kind == "left":
        documents[0, :97] = -1
    if kind == "right":
        documents[1, 190:] = -1
    if kind == "packed":
        documents[:, 101:] = 1
        documents[0, 120:] = 2
    if kind == "everything":
        documents[0, :7] = -1
        documents[0, 112:] = 1
        documents[1, 85:] = 1
        documents[1, 236:] = -1
    if kind == "holes":
        documents[0, 50:65] = -1
        documents[1, 155:156] = -1
    return documents


def pretended(inputs, hidden, seed=9):
    """The inputs with other numbers, and large ones, where tokens are hidden: (batch, m) bool."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for x in inputs:
        noise = (30.0 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(x.dtype)
        changed.append(torch.where(hidden[:, None, hidden.shape[1] - x.shape[2] :, None], noise, x))
    return changed


@pytest.mark.parametrize(("selection", "budget"), CHOICES)
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("window", [None, 80])
def test_what_is_hidden_changes_nothing(selection, budget, kind, window):
    n, m = PASSES[kind], M
    config = config_of(selection, budget)
    # Another pair of masks and dtypes for each choice and pass, all of them for all together.
    place = CHOICES.index((selection, budget)) + list(PASSES).index(kind)
    for padding, dtype in ((PADDINGS[place % 5], DTYPES[place % 3]), (PADDINGS[(place + 2) % 5], DTYPES[place % 2])):
        documents = documents_of(padding)
        inputs = random_inputs(heads=4, key_heads=2, n=n, m=m, width=8, dtype=dtype)
        mask = causal_within(documents, n, window)
        found, plan = decoder_attention(*inputs, config, mask=mask)
        assert plan is not None
        assert found.isfinite().all()
        for shown in sorted(set(documents[documents >= 0].tolist())):
            # Other documents are hidden from this one as padding is.
            other, _ = decoder_attention(*pretended(inputs, documents != shown), config, mask=mask)
            queries = (documents == shown)[:, None, m - n :, None]
            assert torch.equal(torch.where(queries, found, 0.0), torch.where(queries, other, 0.0))


@pytest.mark.parametrize(("selection", "budget"), CHOICES)
@pytest.mark.parametrize(
    ("kind", "padding"), list(zip([*PASSES, "prompt", "chunk"], [*PADDINGS, "packed"], strict=True))
)
def test_a_sequence_is_planned_and_computed_as_if_it_stood_alone(selection, budget, kind, padding):
    n, m = PASSES[kind], M
    config = config_of(selection, budget)
    documents = documents_of(padding)
    q, k, v = random_inputs(heads=4, key_heads=2, n=n, m=m, width=8)
    found, plan = decoder_attention(q, k, v, config, mask=causal_within(documents, n))
    chosen = plan.to_mask().expand(-1, 4, -1, -1)
    computed = allowed = 0.0
    for sequence, document in itertools.product(range(2), range(3)):
        keys = torch.nonzero(documents[sequence] == document).flatten()
        queries = keys[keys >= m - n] - (m - n)
        if not len(queries):
            continue
        one = [x[sequence, :, places][None] for x, places in ((q, queries), (k, keys), (v, keys))]
        expected, alone = decoder_attention(*one, config)
        torch.testing.assert_close(found[sequence, :, queries][None], expected, rtol=1e-10, atol=1e-12)
        entries = sum(len(keys) - place for place in range(len(queries)))
        allowed += entries
        computed += entries * (1.0 if alone is None else alone.density)
        triangle = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
        wanted = triangle if alone is None else alone.to_mask()[0]
        assert torch.equal(chosen[sequence][:, queries][..., keys], wanted.expand(4, -1, -1))
    assert plan.sparsity == pytest.approx(1.0 - computed / allowed, abs=1e-12)
    assert plan.sparsity > 0.0


def test_padding_counts_in_no_budget():
    q, k, _ = random_inputs(heads=2, key_heads=2, n=1024, m=1024, width=8, dtype=torch.float32)
    documents = torch.zeros(2, 1024, dtype=torch.int64)
    documents[1, :960] = -1
    config = DecoderSparsity(sparsity=0.75)
    plan = decoder_plan(q, k, config, mask=causal_within(documents, 1024))
    whole, part = decoder_plan(q[:1], k[:1], config), decoder_plan(q[1:, :, 960:], k[1:, :, 960:], config)
    assert part is None
    entries = [1024 * 1025 / 2, 64 * 65 / 2]
    assert plan.sparsity == pytest.approx(1 - (entries[0] * whole.density + entries[1]) / sum(entries))


@pytest.mark.parametrize("selection", ["validated", "pooled", "mixture", "window"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_under_a_sliding_window_are_of_what_it_allows(selection, budget):
    if selection == "window" and budget != "uniform":
        return
    n, window = 256, 96
    q, k, v = random_inputs(heads=4, key_heads=2, n=n, m=n, width=8)
    documents = torch.zeros(2, n, dtype=torch.int64)
    mask = causal_within(documents, n, window)
    config = config_of(selection, budget, sparsity=0.4)
    found, plan = decoder_attention(q, k, v, config, mask=mask)
    kept = plan.to_mask().expand(-1, 4, -1, -1)
    assert not (kept & ~mask).any()
    assert kept.diagonal(0, 2, 3).all()
    spent = 2 * 4 * plan.selection_entries
    assert plan.sparsity == pytest.approx(1 - (int(kept.sum()) + spent) / (4 * int(mask.sum())))
    # Blocks are whole; a row sees seven of them at the most, the first one in part.
    assert 0.4 <= plan.sparsity < 0.6
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(~kept, -math.inf)
    torch.testing.assert_close(found, logits.softmax(-1) @ v.repeat_interleave(2, 1), rtol=1e-10, atol=1e-12)
    # With padding in front it is the same again.
    padded = [torch.cat((torch.full_like(x[:, :, :13], 50.0), x), 2) for x in (q, k, v)]
    documents = torch.cat((torch.full((2, 13), -1), documents), 1)
    behind, shifted = decoder_attention(*padded, config, mask=causal_within(documents, n + 13, window))
    torch.testing.assert_close(behind[:, :, 13:], found, rtol=1e-10, atol=1e-12)
    assert torch.equal(shifted.to_mask()[:, :, 13:, 13:].expand(-1, 4, -1, -1), kept)
    assert shifted.sparsity == pytest.approx(plan.sparsity)


def test_pooled_estimates_leave_out_what_a_window_hides():
    """One head attends to one block only; rows that cannot see it any more know nothing of it."""
    n, window = 256, 72
    q, k, _ = random_inputs(batch=1, heads=1, key_heads=1, n=n, m=n, width=8)
    mask = causal_within(torch.zeros(1, n, dtype=torch.int64), n, window)
    config = config_of("pooled", sparsity=0.2)
    plan = decoder_plan(q, k, config, mask=mask)
    loud = k.clone()
    loud[:, :, 64:80] = 100.0 * q.mean(2, keepdim=True)
    other = decoder_plan(q, loud, config, mask=mask)
    # From query 160 on nobody sees keys before 89.
    assert torch.equal(plan.block_mask[:, :, 10:], other.block_mask[:, :, 10:])
    assert not torch.equal(plan.block_mask, other.block_mask)


def most_attended(q, k, size, sparsity, reduction):
    """Pages of one step, by the rule: how many, which first, and the best of the others. In float64."""
    m = k.shape[1]
    complete, total = m // size, -(-m // size)
    count = int(((1.0 - sparsity) * m - complete) // size)
    if count < 2 or count >= total:
        return None
    means = k[:, : complete * size].double().unflatten(1, (complete, size)).mean(2)
    share = len(q) // len(k)
    chosen = []
    for head, keys in enumerate(means):
        rows = q[head * share : (head + 1) * share, 0].double()
        mass = torch.softmax(rows @ keys.T * q.shape[2] ** -0.5, -1)
        mass = (mass.mean(0) if reduction == "mean" else mass.amax(0)).tolist()
        first = list(dict.fromkeys((total - 1, 0, total - 2)))
        others = sorted((page for page in range(complete) if page not in first), key=lambda page: -mass[page])
        chosen.append(set((first + others)[:count]))
    return chosen


def step_inputs(m, dtype, seed, page=4):
    """Keys whose pages' means, and what is made of them, lie far apart and are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.stack([torch.randperm(m // page + 1, generator=generator) for _ in range(4)]).view(2, 2, -1)
    k = torch.zeros(2, 2, m, 16)
    k[..., 0] = levels.repeat_interleave(page, 2)[..., :m]
    q = torch.zeros(2, 4, 1, 16)
    q[..., 0] = 0.25
    q[:, 1::2, :, 0] = 0.125
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.8, 0.9])
def test_a_step_keeps_its_own_page_the_sink_and_the_one_before_at_every_length(dtype, sparsity):
    every = 1 if sparsity == 0.75 else 7
    for m, size in [*((m, 16) for m in range(16, 401, every)), *((m, 4) for m in range(16, 401, 9))]:
        reduction = ("mean", "max")[m % 2]
        q, k = step_inputs(m, dtype, m, size)
        config = DecoderSparsity(sparsity=sparsity, page_size=size, group_reduction=reduction)
        plan = decoder_plan(q, k, config)
        wanted = [most_attended(q[b], k[b], size, sparsity, reduction) for b in range(2)]
        assert (plan is None) == (wanted[0] is None)
        if plan is not None:
            found = plan.block_mask[:, :, 0]
            assert found[..., -1].all()
            assert [[set(torch.nonzero(head).flatten().tolist()) for head in one] for one in found] == wanted
        # Both ways of computing, and sequences that begin elsewhere.
        hidden = m % 7 + 1
        mask = torch.ones(2, 1, 1, m + hidden, dtype=torch.bool)
        mask[1, ..., :hidden] = False
        keys = torch.cat((torch.full_like(k[:, :, :hidden], 90.0), k), 2)
        keys[0] = torch.cat((k[0], torch.full_like(k[0, :, :hidden], 1.0)), 1)
        padded = decoder_plan(q, keys, config, mask=mask)
        if wanted[1] is not None:
            found = padded.to_mask()[1, ::2, 0, hidden:]
            for head, pages in zip(found, wanted[1], strict=True):
                places = torch.tensor([place // size in pages for place in range(m)])
                assert torch.equal(head, places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", ["validated", "window"])
@pytest.mark.parametrize("padding", [None, (0, 21), "holes"])
def test_tokens_that_are_verified_together_choose_as_in_steps_of_their_own(dtype, selection, padding):
    n, m = 7, 90
    q, k, v = random_inputs(heads=4, key_heads=2, n=n, m=m, width=8, dtype=dtype)
    config = config_of(selection, sparsity=0.5)
    documents = torch.zeros(2, m, dtype=torch.int64)
    if padding == "holes":
        documents[1, 30:40] = -1
    elif padding is not None:
        documents[1, : padding[1]] = -1
    mask = causal_within(documents, n)
    given = None if padding is None else mask
    pages, separate = PageSummaries(4), PageSummaries(4)
    decoder_attention(q[:, :, :1], k[:, :, :60], v[:, :, :60], config, pages=pages)
    found, plan = decoder_attention(q, k, v, config, mask=given, pages=pages)
    kept = plan.to_mask()
    computed = 0.0
    for query in range(n):
        end = m - n + query + 1
        step = mask[:, :, query : query + 1, :end]
        out, alone = decoder_attention(
            q[:, :, query : query + 1],
            k[:, :, :end],
            v[:, :, :end],
            config,
            mask=None if padding is None else step,
            pages=separate,
        )
        assert torch.equal(found[:, :, query : query + 1], out)
        assert torch.equal(kept[:, :, query : query + 1, :end], (alone.to_mask() & step).expand(-1, 4, -1, -1))
        computed += alone.density * int(step.sum())
    assert plan.sparsity == pytest.approx(1 - computed / int(mask.sum()))


def test_which_passes_write_tokens():
    assert is_decoding(1, 1)
    assert is_decoding(21, 22)
    assert not is_decoding(21, 21)
    assert not is_decoding(33, 1000)
    q, k, v = random_inputs(n=21, m=90)
    dense = config_of(sparsity=0.5, decode_sparsity=0.0)
    assert decoder_attention(q, k, v, dense)[1] is None
    assert isinstance(decoder_plan(q, k, replace(dense, decode_sparsity=0.5)), SegmentedPlan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_summaries_follow_sequences_that_begin_at_different_keys(dtype):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 2, 60, 4, generator=generator).to(dtype)
    summaries = PageSummaries(8)

    def expect(cache, first):
        found = summaries.update(cache, first)
        for row, start in enumerate(first):
            for page in range((cache.shape[2] - start) // 8):
                place = start + 8 * page
                torch.testing.assert_close(found[row, :, page], cache[row, :, place : place + 8].mean(1))

    first = (0, 5, 13)
    for length in (14, 16, 21, 22, 30, 31, 47, 48, 60):
        expect(keys[:, :, :length], first)
    expect(keys[:, :, :33], first)
    expect(torch.cat((keys[:, :, :20], keys[:, :, 30:50]), 2), first)
    # The same keys, pages that begin elsewhere.
    expect(keys[:, :, :50], (0, 6, 13))
    expect(keys[[2, 0, 1], :, :50], (13, 0, 6))
    expect(keys, (0, 0, 59))
    assert torch.equal(
        summaries.update(keys), torch.stack([keys[:, :, 8 * p : 8 * p + 8].mean(2) for p in range(7)], 2)
    )


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_segments_are_what_sees_nothing_outside(data):
    m = data.draw(st.integers(2, 14))
    n = data.draw(st.integers(1, m))
    documents = torch.tensor(data.draw(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=m, max_size=m)))
    # In order, so that documents lie one after the other; padding anywhere.
    real = documents >= 0
    documents[real] = documents[real].sort().values
    window = data.draw(st.sampled_from([None, 3]))
    mask = causal_within(documents[None], n, window)
    form = mask_form(mask)
    covered = torch.zeros(n, m, dtype=torch.long)
    segments = form.segments
    if form.first_keys is not None:
        assert mask[0, 0, 0].tolist() == [place >= form.first_keys[0] for place in range(m)]
        return
    for segment in segments:
        assert segment.sequences == (0,)
        index = segment.entries(1, torch.device("cpu"))
        inside = segment.mask
        rows, columns = segment.sizes
        if inside is None:
            inside = torch.ones(1, 1, rows, columns, dtype=torch.bool).tril(columns - rows)
        covered[index[2], index[3]] += inside[0, 0].long()
    own = torch.arange(n)
    padded = ~mask[0, 0, :, m - n :][own, own]
    assert torch.equal(covered[~padded], mask[0, 0][~padded].long())
    # Rows of padding are served as the mask says, or not at all.
    assert all(not row.any() or torch.equal(row, seen.long()) for row, seen in zip(covered, mask[0, 0], strict=True))


def test_queries_that_see_keys_of_their_own_choice_are_served():
    """As where a model selects keys itself: some queries do not see their own, and perhaps nobody does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_inputs(batch=1, n=80, m=80)
    mask = (torch.rand(1, 1, 80, 80, generator=generator) < 0.5).tril()
    mask[..., 0] = True
    mask[..., 78:, 79] = mask[..., 78:, 78] = False
    found, plan = decoder_attention(q, k, v, config_of(sparsity=0.2, selection="pooled"), mask=mask)
    kept = mask if plan is None else plan.to_mask() & mask
    assert torch.equal(kept[:, :, 78:].any(1), mask[:, 0, 78:])
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~kept, -math.inf)
    torch.testing.assert_close(found, logits.softmax(-1) @ v, rtol=1e-10, atol=1e-12)


def test_gradients_pass_within_segments():
    documents = documents_of("everything")
    q, k, v = random_inputs(heads=4, key_heads=2, n=M, m=M)
    mask = causal_within(documents, M)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found, plan = decoder_attention(*leaves, config_of(), mask=mask)
    truth = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = sparse_attention(*truth, plan, backend="reference")
    weights = torch.randn(found.shape, dtype=torch.float64) * (documents >= 0)[:, None, :, None]
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for leaf, true in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad, true.grad, rtol=1e-8, atol=1e-10)


def test_masks_that_are_refused():
    q, k, v = random_inputs(n=40, m=40)
    ahead = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    ahead[..., :6, :6] = True
    for call in (lambda: mask_form(ahead), lambda: decoder_attention(q, k, v, config_of(), mask=ahead)):
        with pytest.raises(InputError, match="lets queries see later keys"):
            call()
    with pytest.raises(InputError, match=r"mask must be bool of shape \(batch, 1, queries, keys\), got torch.float32"):
        mask_form(ahead.float())
