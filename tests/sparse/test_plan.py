"""Plans against brute force: what is chosen, what is counted, what must be refused."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from entreg.errors import InputError
from entreg.sparse import SparsityPlan, make_plan, score_entries
from entreg.sparse.ball_partition import token_parts
from entreg.sparse.block_scores import pooled_block_scores
from tests.sparse.attention_oracle import attention_matrix, random_inputs


def counted_density(plan):
    """Entries of the mask over entries of dense attention, by counting both, plus those of the selection."""
    n, m = plan.num_queries, plan.num_keys
    dense = sum(1 for i in range(n) for j in range(m) if not plan.causal or j <= i + m - n)
    mask = plan.to_mask()
    return (float(mask.sum()) / (mask.shape[0] * mask.shape[1]) + plan.selection_entries) / dense


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_columns_are_the_keys_of_highest_mean_score(key_heads, share_heads, causal):
    q, k, _ = random_inputs(key_heads=key_heads)
    score = torch.rand(2, 4, 11, generator=torch.Generator().manual_seed(1))
    prefix = 2
    plan = make_plan(q, k, 6, score=score, num_prefix=prefix, share_heads=share_heads, causal=causal)
    assert plan.keys.shape == (2, 1 if share_heads else key_heads, 6)
    groups = (
        [range(4)] if share_heads else [range(g * 4 // key_heads, (g + 1) * 4 // key_heads) for g in range(key_heads)]
    )
    for b, (index, group) in itertools.product(range(2), enumerate(groups)):
        means = [sum(float(score[b, h, j]) for h in group) / len(group) for j in range(11)]
        best = sorted(range(prefix, 11), key=lambda j: -means[j])[: 6 - prefix]
        assert plan.keys[b, index].tolist() == sorted([0, 1, *best])
    assert plan.selection_entries == 0


def test_columns_use_the_named_score():
    q, k, _ = random_inputs(n=30, m=30)
    plan = make_plan(q, k, 8, score="received", num_sampled_queries=None)
    received = attention_matrix(q, k).mean(2)
    assert torch.equal(plan.keys, received.topk(8).indices.sort(-1).values)
    assert plan.selection_entries == 30 * 30
    default = make_plan(q, k, 8, num_prefix=1)
    mixed = make_plan(q, k, 8, num_prefix=1, score="mixed", num_sampled_queries=16)
    assert torch.equal(default.keys, mixed.keys)


@pytest.mark.parametrize("causal", [False, True])
def test_budgets_of_each_image_or_head(causal):
    q, k, _ = random_inputs()
    score = torch.rand(2, 4, 11, generator=torch.Generator().manual_seed(1))
    for budget in (torch.tensor([3, 7]), torch.tensor([[3, 4, 5, 11], [7, 2, 6, 20]])):
        plan = make_plan(q, k, budget, score=score, num_prefix=1, causal=causal)
        wanted = budget.view(2, -1).expand(2, 4).clamp_max(11)
        assert torch.equal(plan.key_valid.sum(-1), wanted)
        for b, h in itertools.product(range(2), range(4)):
            keys = plan.keys[b, h][plan.key_valid[b, h]].tolist()
            alone = make_plan(q, k, int(wanted[b, h]), score=score, num_prefix=1, causal=causal)
            expected = alone.keys[b, h] if alone.plan_heads > 1 else alone.keys[b, 0]
            assert keys == expected.tolist()
        assert plan.density == pytest.approx(counted_density(plan), rel=1e-12)
    equal = make_plan(q, k, torch.tensor([5, 5]), score=score)
    assert equal.key_valid is None
    assert torch.equal(equal.keys, make_plan(q, k, 5, score=score).keys)


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_sparsity_is_what_the_mask_leaves_out(data):
    causal = data.draw(st.booleans())
    n = data.draw(st.integers(1, 24))
    m = data.draw(st.integers(n if causal else 1, 30))
    key_heads, share = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    size = data.draw(st.integers(1, 12))
    kind = data.draw(st.sampled_from(["columns", "blocks"]))
    prefix = data.draw(st.integers(0, min(2, m, n)))
    q, k, _ = random_inputs(heads=key_heads * share, key_heads=key_heads, n=n, m=m, seed=data.draw(st.integers(0, 99)))
    blocks_of_prefix = size * max(1, math.ceil(prefix / size))
    least = max(1, prefix) if kind == "columns" else min(m, blocks_of_prefix)
    budget = data.draw(st.integers(least, m + 2))
    if data.draw(st.booleans()):
        budget = torch.tensor([budget, data.draw(st.integers(least, m + 2))])
    own = {"block_size": size} if kind == "blocks" else {"num_sampled_queries": 3}
    arguments = {"kind": kind, "num_prefix": prefix, "causal": causal, **own}
    plan = make_plan(q, k, budget, share_heads=data.draw(st.booleans()), **arguments)
    assert plan.density == pytest.approx(counted_density(plan), rel=1e-12)
    assert plan.sparsity == 1.0 - plan.density
    mask = plan.to_mask()
    assert mask.any(-1).all()
    offset = m - n if causal else m
    visible_prefix = torch.ones(n, m, dtype=torch.bool).tril(offset)[:, :prefix]
    if kind == "columns":
        assert (mask[..., :prefix] == visible_prefix).all()
    elif not causal:
        assert mask[..., :prefix].all()
    if isinstance(budget, int):
        assert mask.sum(-1).max() <= max(budget, least)
    assert plan.dense == (plan.attended_density == 1.0) or kind == "columns"


@pytest.mark.parametrize("kind", ["columns", "blocks"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("budget", [1.0, 40, 45, torch.tensor([40, 41])])
def test_a_full_budget_is_dense_and_costs_no_selection(kind, causal, budget):
    q, k, _ = random_inputs(key_heads=2, n=40, m=40)
    plan = make_plan(q, k, budget, kind=kind, causal=causal, num_prefix=1)
    assert plan.attended_density == 1.0
    if not isinstance(budget, torch.Tensor):
        assert plan.dense
        assert plan.sparsity == 0.0
        assert plan.selection_entries == 0


@pytest.mark.parametrize(("kind", "causal"), [("columns", False), ("blocks", False), ("blocks", True)])
@pytest.mark.parametrize("density", [0.15, 0.2, 0.35, 0.5, 0.75, 0.99])
def test_density_is_reached_with_the_selection_counted(kind, causal, density):
    q, k, _ = random_inputs(batch=1, heads=2, key_heads=2, n=197, m=197)
    own = {"num_sampled_queries": 8} if kind == "columns" else {}
    arguments = {"kind": kind, "num_prefix": 1, "causal": causal, **own}
    plan = make_plan(q, k, density, **arguments)
    assert plan.selection_entries > 0
    assert counted_density(plan) <= density + 1e-9
    # One key or one block more would be too many.
    if kind == "columns":
        assert plan.density > density - 1 / 197
    else:
        more = make_plan(q, k, int(plan.block_mask.sum(-1).max() + 1) * 16, **arguments)
        # The short last block makes some choices cheaper than the worst case.
        assert more.dense or more.density > density - 0.02


def test_causal_columns_count_what_each_key_is_seen_by():
    plan = SparsityPlan("columns", 4, 6, 1, causal=True, keys=torch.tensor([[[0, 3, 5]]]))
    # Query i sees keys 0 ... i + 2: key 0 by four queries, key 3 by three, key 5 by one, of 3 + 4 + 5 + 6.
    assert plan.sparsity == pytest.approx(1 - 8 / 18)
    assert plan.to_mask()[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "size"), [(13, 13, 4), (5, 13, 4), (5, 15, 4), (1, 10, 4), (16, 16, 4), (3, 3, 8)])
def test_block_masks_by_loops(causal, n, m, size):
    generator = torch.Generator().manual_seed(0)
    offset = (m - n) % size if causal else 0
    grid = (math.ceil((n + offset) / size), math.ceil(m / size))
    blocks = torch.rand(2, 2, *grid, generator=generator) < 0.5
    order = None
    if n == m and not causal:
        order = torch.stack([torch.randperm(m, generator=generator) for _ in range(2)])
    plan = SparsityPlan("blocks", n, m, 4, causal=causal, block_mask=blocks, block_size=size, permutation=order)
    mask = plan.to_mask()
    assert mask.shape == (2, 4, n, m)
    for b, h, i, j in itertools.product(range(2), range(4), range(n), range(m)):
        row, column = i + offset, j
        if order is not None:
            row, column = order[b].tolist().index(i), order[b].tolist().index(j)
        expected = bool(blocks[b, h // 2, row // size, column // size]) and (not causal or j <= i + m - n)
        assert bool(mask[b, h, i, j]) == expected
    assert plan.density == pytest.approx(counted_density(plan), rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_pooled_scores_are_attention_between_block_means(causal, key_heads):
    n, m, size = 10, 15, 4
    q, k, _ = random_inputs(key_heads=key_heads, n=n, m=m)
    found = pooled_block_scores(q, k, size, scale=0.6, causal=causal, permutation=None)
    first, offset = ((m - n) // size, (m - n) % size) if causal else (0, 0)
    for b, h in itertools.product(range(2), range(4)):
        for r in range(found.shape[2]):
            rows = [i for i in range(n) if (i + offset) // size == r]
            weights = []
            for c in range(found.shape[3]):
                columns = range(c * size, min(m, (c + 1) * size))
                logit = 0.6 * q[b, h, rows].mean(0) @ k[b, h // (4 // key_heads), list(columns)].mean(0)
                visible = not causal or c <= r + first
                weights.append(len(columns) * math.exp(float(logit)) if visible else 0.0)
            expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            torch.testing.assert_close(found[b, h, r], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_those_of_highest_score_in_each_row(causal):
    q, k, _ = random_inputs(n=30, m=30, key_heads=2)
    score = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    plan = make_plan(q, k, 15, kind="blocks", block_size=4, score=score, num_prefix=1, causal=causal, num_parts=1)
    for b, g, r in itertools.product(range(2), range(2), range(8)):
        means = (score[b, 2 * g, r] + score[b, 2 * g + 1, r]).tolist()
        seen = range(r + 1) if causal else range(8)
        always = {0, r} if causal else {0}
        others = sorted((c for c in seen if c not in always), key=lambda c: -means[c])
        # 15 keys are three whole blocks.
        expected = sorted([*always, *others[: 3 - len(always)]])
        assert torch.nonzero(plan.block_mask[b, g, r]).flatten().tolist() == expected


def test_a_prefix_that_fills_the_budget_leaves_room_for_each_causal_rows_own_block():
    q, k, _ = random_inputs(n=30, m=30)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        score = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        plan = make_plan(q, k, 12, kind="blocks", block_size=4, score=score, num_prefix=9, causal=True)
        for row in range(8):
            kept = torch.nonzero(plan.block_mask[0, 0, row]).flatten().tolist()
            assert kept == (list(range(row + 1)) if row < 3 else [0, 1, row])


def test_one_causal_block_per_row_is_its_own():
    q, k, _ = random_inputs(n=10, m=14)
    plan = make_plan(q, k, 4, kind="blocks", block_size=4, causal=True)
    # Queries 0 ... 9 stand at the keys 4 ... 13: blocks 1, 2 and 3.
    assert torch.equal(plan.block_mask[0, 0].long(), torch.eye(4, dtype=torch.int64)[1:])


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_parts_recover_separated_clusters_in_the_order_of_a_line(num_prefix):
    generator = torch.Generator().manual_seed(4)
    labels = torch.stack([torch.arange(100)[torch.randperm(100, generator=generator)] % 5 for _ in range(3)])
    line = torch.randn(3, 1, 6, generator=generator)
    points = 1e3 + 50.0 * labels.unsqueeze(-1) * line / line.norm(dim=-1, keepdim=True)
    points = points + torch.randn(3, 100, 6, generator=generator)
    points = torch.cat((torch.zeros(3, num_prefix, 6), points), 1)
    parts = token_parts(points, 5, num_prefix=num_prefix)
    assert (parts[:, :num_prefix] == 0).all()
    found = parts[:, num_prefix:]
    assert found.min() == 1
    assert found.max() == 5
    for b in range(3):
        numbers = [found[b][labels[b] == cluster].unique() for cluster in range(5)]
        assert all(len(number) == 1 for number in numbers)
        # The chain starts at an end of the line, the point farthest from the rest, and follows it.
        chain = [int(number) for number in numbers]
        assert chain in ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])


@pytest.mark.parametrize("seed", range(4))
def test_parts_are_as_tight_as_those_of_k_means(seed):
    generator = torch.Generator().manual_seed(seed)
    centers = 2.0 * torch.randn(8, 32, generator=generator)
    points = centers[torch.randint(8, (196,), generator=generator)] + 1.5 * torch.randn(196, 32, generator=generator)
    parts = token_parts(points[None], 8)[0]
    found = sum(float((points[parts == p] - points[parts == p].mean(0)).square().sum()) for p in parts.unique())
    assert found <= 1.001 * KMeans(8, n_init=10, random_state=0).fit(points.numpy()).inertia_


def test_more_parts_than_tokens_and_equal_tokens():
    points = torch.randn(1, 3, 2)
    assert sorted(token_parts(points, 8)[0].tolist()) == [1, 2, 3]
    assert token_parts(torch.ones(2, 6, 2), 4, num_prefix=6).tolist() == [[0] * 6] * 2
    assert (token_parts(torch.ones(1, 6, 2), 4) >= 1).all()


def test_permutation_makes_parts_contiguous_with_the_prefix_first():
    q, k, _ = random_inputs(n=21, m=21)
    parts = torch.randint(-3, 3, (2, 21), generator=torch.Generator().manual_seed(0))
    plan = make_plan(q, k, 8, kind="blocks", block_size=4, num_prefix=2, parts=parts)
    for b in range(2):
        order = plan.permutation[b].tolist()
        assert order == [0, 1, *sorted(range(2, 21), key=lambda t: (int(parts[b, t]), t))]
    keys = make_plan(q, k, 8, kind="blocks", block_size=4, num_prefix=2, num_parts=3)
    labels = token_parts(k.transpose(1, 2).flatten(2), 3, num_prefix=2)
    assert (labels.gather(1, keys.permutation).diff(dim=1) >= 0).all()


def test_sorting_by_parts_keeps_more_attention_where_tokens_cluster():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (4, 150), generator=generator)
    centers = 2.0 * torch.randn(4, 2, 6, 16, generator=generator)
    index = labels[:, None, :, None].expand(-1, 2, -1, 16)
    q, k = (centers.gather(2, index) + 0.5 * torch.randn(4, 2, 150, 16, generator=generator) for _ in range(2))
    kept = {}
    for num_parts in (1, 6):
        plan = make_plan(q, k, 48, kind="blocks", num_parts=num_parts)
        kept[num_parts] = float((attention_matrix(q, k) * plan.to_mask()).sum(-1).mean())
    assert kept[6] > kept[1] + 0.2


@pytest.mark.parametrize("kind", ["columns", "blocks"])
def test_a_density_that_is_too_small_names_the_smallest(kind):
    q, k, _ = random_inputs(n=100, m=100)
    own = {"num_sampled_queries": 5} if kind == "columns" else {}
    arguments = {"kind": kind, "num_prefix": 3, **own}
    with pytest.raises(InputError, match="smallest possible") as raised:
        make_plan(q, k, 0.01, **arguments)
    smallest = float(re.search(r"smallest possible is (\d\.\d+)", str(raised.value)).group(1))
    assert make_plan(q, k, smallest + 1e-4, **arguments).density <= smallest + 1e-4
    with pytest.raises(InputError, match="smallest possible"):
        make_plan(q, k, smallest - 1e-4, **arguments)


def test_selection_cost_of_a_given_score_counts():
    q, k, _ = random_inputs(n=50, m=50)
    cost = score_entries("mixed", 50, 50, num_prefix=1, num_sampled_queries=4)
    plan = make_plan(q, k, 0.4, score=torch.rand(2, 4, 50), num_prefix=1, selection_entries=cost)
    # 0.4 of 50 keys, of which 5 rows of 50 queries were spent on the score.
    assert plan.keys.shape[2] == 15
    assert plan.density == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("budget", "arguments", "sentence"),
    [
        (0, {}, "at least 1 key"),
        (1, {"num_prefix": 2}, "at least 2 key"),
        (0.0, {}, r"density in \(0, 1\]"),
        (1.5, {}, r"density in \(0, 1\]"),
        (True, {}, r"density in \(0, 1\]"),
        (float("nan"), {}, r"density in \(0, 1\]"),
        (torch.tensor([3, 0]), {}, "at least 1 key"),
        (torch.tensor([3.0, 2.0]), {}, "int64"),
        (torch.tensor([3, 2, 1]), {}, "int64 of shape"),
        (torch.tensor([[3, 2, 1, 4]] * 2), {"share_heads": True}, "int64 of shape"),
        (3, {"kind": "rows"}, "kind must be one of"),
        (3, {"block_size": 4}, "unknown argument 'block_size' of make_plan for plans of kind 'columns'"),
        (3, {"kind": "blocks", "num_sampled_queries": 4}, "unknown argument 'num_sampled_queries'"),
        (3, {"kind": "blocks", "blocksize": 4}, "did you mean 'block_size'"),
        (3, {"score": "mixd"}, "did you mean 'mixed'"),
        (3, {"num_prefix": 12}, "num_prefix"),
        (3, {"score": torch.rand(2, 3, 11)}, "1, 4 or 4 heads"),
        (3, {"score": torch.rand(2, 4, 10)}, "score must be a tensor of shape"),
        (3, {"kind": "blocks", "block_size": 4}, r"at least 1 block\(s\) of 4"),
        (8, {"kind": "blocks", "block_size": 0}, "block_size"),
        (8, {"kind": "blocks", "block_size": 4, "score": "mixed"}, "'pooled' or by a tensor"),
        (8, {"kind": "blocks", "block_size": 4, "num_parts": 0}, "num_parts"),
        (8, {"kind": "blocks", "block_size": 4, "num_parts": 2, "causal": True}, "num_parts=1"),
        (8, {"kind": "blocks", "block_size": 4, "parts": torch.zeros(2, 10).long()}, "parts must be int64"),
    ],
)
def test_bad_arguments_are_named(budget, arguments, sentence):
    q, k, _ = random_inputs()
    with pytest.raises(InputError, match=sentence):
        make_plan(q, k, budget, **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "rows"}, "kind must be one of"),
        ({"kind": "columns"}, "keys must be int64"),
        ({"kind": "columns", "keys": torch.zeros(1, 1, 9).long()}, "budget 1 to num_keys"),
        ({"kind": "columns", "keys": torch.zeros(1, 1, 2).long(), "block_size": 2}, "neither"),
        ({"kind": "columns", "keys": torch.zeros(1, 3, 2).long()}, "cannot be shared by 4"),
        ({"kind": "columns", "keys": torch.zeros(1, 1, 2).long(), "key_valid": torch.ones(1, 1, 2)}, "key_valid"),
        ({"kind": "blocks", "block_mask": torch.ones(1, 1, 2, 2).bool()}, "block_size"),
        ({"kind": "blocks", "block_mask": torch.ones(1, 1, 2, 3).bool(), "block_size": 4}, r"or 1, 2, 2\)"),
        (
            {
                "kind": "blocks",
                "block_mask": torch.ones(1, 1, 2, 2).bool(),
                "block_size": 4,
                "permutation": torch.arange(8)[None],
                "causal": True,
            },
            "permuted only where",
        ),
    ],
)
def test_inconsistent_plans_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        SparsityPlan(num_queries=8, num_keys=8, num_heads=4, **arguments)
