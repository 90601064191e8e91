"""Kernels of our own against float64 softmax under the plan's mask and against the estimators of the other backends.

They run on a CUDA device, or on the CPU in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/sparse/test_triton.py
(Triton 3.6 interprets with numpy below 2.4).
"""

import importlib.util
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from entreg.errors import ConfigError, InputError
from entreg.sparse import (
    ColumnSparsity,
    DecoderSparsity,
    PageSummaries,
    SparsityPlan,
    attention_kernel,
    decoder_attention,
    recorded_kernels,
    sparse_attention,
)
from entreg.sparse.backends.triton.entries import KEYS_PER_TILE, ROWS_PER_TILE
from entreg.sparse.block_scores import highest_blocks, visible_blocks
from entreg.sparse.decoder.decoding import decoder_plan
from entreg.sparse.decoder.selection import block_scores, counts_by_entropy, selection_entries, with_kept_blocks
from entreg.sparse.planning import block_densities
from tests.sparse.attention_oracle import random_inputs

CUDA = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = (
    TRITON and not CUDA and os.environ.get("TRITON_INTERPRET") == "1" and np.lib.NumpyVersion(np.__version__) < "2.4.0"
)
kernels = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="no CUDA device, and Triton's interpreter is off")
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter has no bfloat16 products.
DTYPE = torch.bfloat16 if CUDA else torch.float16
ROUNDING = 6e-3 if CUDA else 1e-3


def draw(dtype=DTYPE, **sizes):
    return [x.to(DEVICE) for x in random_inputs(dtype=dtype, **sizes)]


