"""Selection scores against the whole attention matrix, and what they cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from entreg.errors import InputError
from entreg.sparse import score_entries, selection_scores
from entreg.sparse.scores import sampled_positions
from tests.sparse.attention_oracle import attention_matrix, counted_elements, random_inputs

PREFIX = 2


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("sampled", [None, 4, 50])
def test_scores_are_means_of_attention_rows(key_heads, sampled):
    q, k, _ = random_inputs(key_heads=key_heads)
    whole = attention_matrix(q, k)
    rows = sampled_positions(11, sampled) if sampled == 4 else torch.arange(11)
    received, prefix = whole[:, :, rows].mean(2), whole[:, :, :PREFIX].mean(2)
    expected = {"received": received, "prefix": prefix, "mixed": 0.5 * received + 0.5 * prefix}
    for score, value in expected.items():
        found = selection_scores(q, k, score, num_prefix=PREFIX, num_sampled_queries=sampled)
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("m", [11, 17])
@pytest.mark.parametrize("sampled", [None, 4])
def test_causal_scores_are_aligned_at_the_last_query(m, sampled):
    q, k, _ = random_inputs(key_heads=2, m=m)
    rows = torch.arange(11) if sampled is None else sampled_positions(11, sampled)
    expected = attention_matrix(q, k, causal=True, scale=0.7)[:, :, rows].mean(2)
    arguments = {"causal": True, "scale": 0.7, "num_sampled_queries": sampled}
    torch.testing.assert_close(selection_scores(q, k, "received", **arguments), expected, rtol=1e-12, atol=1e-15)
    # The prefix rows of a causal model see only themselves and are left out of the mix.
    mixed = selection_scores(q, k, "mixed", num_prefix=PREFIX, **arguments)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-15)


def test_mixed_without_prefix_is_received():
    q, k, _ = random_inputs()
    assert torch.equal(selection_scores(q, k, "mixed"), selection_scores(q, k, "received"))


def test_fixed_positions_lie_one_in_each_interval():
    for length in range(1, 80):
        for number in range(1, length + 1):
            positions = sampled_positions(length, number).tolist()
            edges = [i * length // number for i in range(number + 1)]
            inside = [low <= p < high for p, low, high in zip(positions, edges[:-1], edges[1:], strict=True)]
            assert all(inside), (length, number)


@pytest.mark.parametrize("side", [8, 12, 14, 24])
def test_fixed_positions_prefer_no_column_of_an_image(side):
    columns = sampled_positions(side * side, 2 * side) % side
    assert len(columns.unique()) >= 0.6 * side
    assert columns.bincount().max() <= 6


def test_drawn_positions_are_distinct_and_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sampled_positions(6, 2, generator) for _ in range(6000)])
    assert (draws[:, 0] != draws[:, 1]).all()
    # 12000 of 6 classes: standard deviation of a count below 41.
    assert (draws.flatten().bincount() - 2000).abs().max() < 5 * 41


def test_magnitude_is_the_norm_of_values_or_tokens():
    q, k, v = random_inputs(key_heads=2)
    expected = torch.tensor([[[float((x * x).sum()) ** 0.5 for x in v[b, h // 2]] for h in range(4)] for b in range(2)])
    torch.testing.assert_close(selection_scores(q, k, "magnitude", values=v).float(), expected)
    tokens = torch.randn(2, 11, 7)
    norms = tokens.square().sum(-1).sqrt()
    found = selection_scores(q, k, "magnitude", features=tokens)
    torch.testing.assert_close(found, norms[:, None].expand(2, 4, 11))


def test_part_scores_are_means_over_well_separated_parts():
    q, k, _ = random_inputs()
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (2, 9), generator=generator)
    labels[:, :3] = torch.arange(3)
    centers = 100.0 * torch.eye(3)
    features = torch.randn(2, 11, 3, generator=generator)
    features[:, PREFIX:] += centers[labels]
    scores = selection_scores(q, k, "part", num_prefix=PREFIX, features=features, num_parts=3)
    mixed = selection_scores(q, k, "mixed", num_prefix=PREFIX)
    expected = mixed.clone()
    for b in range(2):
        for part in range(3):
            members = PREFIX + torch.nonzero(labels[b] == part).flatten()
            expected[b, :, members] = mixed[b, :, members].mean(-1, keepdim=True)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("score", ["received", "prefix", "mixed", "part"])
@pytest.mark.parametrize("sampled", [None, 3])
def test_gradients_equal_those_of_the_whole_matrix(score, sampled):
    q, k, _ = random_inputs(key_heads=2)
    q.requires_grad_()
    k.requires_grad_()
    weights = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels_source = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(6))
    arguments = {"num_prefix": PREFIX, "num_sampled_queries": sampled, "features": labels_source, "num_parts": 1}
    (selection_scores(q, k, score, **arguments) * weights).sum().backward()
    found = q.grad.clone(), k.grad.clone()
    q.grad = k.grad = None
    whole = attention_matrix(q, k)
    rows = torch.arange(11) if sampled is None else sampled_positions(11, sampled)
    received, prefix = whole[:, :, rows].mean(2), whole[:, :, :PREFIX].mean(2)
    mixed = 0.5 * (received + prefix)
    # With a single part the patches all get the patches' mean.
    part = torch.cat((mixed[..., :PREFIX], mixed[..., PREFIX:].mean(-1, keepdim=True).expand(-1, -1, 9)), -1)
    ({"received": received, "prefix": prefix, "mixed": mixed, "part": part}[score] * weights).sum().backward()
    torch.testing.assert_close(found[0], q.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[1], k.grad, rtol=1e-10, atol=1e-13)


def test_sampled_scores_cost_sampled_times_n():
    flops = {}
    for n in (1024, 4096):
        q, k, _ = random_inputs(batch=1, heads=2, key_heads=2, n=n, m=n, width=8, dtype=torch.float32)
        q.requires_grad_()
        with counted_elements() as counter, FlopCounterMode(display=False) as count:
            selection_scores(q, k, "mixed", num_prefix=1, num_sampled_queries=16).sum().backward()
        # 2 heads x 17 rows x n keys; next to it only tensors of q's size.
        assert counter.numel == 2 * 17 * n
        flops[n] = count.get_total_flops()
    assert flops[4096] <= 4 * flops[1024]


@pytest.mark.parametrize(
    ("score", "sampled", "causal"),
    [
        *((score, sampled, False) for score in ("received", "prefix", "mixed") for sampled in (4, None, 99)),
        ("received", 4, True),
        ("mixed", 4, True),
    ],
)
def test_score_entries_are_the_probabilities_computed(score, sampled, causal):
    q, k, _ = random_inputs(m=13)
    arguments = {"num_prefix": PREFIX, "num_sampled_queries": sampled, "causal": causal}
    with counted_elements() as counter:
        selection_scores(q, k, score, **arguments)
    assert score_entries(score, 11, 13, **arguments) == counter.softmax_numel / (2 * 4)
    assert score_entries("magnitude", 11, 13) == score_entries("gate", 11, 13) == 0


def test_bfloat16_scores_lie_within_the_rounding_of_logits():
    q, k, _ = random_inputs(key_heads=2, n=40, m=40, width=16, dtype=torch.bfloat16)
    exact = selection_scores(q.double(), k.double(), "mixed", num_prefix=PREFIX)
    found = selection_scores(q, k, "mixed", num_prefix=PREFIX)
    assert found.dtype == torch.float32
    # Logits are rounded to bfloat16 (2^-8 relative) before the float32 softmax: each probability is off by a factor
    # of at most exp(2 delta), delta the largest error of a logit.
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) / 4.0
    delta = 2.0**-8 * float(logits.abs().max())
    bound = (torch.exp(torch.tensor(2.02 * delta)) - 1.0) * exact + 1e-6
    assert ((found - exact).abs() <= bound).all()
    assert (found - exact).abs().max() > 0


def test_autocast_does_not_change_the_scores():
    q, k, _ = random_inputs(dtype=torch.float32)
    plain = selection_scores(q, k, "mixed", num_prefix=PREFIX, num_sampled_queries=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selection_scores(q, k, "mixed", num_prefix=PREFIX, num_sampled_queries=4), plain)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"score": "best"}, "score must be one of"),
        ({"score": "magnitud"}, "did you mean 'magnitude'"),
        ({"score": "gate"}, "pass them on as a tensor"),
        ({"score": "prefix"}, "needs prefix tokens"),
        ({"score": "prefix", "num_prefix": 1, "causal": True}, "needs prefix tokens"),
        ({"num_prefix": -1}, "num_prefix"),
        ({"num_prefix": 12}, "num_prefix"),
        ({"num_sampled_queries": 0}, "num_sampled_queries"),
        ({"score": "magnitude"}, "values or features"),
        ({"score": "magnitude", "values": torch.ones(2, 4, 10, 5)}, "values must have shape"),
        ({"score": "part", "features": torch.ones(2, 10, 5)}, "features must have shape"),
        ({"score": "part", "num_parts": 0}, "num_parts"),
    ],
)
def test_bad_arguments_are_named(arguments, sentence):
    q, k, _ = random_inputs()
    with pytest.raises(InputError, match=sentence):
        selection_scores(q, k, **arguments)


def test_prefix_rows_must_be_among_the_queries():
    q, k, _ = random_inputs(n=1)
    with pytest.raises(InputError, match="rows of 2 prefix tokens"):
        selection_scores(q, k, "mixed", num_prefix=2)
