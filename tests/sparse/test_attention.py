"""Sparse attention: every backend against loops in float64, gradients, exactness at sparsity 0, work really saved."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from entreg.errors import InputError
from entreg.sparse import (
    SparsityPlan,
    attention_kernel,
    dense_attention,
    make_plan,
    recorded_kernels,
    sparse_attention,
)
from entreg.sparse.backends import flash, flex
from tests.sparse.attention_oracle import attention_by_loops, counted_elements, random_inputs


def own(kind, block_size):
    """What only one of the kinds of plans takes."""
    return {"block_size": block_size} if kind == "blocks" else {"num_sampled_queries": 3}


def sees(plan):
    """Whether an entry counts, straight from the fields of the plan."""
    order = None if plan.permutation is None else plan.permutation.tolist()

    def entry(b, h, i, j):
        if plan.causal and j > i + plan.num_keys - plan.num_queries:
            return False
        h = h // (plan.num_heads // plan.plan_heads)
        if plan.kind == "columns":
            keys = plan.keys[b, h].tolist()
            valid = [True] * len(keys) if plan.key_valid is None else plan.key_valid[b, h].tolist()
            return any(key == j and good for key, good in zip(keys, valid, strict=True))
        row, column = (i + plan.query_offset, j) if order is None else (order[b].index(i), order[b].index(j))
        return bool(plan.block_mask[b, h, row // plan.block_size, column // plan.block_size])

    return entry


CASES = [
    ("columns", 11, 11, False, 5),
    ("columns", 11, 11, True, 5),
    ("columns", 4, 13, True, 5),
    ("columns", 1, 13, True, 5),
    ("columns", 11, 11, False, torch.tensor([3, 8])),
    ("columns", 6, 11, True, torch.tensor([3, 8])),
    ("blocks", 11, 11, False, 8),
    ("blocks", 12, 12, False, 8),
    ("blocks", 11, 11, True, 8),
    ("blocks", 6, 13, True, 8),
    ("blocks", 1, 13, True, 8),
    ("blocks", 5, 13, False, 8),
    ("blocks", 11, 11, False, torch.tensor([4, 9])),
]


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("kind", "n", "m", "causal", "budget"), CASES)
def test_backends_equal_loops(backend, key_heads, biased, kind, n, m, causal, budget):
    q, k, v = random_inputs(key_heads=key_heads, n=n, m=m, value_width=3)
    plan = make_plan(q, k, budget, kind=kind, num_prefix=1, causal=causal, **own(kind, 4))
    bias = torch.randn(2, m, generator=torch.Generator().manual_seed(9), dtype=torch.float64) if biased else None
    expected = attention_by_loops(q, k, v, sees(plan), scale=0.8, key_bias=bias)
    found = sparse_attention(q, k, v, plan, causal=causal, backend=backend, scale=0.8, key_bias=bias)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_gather_equals_masked_softmax_with_gradients_for_all_shapes(data):
    causal = data.draw(st.booleans())
    n = data.draw(st.integers(1, 21))
    m = data.draw(st.integers(n if causal else 1, 27))
    key_heads, share = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    size = data.draw(st.integers(1, 9))
    kind = data.draw(st.sampled_from(["columns", "blocks"]))
    q, k, v = random_inputs(
        heads=key_heads * share,
        key_heads=key_heads,
        n=n,
        m=m,
        width=data.draw(st.integers(1, 6)),
        value_width=data.draw(st.integers(1, 6)),
        seed=data.draw(st.integers(0, 99)),
    )
    budget = data.draw(st.integers(1 if kind == "columns" else min(m, size), m + 1))
    plan = make_plan(q, k, budget, kind=kind, causal=causal, share_heads=data.draw(st.booleans()), **own(kind, size))
    bias = torch.randn(2, m, dtype=torch.float64) if data.draw(st.booleans()) else None
    # The truth: a dense softmax under the plan's mask, by PyTorch.
    additive = torch.zeros(()).double().masked_fill(~plan.to_mask(), -torch.inf)
    additive = additive if bias is None else additive + bias[:, None, None]
    repeated = [x.repeat_interleave(share, 1) for x in (k, v)]
    expected = torch.softmax(q @ repeated[0].transpose(-1, -2) * q.shape[-1] ** -0.5 + additive, -1) @ repeated[1]
    for backend in ("gather", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found = sparse_attention(*leaves, plan, backend=backend, key_bias=bias)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        truth = [x.clone().requires_grad_() for x in (q, k, v)]
        keys, values = (x.repeat_interleave(share, 1) for x in truth[1:])
        weights = torch.randn(found.shape, dtype=torch.float64)
        probabilities = torch.softmax(truth[0] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5 + additive, -1)
        ((probabilities @ values) * weights).sum().backward()
        (found * weights).sum().backward()
        for leaf, true in zip(leaves, truth, strict=True):
            torch.testing.assert_close(leaf.grad, true.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["columns", "blocks"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sparsity_zero_is_plain_attention_bit_for_bit(kind, causal, key_heads, dtype):
    # As timm makes them: views of one projection.
    joint = torch.randn(2, 33, 4 + 2 * key_heads, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = joint.transpose(1, 2).split([4, key_heads, key_heads], dim=1)
    plan = make_plan(q, k, 1.0, kind=kind, causal=causal)
    assert plan.sparsity == 0.0
    plain = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=key_heads != 4)
    assert torch.equal(sparse_attention(q, k, v, plan), plain)
    tolerance = {torch.bfloat16: 2**-6, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    reference = sparse_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(reference, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("n", "m"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("biased", [False, True])
def test_dense_causal_attention_is_aligned_at_the_last_query(n, m, biased):
    q, k, v = random_inputs(key_heads=2, n=n, m=m)
    bias = torch.randn(2, m, dtype=torch.float64) if biased else None
    expected = attention_by_loops(q, k, v, lambda b, h, i, j: j <= i + m - n, key_bias=bias)
    found = dense_attention(q, k, v, causal=True, key_bias=bias)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["columns", "blocks"])
@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_lies_within_its_rounding_of_the_float64_truth(kind, causal):
    q, k, v = random_inputs(key_heads=2, n=70, m=70, width=32, value_width=32, dtype=torch.bfloat16)
    plan = make_plan(q, k, 32, kind=kind, causal=causal, **own(kind, 8))
    exact = sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference")
    # Weights and the result are rounded to bfloat16, 2^-8 relative each: the error is at most twice that of the sum of
    # weights times |v|. Where products stand for the fused kernel, logits are rounded too, by 2^-9 of the largest at
    # most: weights change by that factor, and their sum by as much again.
    magnitude = sparse_attention(q.double(), k.double(), v.double().abs(), plan, backend="reference")
    with recorded_kernels() as names:
        found = sparse_attention(q, k, v, plan)
    largest = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)).abs().max() / 32**0.5
    logits = 2.0 * 2.0**-9 * largest if "products" in names else 0.0
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= (2.05 * 2.0**-8 + logits) * magnitude).all()


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_queries_without_keys_get_zeros_and_finite_gradients(backend, dtype):
    inputs = [x.requires_grad_() for x in random_inputs(n=6, m=6, width=8, value_width=8, dtype=dtype)]
    columns = SparsityPlan("columns", 6, 6, 4, causal=True, keys=torch.tensor([[[3, 4]]] * 2))
    blocks = torch.tensor([[True, False], [False, False]]).expand(2, 1, 2, 2)
    for plan in (columns, SparsityPlan("blocks", 6, 6, 4, block_mask=blocks, block_size=3)):
        out = sparse_attention(*inputs, plan, backend=backend)
        empty = ~plan.to_mask().any(-1)[:, 0]
        assert empty.any()
        assert (out.transpose(1, 2)[empty] == 0).all()
        out.float().square().sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_columns_compute_the_density_in_flops_and_hold_no_square():
    n = 1024
    q, k, v = random_inputs(batch=1, heads=2, key_heads=2, n=n, m=n, width=16, value_width=16, dtype=torch.float32)
    plan = make_plan(q, k, 0.125, num_sampled_queries=16, num_prefix=1)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as dense:
            scaled_dot_product_attention(q, k, v)
        with FlopCounterMode(display=False) as sparse:
            sparse_attention(q, k, v, plan)
    assert sparse.get_total_flops() / dense.get_total_flops() == pytest.approx(plan.attended_density, rel=1e-9)
    with counted_elements() as counter:
        sparse_attention(q, k, v, make_plan(q, k, 0.125, num_sampled_queries=16, num_prefix=1))
    assert counter.numel < n * n / 4


def test_blocks_compute_little_more_than_the_density_in_flops():
    q, k, v = random_inputs(batch=1, heads=2, key_heads=2, n=500, m=500, width=16, value_width=16, dtype=torch.float32)
    plan = make_plan(q, k, 128, kind="blocks")
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as dense:
            scaled_dot_product_attention(q, k, v)
        with FlopCounterMode(display=False) as sparse:
            sparse_attention(q, k, v, plan)
    # 500 tokens fill 32 blocks of 16 up to the last, which is padded.
    padded = (512 / 500) * (128 / 500)
    assert sparse.get_total_flops() / dense.get_total_flops() == pytest.approx(padded, rel=1e-9)
    assert plan.attended_density <= padded


def test_inputs_need_not_be_contiguous():
    q, k, v = random_inputs(n=9, m=9)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for kind in ("columns", "blocks"):
        plan = make_plan(q, k, 4, kind=kind, **own(kind, 2))
        torch.testing.assert_close(sparse_attention(*strided, plan), sparse_attention(q, k, v, plan))


@pytest.mark.xdist_group("compiling")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "causal", "m", "biased"),
    [
        ("columns", False, 50, True),
        ("columns", True, 60, False),
        ("blocks", False, 50, True),
        ("blocks", True, 60, False),
    ],
)
def test_flex_equals_the_reference(kind, causal, m, biased):
    q, k, v = random_inputs(key_heads=2, n=50, m=m, width=16, value_width=16, dtype=torch.float32)
    plan = make_plan(q, k, 24, kind=kind, causal=causal, num_prefix=1, **own(kind, 8))
    bias = torch.randn(2, m, generator=torch.Generator().manual_seed(0)) if biased else None
    found = sparse_attention(q, k, v, plan, backend="flex", key_bias=bias)
    exact = sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference", key_bias=bias)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert attention_kernel(q, k, v, plan, backend="flex", key_bias=bias) == "flex"


@pytest.mark.xdist_group("compiling")
@pytest.mark.slow
def test_flex_never_falls_back_to_uncompiled_code(monkeypatch):
    monkeypatch.setattr(flex, "_MOST_SHAPES", 1)
    torch.compiler.reset()
    first, second = (random_inputs(n=n, m=n, width=16, value_width=16, dtype=torch.float32) for n in (20, 21))
    sparse_attention(*first, make_plan(*first[:2], 8), backend="flex")
    with pytest.raises(InputError, match="compiled anew for every shape"):
        sparse_attention(*second, make_plan(*second[:2], 8), backend="flex")


@pytest.mark.xdist_group("compiling")
@pytest.mark.slow
def test_columns_compile_into_one_graph():
    q, k, v = random_inputs(n=50, m=50, width=16, value_width=16, dtype=torch.float32)

    def attend(q, k, v):
        return sparse_attention(q, k, v, make_plan(q, k, 20, num_prefix=1))

    compiled = torch.compile(attend, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), rtol=1e-5, atol=1e-6)


def test_flex_says_what_it_cannot_do_on_the_cpu():
    q, k, v = random_inputs()
    plan = make_plan(q, k, 4)
    with pytest.raises(InputError, match="float32, bfloat16 or float16"):
        sparse_attention(q, k, v, plan, backend="flex")
    with pytest.raises(InputError, match="no gradient on the CPU"):
        sparse_attention(q.float().requires_grad_(), k.float(), v.float(), plan, backend="flex")


def test_flash_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    q, k, v = random_inputs()
    with pytest.raises(InputError, match=r"needs the flash-attn package \(pip install 'entreg\[flash\]'") as raised:
        sparse_attention(q, k, v, make_plan(q, k, 4), backend="flash")
    assert "\n" not in str(raised.value)


@pytest.fixture
def flash_twin(monkeypatch):
    """flash_attn_func's documented layout, (batch, length, heads, d) with grouped keys, computed by SDPA."""

    def flash_attn_func(q, k, v, softmax_scale=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert q.shape[1] % k.shape[1] == 0
        out = scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))


