"""Attention entropies against the whole softmax matrix in float64, and exhaustive checks of the sampling."""

import functools
import itertools
import math

import pytest
import torch

from entreg.entropy import (
    attention_block_entropy,
    attention_key_entropy,
    attention_received,
    attention_row_entropy,
    effective_support,
)
from entreg.errors import InputError

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 11, 5


def tensors(heads=HEADS, key_heads=HEADS, n=LENGTH, m=LENGTH, seed=0, dtype=torch.float64, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    q = size * torch.randn(BATCH, heads, n, WIDTH, generator=generator, dtype=torch.float64)
    k = torch.randn(BATCH, key_heads, m, WIDTH, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def attention(q, k, causal=False, key_mask=None, scale=None):
    """The whole matrix, masked with -inf, key heads repeated."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    n, m = logits.shape[-2:]
    allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.ones(n, m, dtype=torch.bool)
    allowed = allowed.expand(len(q), 1, n, m)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    return torch.softmax(logits.masked_fill(~allowed, -math.inf), -1), allowed


def row_entropies(probabilities):
    return torch.special.entr(probabilities).sum(-1)


MASK = torch.tensor([[True] * 8 + [False] * 3, [False, True] * 5 + [True]])
QUERY_MASK = torch.tensor([[False] * 2 + [True] * 9, [True] * 6 + [False] * 5])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("m", [LENGTH, LENGTH + 4])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_exact_values_equal_the_whole_matrix(key_heads, causal, m, chunk_size):
    q, k = tensors(key_heads=key_heads, m=m)
    whole, _ = attention(q, k, causal)
    arguments = {"causal": causal, "chunk_size": chunk_size}
    row = attention_row_entropy(q, k, **arguments)
    assert row.shape == (BATCH, HEADS)
    torch.testing.assert_close(row, row_entropies(whole).mean(-1), rtol=1e-12, atol=1e-14)
    received = attention_received(q, k, **arguments)
    torch.testing.assert_close(received, whole.mean(-2), rtol=1e-12, atol=1e-14)
    key = attention_key_entropy(q, k, **arguments)
    torch.testing.assert_close(key, row_entropies(whole.mean(-2)), rtol=1e-12, atol=1e-14)
    assert (row <= key + 1e-12).all()
    torch.testing.assert_close(effective_support(key), key.exp())


@pytest.mark.parametrize("causal", [False, True])
def test_masks_and_scale(causal):
    q, k = tensors()
    query_mask = QUERY_MASK.clone()
    if causal:
        query_mask[1, 0] = False  # its only key is masked out
    whole, _ = attention(q, k, causal, MASK, scale=0.3)
    weights = query_mask.double() / query_mask.sum(-1, keepdim=True)
    entropies = row_entropies(whole).nan_to_num()
    arguments = {"causal": causal, "key_mask": MASK, "query_mask": query_mask, "scale": 0.3, "chunk_size": 4}
    row = attention_row_entropy(q, k, **arguments)
    torch.testing.assert_close(row, (entropies * weights[:, None]).sum(-1), rtol=1e-12, atol=1e-14)
    mean = (whole.nan_to_num() * weights[:, None, :, None]).sum(-2)
    torch.testing.assert_close(attention_received(q, k, **arguments), mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(attention_key_entropy(q, k, **arguments), row_entropies(mean), rtol=1e-12, atol=1e-14)


def test_rows_without_any_allowed_key_are_left_out():
    q, k = tensors()
    key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    key_mask[0, :3] = False  # left padding: with causality, the first three rows see nothing
    whole, _ = attention(q, k, True, key_mask)
    expected = row_entropies(whole)
    row = attention_row_entropy(q, k, causal=True, key_mask=key_mask)
    torch.testing.assert_close(row[0], expected[0, :, 3:].mean(-1))
    torch.testing.assert_close(row[1], expected[1].mean(-1))


@pytest.mark.parametrize("key_mask", [None, MASK])
def test_normalised_rows_are_fractions_of_their_own_maximum(key_mask):
    q, k = tensors()
    whole, allowed = attention(q, k, True, key_mask)
    lengths = allowed.sum(-1).expand(-1, HEADS, -1)
    fractions = torch.where(lengths > 1, row_entropies(whole).nan_to_num() / lengths.clamp_min(2).log(), 0.0)
    expected = fractions.sum(-1) / (lengths > 1).sum(-1)
    result = attention_row_entropy(q, k, causal=True, key_mask=key_mask, normalize=True)
    torch.testing.assert_close(result, expected)
    uniform = attention_row_entropy(torch.zeros_like(q), k, causal=True, key_mask=key_mask, normalize=True)
    torch.testing.assert_close(uniform, torch.ones_like(uniform))


def test_normalised_key_entropy():
    q, k = tensors()
    available = MASK.sum(-1)
    plain = attention_key_entropy(q, k, key_mask=MASK)
    result = attention_key_entropy(q, k, key_mask=MASK, normalize=True)
    torch.testing.assert_close(result, plain / available.log()[:, None])
    uniform = attention_key_entropy(torch.zeros_like(q), k, normalize=True)
    torch.testing.assert_close(uniform, torch.ones_like(uniform))


def test_closed_forms():
    q, k = tensors()
    uniform = attention_row_entropy(torch.zeros_like(q), k)
    torch.testing.assert_close(uniform, torch.full_like(uniform, math.log(LENGTH)))
    # Every query looks at its own key alone: rows 0, keys log n.
    eye = torch.eye(6, dtype=torch.float64)[None, None]
    assert attention_row_entropy(1e3 * eye, eye).item() == pytest.approx(0.0, abs=1e-12)
    assert attention_key_entropy(1e3 * eye, eye).item() == pytest.approx(math.log(6))
    # Uniform over the allowed keys: mean of log 1, ..., log n.
    causal = attention_row_entropy(torch.zeros_like(q), k, causal=True)
    expected = sum(math.log(i) for i in range(1, LENGTH + 1)) / LENGTH
    torch.testing.assert_close(causal, torch.full_like(causal, expected))


def test_large_logits_lose_no_digits():
    q, k = tensors(size=1000.0)
    whole, _ = attention(q, k)
    exact = row_entropies(whole).mean(-1)
    result = attention_row_entropy(q.float(), k.float())
    reference = row_entropies(attention(q.float().double(), k.float().double())[0]).mean(-1)
    torch.testing.assert_close(result.double(), reference, rtol=0, atol=1e-4)
    torch.testing.assert_close(attention_row_entropy(q, k), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", [attention_row_entropy, attention_key_entropy, attention_received])
@pytest.mark.parametrize(
    "arguments", [{}, {"causal": True, "chunk_size": 2}, {"query_indices": torch.tensor([0, 4, 2])}]
)
def test_gradients(function, arguments):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: function(q, k, **arguments), (q, k))


@pytest.mark.parametrize("function", [attention_row_entropy, attention_key_entropy])
def test_masked_keys_get_no_gradient_and_no_nan(function):
    q, k = (tensor.float().requires_grad_() for tensor in tensors(size=30.0))
    gradients = torch.autograd.grad(function(q, k, key_mask=MASK, causal=False).sum(), [q, k])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[1][0, :, 8:] == 0).all()
    assert (gradients[1][0, :, :8] != 0).any()


def block_masses(probabilities, size):
    return torch.stack([part.sum(-1) for part in probabilities.split(size, dim=-1)], -1)


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 4, 50])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_block_entropy_is_that_of_the_mass_per_block(key_heads, causal, block_size, chunk_size):
    q, k = tensors(key_heads=key_heads, m=LENGTH + 3)
    whole, _ = attention(q, k, causal)
    expected = row_entropies(block_masses(whole, block_size)).mean(-1)
    result = attention_block_entropy(q, k, block_size=block_size, causal=causal, chunk_size=chunk_size)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
    single = attention_block_entropy(q.float(), k.float(), block_size=block_size, causal=causal)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("size", [0.0, 0.5, 2.0, 30.0])
def test_row_entropy_lies_between_the_block_entropy_and_that_plus_a_blocks_logarithm(block_size, size):
    q, k = tensors(size=size, seed=3)
    row = attention_row_entropy(q, k, causal=True)
    block = attention_block_entropy(q, k, block_size=block_size, causal=True)
    assert (block <= row + 1e-12).all()
    assert (row <= block + math.log(block_size) + 1e-12).all()


def test_block_entropy_of_known_attention():
    # Uniform over 12 keys in blocks of 3: the upper relation is an equality.
    q, k = torch.zeros(1, 1, 4, 5, dtype=torch.float64), torch.zeros(1, 1, 12, 5, dtype=torch.float64)
    assert attention_block_entropy(q, k, block_size=3).item() == pytest.approx(math.log(4))
    assert attention_row_entropy(q, k).item() == pytest.approx(math.log(4) + math.log(3))
    # Every query looks at its own key alone, or at its own block alone: the lower one is.
    eye = torch.eye(12, dtype=torch.float64)[None, None]
    assert attention_block_entropy(1e3 * eye, eye, block_size=3).item() == pytest.approx(0.0, abs=1e-12)
    own = torch.block_diag(*[torch.ones(3, 3, dtype=torch.float64)] * 4)[None, None]
    assert attention_block_entropy(1e3 * own, own, block_size=3).item() == pytest.approx(0.0, abs=1e-12)
    assert attention_row_entropy(1e3 * own, own).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("key_mask", [None, MASK])
@pytest.mark.parametrize("block_size", [1, 3])
def test_normalised_block_entropy_counts_the_blocks_that_a_row_may_see(key_mask, block_size):
    q, k = tensors()
    whole, allowed = attention(q, k, True, key_mask)
    blocks = (block_masses(allowed, block_size) > 0).sum(-1).expand(-1, HEADS, -1)
    entropies = row_entropies(block_masses(whole.nan_to_num(), block_size))
    fractions = torch.where(blocks > 1, entropies / blocks.clamp_min(2).log(), 0.0)
    arguments = {"block_size": block_size, "causal": True, "key_mask": key_mask, "normalize": True}
    result = attention_block_entropy(q, k, **arguments)
    torch.testing.assert_close(result, fractions.sum(-1) / (blocks > 1).sum(-1))
    assert (result <= 1 + 1e-12).all()
    with pytest.raises(InputError, match=r"at least 2 allowed block\(s\) of 11 keys"):
        attention_block_entropy(q, k, **{**arguments, "block_size": 11})


@pytest.mark.parametrize("masked", [False, True])
def test_block_entropy_passes_gradients_and_keeps_masked_keys_out(masked):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    key_mask = torch.tensor([[False, False, True, True, True], [True] * 5]) if masked else None
    arguments = {"block_size": 2, "causal": True, "key_mask": key_mask}
    assert torch.autograd.gradcheck(lambda q, k: attention_block_entropy(q, k, **arguments), (q, k))
    extreme = [(30 * tensor.detach()).float().requires_grad_() for tensor in (q, k)]
    gradients = torch.autograd.grad(attention_block_entropy(*extreme, **arguments).sum(), extreme)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if masked:
        assert (gradients[1][0, :, :2] == 0).all()


@pytest.mark.parametrize("block_size", [0, -1, 2.0])
def test_a_block_size_that_is_no_number_of_keys(block_size):
    q, k = tensors()
    with pytest.raises(InputError, match="block_size must be"):
        attention_block_entropy(q, k, block_size=block_size)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function", ["row", "block", "key"])
def test_entropies_are_one_compiled_graph(function, masked):
    functions = {
        "row": attention_row_entropy,
        "key": attention_key_entropy,
        "block": lambda *inputs, **arguments: attention_block_entropy(*inputs, block_size=3, **arguments),
    }
    q, k = tensors()
    arguments = {"causal": True, "key_mask": MASK if masked else None}
    arguments["query_indices"] = torch.tensor([9, 4, 10])
    compiled = torch.compile(functions[function], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, **arguments), functions[function](q, k, **arguments))
    sampled = {**arguments, "query_indices": None, "num_sampled_queries": 4}
    assert compiled(q, k, **sampled).isfinite().all()


def all_samples(number, population=LENGTH):
    return [torch.tensor(chosen) for chosen in itertools.combinations(range(population), number)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_row_and_block_entropy_and_received_attention_are_unbiased_over_all_samples(number, causal):
    q, k = tensors(key_heads=2, m=LENGTH + 2)
    blocks = functools.partial(attention_block_entropy, block_size=3)
    for function in (attention_row_entropy, blocks, attention_received):
        estimates = [function(q, k, causal=causal, query_indices=rows) for rows in all_samples(number)]
        torch.testing.assert_close(torch.stack(estimates).mean(0), function(q, k, causal=causal))


@pytest.mark.parametrize("number", [3, 6])
def test_bias_correction_of_the_key_entropy_over_all_samples(number):
    q, k = tensors()
    exact = attention_key_entropy(q, k)

    def bias(correct):
        samples = [
            attention_key_entropy(q, k, query_indices=rows, correct_bias=correct) for rows in all_samples(number)
        ]
        return torch.stack(samples).mean(0) - exact

    plain, corrected = bias(False), bias(True)
    assert (plain < 0).all()
    assert (corrected.abs() < plain.abs()).all()
    assert corrected.abs().mean() < (0.4 if number == 3 else 0.25) * plain.abs().mean()


def test_a_full_sample_is_exact():
    q, k = tensors()
    for function in (attention_row_entropy, attention_key_entropy, attention_received):
        exact = function(q, k)
        torch.testing.assert_close(function(q, k, num_sampled_queries=LENGTH), exact)
        torch.testing.assert_close(function(q, k, num_sampled_queries=1000), exact)
        torch.testing.assert_close(function(q, k, query_indices=torch.randperm(LENGTH)), exact)


@pytest.mark.parametrize("masked", [False, True])
def test_samples_are_drawn_uniformly_and_reproducibly(masked):
    # Queries of different sharpness make each row's entropy tell which row was drawn.
    q, k = tensors(heads=1, key_heads=1)
    query_mask = QUERY_MASK if masked else None
    exact = attention_row_entropy(q, k, query_mask=query_mask)
    generator = torch.Generator().manual_seed(7)
    arguments = {"query_mask": query_mask, "num_sampled_queries": 2}
    draws = torch.stack([attention_row_entropy(q, k, generator=generator, **arguments) for _ in range(2000)])
    error = draws.mean(0) - exact
    assert (error.abs() < 4.5 * draws.std(0) / math.sqrt(len(draws))).all()
    assert (draws.std(0) > 0).all()
    again = [attention_row_entropy(q, k, generator=torch.Generator().manual_seed(3), **arguments) for _ in range(2)]
    assert torch.equal(*again)


def test_a_sample_larger_than_one_elements_rows_is_exact_there():
    q, k = tensors()
    query_mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    query_mask[0, :3] = True
    query_mask[1] = True
    for function in (attention_row_entropy, attention_key_entropy):
        exact = function(q, k, query_mask=query_mask)
        sampled = function(q, k, query_mask=query_mask, num_sampled_queries=5)
        torch.testing.assert_close(sampled[0], exact[0])
        assert not torch.allclose(sampled[1], exact[1])


@pytest.mark.parametrize("function", [attention_row_entropy, attention_key_entropy, attention_received])
def test_low_precision_inputs_lose_only_their_own_digits(function):
    q, k = tensors(dtype=torch.bfloat16)
    expected = function(q.double(), k.double())
    result = function(q, k)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(q, k), result)


def test_the_whole_matrix_is_never_held():
    n = 600
    q = torch.randn(1, 1, n, 4, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    for arguments in ({"chunk_size": 16}, {"num_sampled_queries": 8}):
        for function in (attention_row_entropy, attention_key_entropy):
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                function(q, q, **arguments)
            assert max(saved) <= 8 * n


def test_regularising_key_entropy_narrows_the_attention():
    q, k = (tensor.float().requires_grad_() for tensor in tensors(size=0.3))
    before = attention_key_entropy(q, k).mean().item()
    optimizer = torch.optim.Adam([q, k], lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        attention_key_entropy(q, k, num_sampled_queries=4, generator=generator).mean().backward()
        optimizer.step()
    assert attention_key_entropy(q, k).mean().item() < 0.5 * before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": torch.zeros(2, 4, 11)}, "q must be"),
        ({"k": torch.zeros(2, 4, 11, 5, dtype=torch.int32)}, "k must be"),
        ({"q": torch.zeros(2, 4, 0, 5)}, "empty"),
        ({"k": torch.zeros(2, 3, 11, 5)}, "multiple"),
        ({"k": torch.zeros(2, 4, 11, 6)}, "agree"),
        ({"causal": True, "k": torch.zeros(2, 4, 9, 5)}, "as many keys"),
        ({"key_mask": torch.ones(2, 11)}, "key_mask must be bool"),
        ({"query_mask": torch.ones(2, 10, dtype=torch.bool)}, "query_mask must be bool"),
        ({"key_mask": torch.zeros(2, 11, dtype=torch.bool)}, "row that counts"),
        ({"num_sampled_queries": 0}, "at least 1"),
        ({"num_sampled_queries": 1}, "bias correction"),
        ({"num_sampled_queries": 2, "query_indices": torch.tensor([1])}, "not both"),
        ({"query_indices": torch.tensor([1, 1])}, "distinct"),
        ({"query_indices": torch.tensor([11])}, "distinct"),
        ({"query_indices": torch.tensor([0.0])}, "int64"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"q": torch.full((2, 4, 11, 5), math.nan)}, "finite"),
        ({"key_mask": torch.eye(11, dtype=torch.bool)[:2], "normalize": True}, "at least 2 keys"),
    ],
)
def test_bad_input_gets_one_sentence(change, sentence):
    arguments = {"q": torch.randn(2, 4, 11, 5), "k": torch.randn(2, 4, 11, 5)} | change
    with pytest.raises(InputError, match=sentence) as caught:
        attention_key_entropy(**arguments)
    assert "\n" not in str(caught.value)


def test_indices_that_name_no_row_that_counts():
    q, k = tensors()
    with pytest.raises(InputError, match="at least one row that counts"):
        attention_row_entropy(q, k, query_mask=QUERY_MASK, query_indices=torch.tensor([0, 1]))
