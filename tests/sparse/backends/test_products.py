"""Products in bfloat16 against float64, within the bound that their rounding allows."""

import pytest
import torch

from entreg.sparse import DecoderSparsity, decoder_attention, recorded_kernels
from entreg.sparse.backends import products
from tests.sparse.attention_oracle import random_inputs

# Weights and outputs are rounded to bfloat16, 2^-8 relative each, sums in between to float32.
ROUNDING = 2.05 * 2.0**-8


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Also on processors where the fused kernel would be taken."""
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)


def truth(q, k, v, scale, allowed):
    """Output, and the same with the values' magnitudes, which errors are relative to; and the largest logit."""
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights @ v.double(), weights @ v.double().abs(), logits.masked_fill(~allowed, 0.0).abs().max()


def assert_close(found, q, k, v, scale, allowed):
    exact, magnitude, largest = truth(q, k, v, scale, allowed)
    assert found.dtype == torch.bfloat16
    # A logit is off by 2^-9 of itself, and so is, at most, the logarithm of the sum of weights.
    bound = (ROUNDING + 2.0 * 2.0**-9 * largest) * magnitude
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("columns", [None, 1, 5, 40])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_groups(columns, scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, length, width).bfloat16() for length, width in ((6, 16), (40, 16), (40, 8)))
    last = None if columns is None else torch.rand(3, 6, columns) < 0.5
    allowed = torch.ones(3, 6, 40, dtype=torch.bool)
    if last is not None:
        last[..., -1] = True
        allowed[..., -columns:] = last
    assert_close(products.attend_groups(q, k, v, scale, last), q, k, v, scale, allowed)


def test_rows_without_keys_are_finite():
    q, k, v = (torch.randn(2, 4, 8).bfloat16() for _ in range(3))
    assert products.attend_groups(q, k, v, 1.0, torch.zeros(4, 4, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (300, 300), (130, 200), (128, 128)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 1 << 20])
def test_causal(n, m, key_heads, most, monkeypatch):
    monkeypatch.setattr(products, "_MOST_LOGITS", most)
    q, k, v = random_inputs(key_heads=key_heads, n=n, m=m, width=16, value_width=8, dtype=torch.bfloat16)
    # As caches hand them over: room behind the keys, and heads behind the tokens.
    k = torch.nn.functional.pad(k, (0, 0, 0, 7))[:, :, :m]
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    found = products.attend_causal(q, k, v, 0.25)
    share = 4 // key_heads
    assert_close(found, q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), 0.25, allowed)


@pytest.mark.parametrize("budget", ["uniform", "entropy", "mass"])
@pytest.mark.parametrize(("n", "m"), [(256, 256), (100, 250)])
@pytest.mark.parametrize("padding", [0, 40])
def test_the_sparse_path(budget, n, m, padding):
    q, k, v = random_inputs(key_heads=2, n=n, m=m, width=16, value_width=16, dtype=torch.bfloat16)
    allowed = torch.ones(len(q), 1, n, m, dtype=torch.bool).tril(m - n)
    allowed[0, :, :, :padding] = False
    mask = allowed if padding else None
    sparsity = DecoderSparsity(sparsity=0.4, budget=budget, block_size=16, pool_size=4, dense_tail_blocks=0)
    with recorded_kernels() as names:
        found, plan = decoder_attention(q, k, v, sparsity, mask=mask)
    assert "products" in names
    assert plan.sparsity > 0.3
    seen = plan.to_mask() & allowed
    rows = seen.any(-1, keepdim=True)
    assert found.where(~rows, 0.0).count_nonzero() == 0
    exact, magnitude, largest = truth(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), 0.25, seen | ~rows)
    error = (found.double() - exact).abs().where(rows, 0.0)
    assert (error <= (ROUNDING + 2.0 * 2.0**-9 * largest) * magnitude).all()


def test_what_the_fused_kernel_keeps(monkeypatch):
    x = torch.randn(1, 2, 4, 8)
    assert products.serves(x.bfloat16())
    assert not products.serves(x)
    assert not products.serves(x.half())
    assert not products.serves(x.bfloat16(), x.bfloat16().requires_grad_())
    with torch.no_grad():
        assert products.serves(x.bfloat16().requires_grad_())
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    assert not products.serves(x.bfloat16())
