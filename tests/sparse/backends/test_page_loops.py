"""A decoding step in compiled loops: against float64 attention, and against the same choice by plain operators."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from entreg.sparse import DecoderSparsity, PageSummaries, decoder_attention, decoder_plan
from entreg.sparse.backends import page_loops as loops
from entreg.sparse.backends.loops import serves

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def draw(dtype, *, batch=2, heads=6, key_heads=2, m=200, d=24, d_v=16, seed=0, room=0):
    """Keys and values as views of longer buffers, as a cache has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    k, v = normal(batch, key_heads, m + room, d)[:, :, :m], normal(batch, key_heads, m + room, d_v)[:, :, :m]
    return normal(batch, heads, 1, d), k, v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "size", "room"), [(200, 16, 56), (192, 16, 0), (37, 8, 3), (16, 16, 0), (130, 1, 0)])
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_attention_is_that_of_float64_over_the_chosen_pages(dtype, m, size, room, layout):
    q, k, v = draw(dtype, m=m, room=room)
    if layout == "tokens first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    pages = -(-m // size)
    chosen = torch.rand(2, 2, 1, pages, generator=torch.Generator().manual_seed(1)) < 0.4
    chosen[..., -1] = True
    allowed = chosen.repeat_interleave(size, -1)[..., :m].repeat_interleave(3, 1)
    wanted = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=allowed, scale=0.7, enable_gqa=True
    )
    found = loops.attend_chosen_pages(q, k, v, chosen, size, 0.7)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, atol=TOLERANCE[dtype])


def test_large_and_equal_logits_neither_overflow_nor_vanish():
    q, k, v = draw(torch.float32)
    chosen = torch.ones(2, 1, 1, 13, dtype=torch.bool)
    for factor in (0.0, 300.0, -300.0):
        wanted = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=factor, enable_gqa=True)
        assert torch.allclose(loops.attend_chosen_pages(q, k, v, chosen, 16, factor).double(), wanted, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("m", [200, 208, 215])
def test_the_choice_is_that_of_softmax_over_means(reduction, m):
    q, k, _ = draw(torch.float32, m=m)
    plan = decoder_plan(q, k, DecoderSparsity(sparsity=0.5, page_size=8, group_reduction=reduction))
    complete, total = m // 8, -(-m // 8)
    means = k.double()[:, :, : complete * 8].unflatten(2, (complete, 8)).mean(3).repeat_interleave(3, 1)
    mass = torch.softmax(q.double() @ means.transpose(-1, -2) * 24**-0.5, dim=-1).view(2, 2, 3, complete)
    scores = mass.mean(2) if reduction == "mean" else mass.amax(2)
    scores = torch.nn.functional.pad(scores, (0, total - complete))
    scores[..., [0, total - 2, total - 1]] = 2.0
    count = int((0.5 * m - complete) // 8)
    wanted = torch.zeros(2, 2, total, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)
    assert torch.equal(plan.block_mask[:, :, 0], wanted)


def test_equal_scores_fill_the_budget_exactly():
    q, means = torch.zeros(1, 2, 1, 4), torch.ones(1, 2, 20, 4)
    chosen = loops.choose_pages(q, means, 21, 7, 1.0, True)
    assert chosen.sum(-1).flatten().tolist() == [7, 7]
    assert chosen[..., [0, 19, 20]].all()


def test_several_threads_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(loops, "_WORTH_A_THREAD", 1)
    q, k, v = draw(torch.bfloat16, batch=3)
    chosen = torch.ones(3, 2, 1, 13, dtype=torch.bool)
    results = []
    for threads in (1, 4):
        monkeypatch.setattr(loops, "team_size", lambda threads=threads: threads)
        best = loops.choose_pages(q, k[:, :, :40], 41, 9, 0.2, True)
        results.append((loops.attend_chosen_pages(q, k, v, chosen, 16, 0.2), best))
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_tensors_that_the_loops_do_not_take_go_another_way():
    q, k, v = draw(torch.float32)
    assert serves(q, k, v)
    assert not serves(q.half(), k.half(), v.half())
    assert not serves(q, k, v.transpose(2, 3).contiguous().transpose(2, 3))
    assert not serves(q.requires_grad_(), k, v)
    sparsity = DecoderSparsity(sparsity=0.5, page_size=8)
    out, _ = decoder_attention(q, k, v, sparsity, pages=PageSummaries(8))
    out.sum().backward()
    assert q.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(decoder_attention(q, k, v, sparsity)[0], out, atol=1e-6)