@pytest.mark.parametrize(("kind", "n"), [("columns", 11), ("blocks", 12)])
def test_flash_is_handed_the_gathered_keys(monkeypatch, flash_twin, kind, n):
    q, k, v = random_inputs(key_heads=2, n=n, m=n)
    plan = make_plan(q, k, 8, kind=kind, **own(kind, 4))
    with pytest.raises(InputError, match="float16 or bfloat16 on a CUDA device"):
        sparse_attention(q, k, v, plan, backend="flash")
    monkeypatch.setattr(flash, "_require_supported", lambda q: None)
    found = sparse_attention(q, k, v, plan, backend="flash", scale=0.8)
    expected = attention_by_loops(q, k, v, sees(plan), scale=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert attention_kernel(q, k, v, plan, backend="flash") == "flash-attn"


@pytest.mark.parametrize("arguments", [{"causal": True}, {"kind": "blocks", "block_size": 4}, {}])
def test_flash_refuses_what_needs_a_mask(monkeypatch, flash_twin, arguments):
    monkeypatch.setattr(flash, "_require_supported", lambda q: None)
    q, k, v = random_inputs()
    # The short last block is the fifth key block of 4, so 8 of 11 keys must include it for a mask to be needed.
    budget = torch.tensor([8, 11]) if arguments.get("kind") == "blocks" else 4
    bias = None if arguments else torch.zeros(2, 11, dtype=torch.float64)
    with pytest.raises(InputError, match="neither masks nor biases"):
        sparse_attention(q, k, v, make_plan(q, k, budget, **arguments), backend="flash", key_bias=bias)


def test_kernels_are_named_as_they_run():
    q, k, v = random_inputs(n=32, m=32, width=16, value_width=16, dtype=torch.float32)
    plan = make_plan(q, k, 8)
    assert (
        attention_kernel(q, k, v)
        == attention_kernel(q, k, v, plan)
        == attention_kernel(q, k, v, causal=True)
        == "flash"
    )
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernel(q, k, v) == attention_kernel(q, k, v, plan) == "math"
    # PyTorch's fused kernel on the CPU needs values as wide as keys.
    assert attention_kernel(q, k, v[..., :7]) == "math"
    assert attention_kernel(q, k, v, plan, backend="reference") == "reference"


def test_recorded_kernels_lists_what_runs_inside_in_order():
    q, k, v = random_inputs(n=32, m=32, width=16, value_width=16, dtype=torch.float32)
    with recorded_kernels() as names:
        scaled_dot_product_attention(q.requires_grad_(), k, v).sum().backward()
        torch.softmax(q @ k.transpose(-1, -2), -1)
        torch.softmax(q[0, 0], -1)
        scaled_dot_product_attention(q, k, v)
    assert names == ["flash", "math", "flash"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"v": torch.ones(2, 4, 10, 5).double()}, "v must have shape"),
        ({"v": torch.ones(2, 4, 11, 5)}, "one dtype"),
        ({"q": torch.ones(2, 4, 10, 5).double()}, "the plan was made for"),
        ({"q": torch.ones(2, 8, 11, 5).double()}, "the plan was made for"),
        ({"k": torch.ones(2, 2, 11, 5).double(), "v": torch.ones(2, 2, 11, 5).double()}, "does not fit 2 key heads"),
        ({"causal": True}, "contradicts the plan"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"key_bias": torch.zeros(2, 10)}, "key_bias"),
    ],
)
def test_bad_arguments_are_named(change, sentence):
    q, k, v = random_inputs()
    arguments = {"q": q, "k": k, "v": v, "plan": make_plan(q, k, 4), **change}
    with pytest.raises(InputError, match=sentence):
        sparse_attention(**arguments)