def random_plan(n, m, size, heads, plan_heads, batch=1, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-(n + (m - n) % size) // size), -(-m // size)
    mask = torch.rand(batch, plan_heads, rows, columns, generator=generator) < density
    own = torch.arange(rows)
    mask[:, :, own, own + (m - n) // size] = True
    # A row that lacks its own block, and one that sees nothing at all.
    mask[:, :, -1, -1] = False
    mask[:, :, 0] = False
    return SparsityPlan(
        "blocks",
        num_queries=n,
        num_keys=m,
        num_heads=heads,
        causal=True,
        block_mask=mask.to(DEVICE),
        block_size=size,
    )


def truth(q, k, v, plan):
    return sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference")


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@kernels
@pytest.mark.parametrize(
    ("size", "n", "m", "heads", "key_heads", "width", "value_width"),
    [
        (16, 70, 70, 4, 2, 64, 64),
        (16, 50, 97, 6, 2, 40, 24),
        (32, 100, 150, 2, 2, 80, 80),
        (64, 130, 200, 2, 1, 128, 128),
        (128, 140, 300, 2, 2, 64, 64),
    ],
)
def test_attention_over_blocks(size, n, m, heads, key_heads, width, value_width):
    q, k, v = draw(batch=2, heads=heads, key_heads=key_heads, n=n, m=m, width=width, value_width=value_width)
    # As models have them: heads beside features.
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for plan_heads in {1, key_heads}:
        plan = random_plan(n, m, size, heads, plan_heads, batch=2)
        found = sparse_attention(q, k, v, plan, backend="triton")
        assert distance(found, truth(q, k, v, plan)) < ROUNDING
        assert torch.isfinite(found).all()


@kernels
@pytest.mark.parametrize("selection", ["validated", "pooled", "sampled"])
@pytest.mark.parametrize(
    ("size", "pool", "number", "n", "m", "heads", "key_heads", "reduction"),
    [(16, 4, 1, 96, 96, 4, 2, "max"), (16, 8, 2, 90, 131, 3, 1, "mean"), (32, 32, 1, 200, 230, 1, 1, "max")],
)
def test_selection_is_that_of_the_other_backends(selection, size, pool, number, n, m, heads, key_heads, reduction):
    from entreg.sparse.backends.triton.selection import estimated_blocks, kept_blocks, shared_counts

    # In float32, so that nothing hangs on rounding; tensor cores are not asked for it.
    q, k, _ = draw(batch=2, heads=heads, key_heads=key_heads, n=n, m=m, width=16, dtype=torch.float32)
    config = DecoderSparsity(
        sparsity=0.5,
        selection=selection,
        block_size=size,
        pool_size=pool,
        num_sampled_queries=number,
        group_reduction=reduction,
        validation_radius=2,
        validation_margin=0.97,
    )
    visible, first, count = visible_blocks(n, m, size, q.device), (m - n) // size, 4
    expected = block_scores(q.double(), k.double(), config, size, count, visible, scale=0.3, mask=None)
    found = estimated_blocks(q, k, config, count, 0.3)
    torch.testing.assert_close(
        found.double().masked_fill(~visible, 0.0), expected.masked_fill(~visible, 0.0), rtol=1e-4, atol=1e-6
    )
    densities = block_densities(n, m, size, True, 1)
    density = 0.4 * densities[count - 1] + 0.6 * densities[count]
    counts = shared_counts(found, density, first, 3, densities)
    assert torch.equal(counts.long(), counts_by_entropy(found.double(), 3, density, visible, densities))
    for wanted, local, tail in ((count, 0, 0), (count, 2, 1), (counts, 1, 0)):
        mask, lists = kept_blocks(found, wanted, first, local, tail)
        scores = with_kept_blocks(found, visible, local)
        kept = highest_blocks(scores, wanted if isinstance(wanted, int) else wanted.long(), 0, visible)
        last = torch.arange(mask.shape[2], device=mask.device) >= mask.shape[2] - tail
        assert torch.equal(mask, kept | (visible & last[:, None]))
        for place in itertools.product(*map(range, mask.shape[:3])):
            blocks = torch.nonzero(mask[place]).flatten().tolist()
            assert blocks[-1] == place[2] + first
            assert int(lists.lengths[place]) == 2 * len(blocks) - 1
            assert lists.index[place][: len(blocks) - 1].tolist() == blocks[:-1]


@kernels
@pytest.mark.parametrize(("selection", "budget"), [("validated", "uniform"), ("pooled", "mass"), ("window", "uniform")])
def test_prompts_from_budget_to_output(selection, budget):
    q, k, v = draw(batch=1, heads=2, key_heads=1, n=150, m=170, width=32, value_width=32)
    config = DecoderSparsity(
        sparsity=0.3, selection=selection, budget=budget, block_size=16, dense_tail_blocks=1, backend="triton"
    )
    with recorded_kernels() as names:
        found, plan = decoder_attention(q, k, v, config)
    assert names == ["triton"]
    assert plan.sparsity >= 0.3
    assert plan.block_mask[:, :, -1].all()
    assert plan.block_mask[..., 0].all()
    assert distance(found, truth(q, k, v, plan)) < ROUNDING
    assert attention_kernel(q, k, v, plan, backend="triton") == "triton"


@kernels
@pytest.mark.parametrize("n", [1, 150])
def test_sparsity_zero_is_dense(n):
    q, k, v = draw(batch=1, heads=4, key_heads=2, n=n, m=150, width=64, value_width=64)
    config = DecoderSparsity(sparsity=0.0, block_size=64, backend="triton")
    found, plan = decoder_attention(q, k, v, config)
    assert plan is None
    assert torch.equal(found, scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=True))


@kernels
@pytest.mark.parametrize(
    ("page", "m", "heads", "key_heads", "width", "reduction"),
    [(16, 213, 4, 2, 64, "max"), (16, 208, 3, 1, 40, "mean"), (64, 700, 1, 1, 32, "max")],
)
def test_decoding(page, m, heads, key_heads, width, reduction):
    q, k, v = draw(
        batch=2 if key_heads > 1 else 1, heads=heads, key_heads=key_heads, n=1, m=m, width=width, value_width=width
    )
    config = DecoderSparsity(sparsity=0.6, page_size=page, group_reduction=reduction, backend="triton")
    pages = PageSummaries(page)
    # From step to step; then another cache of the same length.
    for keys in (k[:, :, : m - 1], k, k.flip(2)):
        values = v[:, :, : keys.shape[2]]
        found, plan = decoder_attention(q, keys, values, config, pages=pages)
        assert distance(found, truth(q, keys, values, plan)) < ROUNDING
        anew = decoder_plan(q, keys, config)
        assert torch.equal(plan.block_mask, anew.block_mask)
    complete = m // page
    means = keys[:, :, : complete * page].double().unflatten(2, (complete, page)).mean(3).to(k.dtype)
    mass = q.double().unflatten(1, (key_heads, -1)).flatten(2, 3) @ means.double().transpose(-1, -2) * width**-0.5
    mass = torch.softmax(mass, -1)
    mass = mass.amax(2) if reduction == "max" else mass.mean(2)
    chosen, total = plan.block_mask[:, :, 0], plan.key_blocks
    assert chosen[..., [0, total - 2, total - 1]].all()
    for image, head in itertools.product(range(len(q)), range(key_heads)):
        free = range(1, min(total - 2, complete))
        kept = [float(mass[image, head, p]) for p in free if chosen[image, head, p]]
        left = [float(mass[image, head, p]) for p in free if not chosen[image, head, p]]
        assert kept
        # Means are rounded alike, sums in another order.
        assert min(kept) > max(left) * (1 - 2e-3)


@kernels
def test_what_is_refused():
    q, k, v = draw(batch=1, heads=2, key_heads=2, n=128, m=128, width=32, value_width=32)
    config = DecoderSparsity(sparsity=0.3, block_size=16, dense_tail_blocks=0, backend="triton")
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=DEVICE).tril()
    with pytest.raises(InputError, match="takes no mask"):
        decoder_attention(q, k, v, config, mask=mask)
    with pytest.raises(InputError, match=r"takes float16 or bfloat16, got torch\.float32"):
        decoder_attention(q.float(), k.float(), v.float(), config)
    with pytest.raises(InputError, match="has no gradient"):
        decoder_attention(q.requires_grad_(), k, v, config)
    wide = [torch.zeros(1, 1, 128, 256, dtype=DTYPE, device=DEVICE)] * 3
    with pytest.raises(InputError, match="up to a width of 128, got 256"):
        decoder_attention(*wide, config)
    plan = random_plan(128, 128, 8, 2, 1)
    with pytest.raises(InputError, match=r"blocks and pages of \(16, 32, 64, 128\) tokens, got 8"):
        sparse_attention(q.detach(), k, v, plan, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("n", [1, 1500])
@pytest.mark.parametrize("selection", ["validated", "window"])
def test_nothing_waits_for_the_device(n, selection):
    q, k, v = draw(batch=1, heads=8, key_heads=2, n=n, m=4000, width=128, value_width=128)
    config = DecoderSparsity(sparsity=0.7, selection=selection, block_size=64, backend="triton")
    pages = PageSummaries(16)
    decoder_attention(q, k, v, config, pages=pages)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, plan = decoder_attention(q, k, v, config, pages=pages)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert distance(found, truth(q, k, v, plan)) < ROUNDING


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_decoding_step_is_captured_as_a_graph():
    q, k, v = draw(batch=2, heads=8, key_heads=2, n=1, m=3000, width=128, value_width=128)
    config, pages = DecoderSparsity(sparsity=0.7, backend="triton"), PageSummaries(16)
    for _ in range(2):
        decoder_attention(q, k, v, config, pages=pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, plan = decoder_attention(q, k, v, config, pages=pages)
    for tensor in (q, k, v):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    assert distance(found, truth(q, k, v, plan)) < ROUNDING


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"block_size": 48}, r"needs a block_size out of \(16, 32, 64, 128\), got 48"),
        ({"page_size": 8}, r"needs a page_size out of \(16, 32, 64, 128\), got 8"),
    ],
)
def test_sizes_are_those_of_the_kernels(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DecoderSparsity(sparsity=0.5, backend="triton", **config)


def test_plans_that_are_not_causal_are_refused():
    with pytest.raises(ConfigError, match="backend must be one of"):
        ColumnSparsity(sparsity=0.5, backend="triton")
    q, k, v = random_inputs(n=32, m=32, width=16, value_width=16, dtype=torch.float16)
    mask = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    plan = SparsityPlan("blocks", num_queries=32, num_keys=32, num_heads=4, block_mask=mask, block_size=16)
    with pytest.raises(InputError, match="takes causal block plans"):
        sparse_attention(q, k, v, plan, backend="triton")


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels can run here")
def test_without_a_device_there_is_one_clear_sentence():
    q, k, v = random_inputs(n=128, m=128, width=16, value_width=16, dtype=torch.bfloat16)
    sentence = "needs a CUDA device" if TRITON else "needs Triton"
    with pytest.raises(InputError, match=f"backend 'triton' {sentence}"):
        decoder_attention(q, k, v, DecoderSparsity(sparsity=0.3, block_size=16, backend="triton"))


def test_the_package_does_not_need_triton():
    program = "import sys; sys.modules['triton'] = None; import entreg.sparse, entreg.adapters"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("n", "m"), [(4096, 4096), (3000, 5001)])
def test_entries_are_those_of_the_tiles(n, m):
    config = DecoderSparsity(
        sparsity=0.5, block_size=64, pool_size=16, num_sampled_queries=2, selection="sampled", backend="triton"
    )
    first = m - n
    # Two samples in each block of 64 of the key positions.
    positions = [64 * block + offset for block in range(first // 64, -(-m // 64)) for offset in (16, 48)]
    expected = 0
    for start in range(0, len(positions), ROWS_PER_TILE):
        tile = positions[start : start + ROWS_PER_TILE]
        end = (tile[-1] // 64 + 1) * 64
        expected += len(tile) * min(-(-end // KEYS_PER_TILE) * KEYS_PER_TILE, m)
    assert selection_entries(config, n, m) == expected
    # At most the tiles beyond the diagonal more than what the samples may see.
    assert expected < sum(positions) + len(positions) * 64 * (ROWS_PER_TILE + 2)
