from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.entropy import partition_entropy
from entreg.errors import InputError


def decimal_entropy(counts: list[float]) -> float:
    """The definition in 700 decimal digits: the ratio of two counts may be 1e-600."""
    with localcontext() as context:
        context.prec = 700
        parts = [Decimal(count) for count in counts if count]
        total = sum(parts)
        return float(sum(part / total * (total / part).ln() for part in parts))


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1e300)), min_size=1, max_size=8).filter(any))
@settings(max_examples=200, deadline=None)
def test_matches_long_decimal_arithmetic(counts: list[float]) -> None:
    expected = decimal_entropy(counts)
    assert partition_entropy(np.array(counts)) == pytest.approx(expected, rel=1e-13, abs=1e-300)
    assert partition_entropy(torch.tensor(counts, dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-13, abs=1e-300
    )


@pytest.mark.parametrize("counts", [[10**17, 1], [1.7e308] * 5, [5e-324, 1e-323], [3, 0, 0], [1, 2, 3, 4]])
def test_extreme_ratios_and_scales(counts: list[float]) -> None:
    assert partition_entropy(counts) == pytest.approx(decimal_entropy(counts), rel=1e-13)


def test_uniform_parts_have_entropy_log_k() -> None:
    for parts in (1, 2, 7, 1000):
        assert partition_entropy(np.ones(parts)) == pytest.approx(np.log(parts), abs=1e-15, rel=1e-15)


def test_batch_follows_the_last_axis_and_the_input_kind() -> None:
    counts = np.random.default_rng(0).integers(0, 5, (3, 4, 6)) + np.eye(6, dtype=int)[0]
    batch = partition_entropy(counts)
    assert batch.shape == (3, 4)
    assert batch[1, 2] == pytest.approx(decimal_entropy(counts[1, 2].tolist()), rel=1e-13)
    assert isinstance(partition_entropy(counts[0, 0]), float)
    tensor = partition_entropy(torch.from_numpy(counts))
    assert tensor.dtype == torch.float64
    np.testing.assert_allclose(tensor.numpy(), batch, rtol=1e-14)


def test_gradient_is_the_closed_form_and_zero_at_zero_counts() -> None:
    counts = torch.tensor([[3.0, 0.0, 1.0, 3.0], [0.5, 2.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    entropy = partition_entropy(counts)
    entropy.sum().backward()
    share = (counts / counts.sum(-1, keepdim=True)).detach()
    closed = -(share.log() + entropy.detach()[:, None]) / counts.detach().sum(-1, keepdim=True)
    expected = torch.where(share > 0, closed, torch.zeros_like(closed))
    torch.testing.assert_close(counts.grad, expected, rtol=1e-12, atol=1e-15)
    positive = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partition_entropy, (positive,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    counts = torch.tensor([1.0, 2.0, 5.0, 1000.0], dtype=dtype)
    result = partition_entropy(counts)
    assert result.dtype == dtype
    exact = decimal_entropy(counts.double().tolist())
    assert abs(result.item() - exact) <= torch.finfo(dtype).eps * exact


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([-1.0, 2.0], "non-negative"),
        ([np.nan, 2.0], "finite"),
        ([np.inf, 2.0], "finite"),
        ([0.0, 0.0], "positive count"),
        ([[1.0, 2.0], [0.0, 0.0]], "positive count"),
        ([], "non-empty last axis"),
        (3.0, "non-empty last axis"),
        (["a", "b"], "real numbers"),
        ([[1.0], [1.0, 2.0]], "real numbers"),
        ([1j, 1.0], "real numbers"),
    ],
)
def test_bad_counts_give_one_sentence(counts: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        partition_entropy(counts)
    try:
        tensor = torch.tensor(counts)
    except (ValueError, TypeError):
        return
    with pytest.raises(InputError, match=words):
        partition_entropy(tensor)
