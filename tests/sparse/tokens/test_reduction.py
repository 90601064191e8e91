"""Token reduction against loops over images and tokens, exact invariants, and gradients against the written formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from entreg.errors import InputError
from entreg.sparse.budgets import bucket_by_budget, entropy_budget
from entreg.sparse.config import EntropyBudget
from entreg.sparse.tokens.reduction import bipartite_merge, compose_reductions, drop_tokens, merge_tokens, unmerge


def _case(seed=0, batch=3, n=12, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, width, generator=generator, dtype=dtype)
    scores = torch.rand(batch, n, generator=generator, dtype=dtype) + 0.01
    sizes = torch.randint(1, 5, (batch, n), generator=generator).to(dtype)
    return x, scores, sizes


def _best(scores, keep, num_prefix):
    """Positions of the kept tokens of one image, by a plain sort; among equals the first."""
    patches = sorted(range(num_prefix, len(scores)), key=lambda i: (-float(scores[i]), i))
    return [*range(num_prefix), *sorted(patches[:keep])]


def _joined(features, kept, num_prefix):
    """For one image, which slot every token joins, by distances one pair at a time."""
    slots = []
    for i in range(len(features)):
        if i in kept:
            slots.append(kept.index(i))
            continue
        distances = [float((features[i] - features[j]).square().sum()) for j in kept[num_prefix:]]
        slots.append(num_prefix + distances.index(min(distances)))
    return slots


def _mean_of_parts(x, sizes, slots, count):
    """For one image, the size-weighted mean of each slot's members."""
    means, totals = [], []
    for slot in range(count):
        members = [i for i, mine in enumerate(slots) if mine == slot]
        total = sum(float(sizes[i]) for i in members)
        means.append(sum(float(sizes[i]) * x[i] for i in members) / total)
        totals.append(total)
    return torch.stack(means), torch.tensor(totals, dtype=x.dtype)


@pytest.mark.parametrize("keep", [1, 4, 10, [1, 7, 3], [10, 0, 10]])
def test_dropping_keeps_the_highest_scores_in_their_order(keep):
    x, scores, sizes = _case()
    each = keep if isinstance(keep, list) else [keep] * 3
    given = torch.tensor(keep) if isinstance(keep, list) else keep
    y, reduction = drop_tokens(x, scores, given, num_prefix=2, sizes=sizes)
    assert y.shape == (3, 2 + max(each), 5)
    assert (reduction.valid is None) == isinstance(keep, int)
    for i in range(3):
        kept = _best(scores[i], each[i], 2)
        padding = [-1] * (max(each) - each[i])
        assert reduction.kept[i].tolist() == kept + padding
        assert torch.equal(y[i, : len(kept)], x[i, kept])
        assert not y[i, len(kept) :].any()
        assert reduction.sizes[i].tolist() == sizes[i, kept].tolist() + [0.0] * len(padding)
        assert reduction.assignment[i].tolist() == [kept.index(j) if j in kept else -1 for j in range(12)]
        if reduction.valid is not None:
            assert reduction.valid[i].tolist() == [True] * len(kept) + [False] * len(padding)
    assert reduction.scores is scores


@pytest.mark.parametrize("keep", [1, 4, 10, [1, 7, 3], [10, 10, 2]])
@pytest.mark.parametrize("weighted", [True, False])
def test_merging_is_the_mean_of_the_nearest_anchors_parts(keep, weighted):
    x, scores, sizes = _case(1)
    features = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    each = keep if isinstance(keep, list) else [keep] * 3
    given = torch.tensor(keep) if isinstance(keep, list) else keep
    y, reduction = merge_tokens(x, scores, given, num_prefix=2, features=features, sizes=sizes if weighted else None)
    weights = sizes if weighted else torch.ones_like(sizes)
    for i in range(3):
        kept = _best(scores[i], each[i], 2)
        slots = _joined(features[i], kept, 2)
        means, totals = _mean_of_parts(x[i], weights[i], slots, len(kept))
        assert reduction.kept[i].tolist() == kept + [-1] * (max(each) - each[i])
        assert reduction.assignment[i].tolist() == slots
        torch.testing.assert_close(y[i, : len(kept)], means, rtol=1e-13, atol=1e-13)
        assert not y[i, len(kept) :].any()
        torch.testing.assert_close(reduction.sizes[i, : len(kept)], totals)
        assert not reduction.sizes[i, len(kept) :].any()


def test_distances_survive_features_that_share_a_large_offset():
    _, scores, _ = _case(3)
    features = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    shifted = features + 4096.0
    _, near = merge_tokens(features, scores, 4, num_prefix=1)
    _, far = merge_tokens(features, scores, 4, num_prefix=1, features=shifted)
    for i in range(3):
        kept = _best(scores[i], 4, 1)
        assert far.assignment[i].tolist() == _joined(shifted[i].double(), kept, 1)
    assert torch.equal(near.kept, far.kept)


def _published_merge(x, metric, sizes, r, num_prefix):
    """Bipartite soft matching of one image, step by step from its description."""
    n = len(x)
    first = [i for i in range(num_prefix, n) if i % 2 == 0]
    second = [i for i in range(num_prefix, n) if i % 2 == 1]
    edges = []
    for i in first:
        cosines = [float(F.cosine_similarity(metric[i], metric[j], dim=0)) for j in second]
        best = max(cosines)
        edges.append((best, i, second[cosines.index(best)]))
    edges.sort(key=lambda edge: -edge[0])
    gone = {i: j for _, i, j in edges[:r]}
    order = [*range(num_prefix), *(i for i in first if i not in gone), *second]
    slots = [order.index(gone.get(i, i)) for i in range(n)]
    return order, slots, *_mean_of_parts(x, sizes, slots, len(order))


@pytest.mark.parametrize(("n", "num_prefix"), [(13, 1), (12, 1), (14, 2), (11, 0), (17, 5)])
@pytest.mark.parametrize("r", [1, 3, 100])
def test_bipartite_merging_follows_its_description(n, num_prefix, r):
    x, _, sizes = _case(5, n=n)
    metric = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    y, reduction = bipartite_merge(x, metric, r, num_prefix=num_prefix, sizes=sizes)
    merged = min(r, (n - num_prefix) // 2)
    assert y.shape == (3, n - merged, 5)
    for i in range(3):
        order, slots, means, totals = _published_merge(x[i], metric[i], sizes[i], merged, num_prefix)
        assert reduction.kept[i].tolist() == order
        assert reduction.assignment[i].tolist() == slots
        torch.testing.assert_close(y[i], means, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(reduction.sizes[i], totals)


def _reductions(x, scores, sizes, num_prefix=2):
    """Every way of reducing, with the arguments that all tests below share."""
    features = torch.tanh(x[..., :3] * 2.0)
    ragged = torch.tensor([5, 1, 3])
    return {
        "drop": drop_tokens(x, scores, 4, num_prefix=num_prefix, sizes=sizes),
        "drop ragged": drop_tokens(x, scores, ragged, num_prefix=num_prefix, sizes=sizes),
        "merge": merge_tokens(x, scores, 4, num_prefix=num_prefix, features=features, sizes=sizes),
        "merge ragged": merge_tokens(x, scores, ragged, num_prefix=num_prefix, features=features, sizes=sizes),
        "bipartite": bipartite_merge(x, features, 3, num_prefix=num_prefix, sizes=sizes),
    }


@pytest.mark.parametrize("weighted", [True, False])
def test_prefix_tokens_come_first_and_stay_bit_for_bit(weighted):
    x, scores, sizes = _case(7, dtype=torch.float32)
    scores[:, :2] = 0.0
    for name, (y, reduction) in _reductions(x, scores, sizes if weighted else None).items():
        assert torch.equal(y[:, :2], x[:, :2]), name
        assert reduction.kept[:, :2].tolist() == [[0, 1]] * 3, name
        assert reduction.assignment[:, :2].tolist() == [[0, 1]] * 3, name
        assert torch.equal(reduction.sizes[:, :2], sizes[:, :2] if weighted else torch.ones(3, 2)), name
        # No patch token joins them.
        assert (reduction.assignment[:, 2:] != 0).all(), name
        assert (reduction.assignment[:, 2:] != 1).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_keeping_everything_is_the_identity_bit_for_bit(dtype, weighted):
    x, scores, sizes = _case(8, dtype=torch.float32)
    # Equal features must not make an anchor join another one.
    x[:, 5] = x[:, 6]
    x = x.to(dtype)
    sizes = sizes / 3.0 if weighted else None
    everything = torch.full((3,), 10)
    for y, reduction in (
        drop_tokens(x, scores, 10, num_prefix=2, sizes=sizes, straight_through=True),
        drop_tokens(x, scores, everything, num_prefix=2, sizes=sizes),
        merge_tokens(x, scores, 10, num_prefix=2, sizes=sizes, straight_through=True),
        merge_tokens(x, scores, everything, num_prefix=2, sizes=sizes),
        merge_tokens(x, scores, torch.tensor([10, 1, 10]), num_prefix=2, sizes=sizes),
        bipartite_merge(x, x, 0, num_prefix=2, sizes=sizes),
        merge_tokens(x, scores, 0, num_prefix=12, sizes=sizes),
    ):
        assert y.dtype == dtype
        assert torch.equal(y[::2], x[::2])
        assert torch.equal(reduction.kept[::2], torch.arange(12).expand(2, -1))
        assert torch.equal(reduction.assignment[::2], reduction.kept[::2])
        assert torch.equal(unmerge(y, reduction)[::2], x[::2])
        torch.testing.assert_close(reduction.sizes[::2], (torch.ones(3, 12) if sizes is None else sizes)[::2])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 20),
    num_prefix=st.integers(0, 2),
    part=st.floats(0.0, 1.0),
    ragged=st.booleans(),
    bipartite=st.booleans(),
)
def test_merges_preserve_sums_and_unmerging_projects_on_part_means(seed, n, num_prefix, part, ragged, bipartite):
    patches = n - num_prefix
    if patches < 1:
        return
    x, scores, sizes = _case(seed, n=n)
    keep = 1 + round(part * (patches - 1))
    if bipartite:

        def reduce(values):
            return bipartite_merge(values, x, keep, num_prefix=num_prefix, sizes=sizes)
    else:
        budgets = torch.tensor([keep, 1, patches]) if ragged else keep

        def reduce(values):
            return merge_tokens(values, scores, budgets, num_prefix=num_prefix, features=x, sizes=sizes)

    y, reduction = reduce(x)
    torch.testing.assert_close((reduction.sizes[..., None] * y).sum(1), (sizes[..., None] * x).sum(1))
    torch.testing.assert_close(reduction.sizes.sum(1), sizes.sum(1))
    dense = unmerge(y, reduction)
    again, _ = reduce(dense)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(unmerge(again, reduction), dense)
    # What the projection takes away is orthogonal, in the sizes' inner product, to what it leaves.
    product = (sizes[..., None] * dense * (x - dense)).sum()
    assert abs(float(product)) < 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 9), merge=st.booleans())
def test_patches_in_another_order_give_the_same_tokens(seed, keep, merge):
    x, scores, sizes = _case(seed, n=11)
    order = torch.cat((torch.arange(2), 2 + torch.randperm(9, generator=torch.Generator().manual_seed(seed))))
    function = merge_tokens if merge else drop_tokens
    y, reduction = function(x, scores, keep, num_prefix=2, sizes=sizes)
    moved, permuted = function(x[:, order], scores[:, order], keep, num_prefix=2, sizes=sizes[:, order])
    torch.testing.assert_close(unmerge(moved, permuted), unmerge(y, reduction)[:, order])
    assert torch.equal(order[permuted.kept].sort(1).values, reduction.kept)


def test_images_do_not_influence_each_other():
    x, scores, sizes = _case(9)
    for name, (y, reduction) in _reductions(x, scores, sizes).items():
        alone = _reductions(x.flip(0), scores.flip(0), sizes.flip(0))[name]
        if "ragged" not in name:
            assert torch.equal(alone[0].flip(0), y), name
            assert torch.equal(alone[1].kept.flip(0), reduction.kept), name


def test_buckets_by_entropy_give_every_image_what_the_padded_batch_gives():
    x, scores, _ = _case(22, batch=8)
    scores = scores ** torch.arange(1, 9, dtype=torch.float64)[:, None]
    budgets = entropy_budget(scores, EntropyBudget(), num_prefix=1)
    assert len(budgets.unique()) > 3
    padded, whole = merge_tokens(x, scores, budgets, num_prefix=1)
    tokens = 0
    for bucket in bucket_by_budget(budgets, 3):
        y, reduction = merge_tokens(x[bucket], scores[bucket], budgets[bucket], num_prefix=1)
        tokens += y.shape[0] * y.shape[1]
        torch.testing.assert_close(y, padded[bucket, : y.shape[1]])
        assert not padded[bucket, y.shape[1] :].any()
        assert torch.equal(reduction.kept, whole.kept[bucket, : y.shape[1]])
        assert torch.equal(reduction.assignment, whole.assignment[bucket])
    assert tokens < padded.shape[0] * padded.shape[1]


def test_unmerging_gives_dropped_tokens_zeros_or_what_is_asked_for():
    x, scores, _ = _case(10)
    for keep in (3, torch.tensor([3, 0, 2])):
        y, reduction = drop_tokens(x, scores, keep, num_prefix=1)
        dropped = reduction.assignment < 0
        assert dropped.any()
        restored = unmerge(y * 2.0, reduction)
        assert not restored[dropped].any()
        assert torch.equal(restored[~dropped], 2.0 * x[~dropped])
        filled = unmerge(y * 2.0, reduction, fill=-x)
        assert torch.equal(filled[dropped], -x[dropped])
        assert torch.equal(filled[~dropped], 2.0 * x[~dropped])


def test_composed_reductions_act_as_one():
    x, scores, _ = _case(11, n=20)
    middle, first = merge_tokens(x, scores, 9, num_prefix=2)
    for reduce in (
        lambda: merge_tokens(middle, scores[:, :11], 4, num_prefix=2, sizes=first.sizes),
        lambda: merge_tokens(middle, scores[:, :11], torch.tensor([4, 1, 2]), num_prefix=2, sizes=first.sizes),
        lambda: bipartite_merge(middle, middle, 3, num_prefix=2, sizes=first.sizes),
        lambda: drop_tokens(middle, scores[:, :11], 4, num_prefix=2, sizes=first.sizes),
    ):
        last, second = reduce()
        whole = compose_reductions(first, second)
        assert torch.equal(unmerge(last, whole), unmerge(unmerge(last, second), first))
        real = whole.kept >= 0
        assert torch.equal(first.kept.gather(1, second.kept.clamp_min(0))[real], whole.kept[real])
        assert torch.equal(real, second.kept >= 0)
        for i in range(3):
            for slot in range(last.shape[1]):
                assert (
                    int(whole.sizes[i, slot]) == int((whole.assignment[i] == slot).sum())
                    or (whole.assignment[i] < 0).any()
                )
    dropped, first = drop_tokens(x, scores, 9, num_prefix=2)
    last, second = merge_tokens(dropped, scores[:, :11], 4, num_prefix=2)
    whole = compose_reductions(first, second)
    assert torch.equal(whole.assignment < 0, first.assignment < 0)
    assert torch.equal(unmerge(last, whole), unmerge(unmerge(last, second), first))


def test_the_key_bias_makes_equal_members_count_as_many():
    # Tokens that are equal within their parts: attention over the parts is attention over all tokens.
    x, scores, _ = _case(12)
    _, reduction = merge_tokens(x, scores, torch.tensor([4, 2, 6]), num_prefix=1)
    y = merge_tokens(x, scores, torch.tensor([4, 2, 6]), num_prefix=1)[0]
    equal = unmerge(y, reduction)
    query = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, equal, equal)
    bias = reduction.key_bias[:, None]
    assert torch.equal(bias.isinf()[:, 0], ~reduction.valid)
    torch.testing.assert_close(F.scaled_dot_product_attention(query, y, y, attn_mask=bias), expected)


@pytest.mark.parametrize("keep", [4, [4, 0, 6]])
@pytest.mark.parametrize("merge", [False, True])
def test_straight_through_changes_no_value_and_its_gradient_is_the_written_formula(keep, merge):
    if merge and keep != 4:
        keep = [4, 1, 6]
    x, scores, sizes = _case(13)
    scores = scores.requires_grad_()
    function = merge_tokens if merge else drop_tokens
    budget = torch.tensor(keep) if isinstance(keep, list) else keep
    plain, _ = function(x, scores, budget, num_prefix=2, sizes=sizes)
    y, reduction = function(x, scores, budget, num_prefix=2, sizes=sizes, straight_through=True)
    assert torch.equal(y, plain)
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * wanted).sum(), scores)
    expected = torch.zeros_like(gradient)
    for i in range(3):
        kept = [(slot, int(j)) for slot, j in enumerate(reduction.kept[i]) if int(j) >= 2]
        wants = {j: float(wanted[i, slot] @ plain[i, slot]) for slot, j in kept}
        for j in range(2, 12):
            own = wants[j] / float(scores[i, j].detach()) if j in wants else 0.0
            expected[i, j] = own - sum(wants.values()) / float(scores[i, 2:].detach().sum())
    torch.testing.assert_close(gradient, expected)


def test_straight_through_gradients_stay_finite_for_scores_at_the_edge():
    x, _, _ = _case(15, dtype=torch.float32)
    scores = torch.zeros(3, 12)
    scores[0, 4], scores[1, 3:] = 1.0, 1e-38
    scores.requires_grad_()
    y, _ = drop_tokens(x, scores, 5, num_prefix=1, straight_through=True)
    assert torch.equal(y, drop_tokens(x, scores, 5, num_prefix=1)[0])
    y.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_without_straight_through_scores_get_no_gradient_and_tokens_the_exact_one():
    x, scores, sizes = _case(16)
    x, scores = x.requires_grad_(), scores.requires_grad_()
    for name, (y, reduction) in _reductions(x, scores, sizes).items():
        wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        gradient, none = torch.autograd.grad((y * wanted).sum(), (x, scores), allow_unused=True)
        assert none is None, name
        # The output is linear in the tokens: each contributes size / total size of the part it joined.
        share = sizes / reduction.sizes.gather(1, reduction.assignment.clamp_min(0))
        share = share.masked_fill(reduction.assignment < 0, 0.0)
        expected = share[..., None] * unmerge(wanted, reduction)
        torch.testing.assert_close(gradient, expected, msg=name)


def test_selection_learns_through_the_straight_through_gradient():
    # One of 8 tokens carries the answer; the score starts blind to it.
    generator = torch.Generator().manual_seed(18)
    mark = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([mark], lr=0.05)
    for _ in range(150):
        signal = torch.randint(0, 8, (64,), generator=generator)
        x = torch.randn(64, 8, 4, generator=generator) * 0.3
        x[torch.arange(64), signal] += torch.tensor([1.0, 0.0, 0.0, 0.0])
        scores = torch.softmax(x @ mark, -1)
        y, reduction = drop_tokens(x, scores, 2, num_prefix=0, straight_through=True)
        optimizer.zero_grad()
        (-y[..., 0].mean()).backward()
        optimizer.step()
    found = (reduction.kept == signal[:, None]).any(1).double().mean()
    assert found > 0.9


def test_half_precision_sums_are_made_in_single_precision():
    x, scores, _ = _case(19, batch=2, n=257, width=3, dtype=torch.float32)
    x = (x + 8.0).bfloat16()
    y, reduction = merge_tokens(x, scores, 1, num_prefix=1)
    assert y.dtype == torch.bfloat16
    assert reduction.sizes.dtype == torch.float32
    assert torch.equal(y[:, 1], x[:, 1:].double().mean(1).bfloat16())


def test_autocast_does_not_blur_what_is_nearest():
    x, scores, _ = _case(23, batch=2, n=257, width=6, dtype=torch.float32)
    for reduce in (
        lambda: merge_tokens(x, scores, 40, num_prefix=1)[1],
        lambda: bipartite_merge(x, x, 60, num_prefix=1)[1],
    ):
        expected = reduce().assignment
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reduce().assignment, expected)


def test_arguments_that_are_refused():
    x, scores, sizes = _case(20)
    with pytest.raises(InputError, match=r"x must be a non-empty floating-point tensor of shape \(batch, n, c\)"):
        drop_tokens(x[0], scores, 3, num_prefix=1)
    with pytest.raises(InputError, match=r"num_prefix must be in \[0, 12\], got 13"):
        drop_tokens(x, scores, 3, num_prefix=13)
    with pytest.raises(InputError, match="scores must be floating point"):
        drop_tokens(x, scores[:, 1:], 3, num_prefix=1)
    with pytest.raises(InputError, match="sizes must be floating point"):
        drop_tokens(x, scores, 3, num_prefix=1, sizes=sizes.long())
    with pytest.raises(InputError, match=r"keep must be in \[0, 11\].*, got 12"):
        drop_tokens(x, scores, 12, num_prefix=1)
    with pytest.raises(InputError, match=r"keep must be in \[0, 11\]"):
        drop_tokens(x, scores, torch.tensor([1, 2, -1]), num_prefix=1)
    with pytest.raises(InputError, match=r"keep must be an integer or int64 of shape \(3,\)"):
        drop_tokens(x, scores, torch.tensor([1, 2]), num_prefix=1)
    with pytest.raises(InputError, match="must keep at least one patch token"):
        drop_tokens(x, scores, torch.tensor([1, 0, 2]), num_prefix=0)
    with pytest.raises(InputError, match="merging needs keep of at least 1"):
        merge_tokens(x, scores, torch.tensor([1, 0, 2]), num_prefix=1)
    with pytest.raises(InputError, match=r"features must be floating point of shape \(3, 12, d\)"):
        merge_tokens(x, scores, 3, num_prefix=1, features=x[:, 1:])
    with pytest.raises(InputError, match=r"metric must be floating point of shape \(3, 12, d\)"):
        bipartite_merge(x, x[:, 1:], 3, num_prefix=1)
    with pytest.raises(InputError, match="r must be at least 0, got -1"):
        bipartite_merge(x, x, -1, num_prefix=1)
    y, reduction = drop_tokens(x, scores, 3, num_prefix=1)
    with pytest.raises(InputError, match=r"y must be of shape \(\*\(3, 4\), c\)"):
        unmerge(y[:, 1:], reduction)
    with pytest.raises(InputError, match=r"fill must be of shape \(3, 12, 5\)"):
        unmerge(y, reduction, fill=y)
    with pytest.raises(InputError, match="the first leaves"):
        compose_reductions(reduction, reduction)
    _, padded = drop_tokens(x, scores, torch.tensor([1, 2, 3]), num_prefix=1)
    _, second = drop_tokens(y, scores[:, :4], 2, num_prefix=1)
    with pytest.raises(InputError, match="padded reduction cannot be followed"):
        compose_reductions(padded, second)


def test_equal_scores_are_decided_by_position():
    x, _, _ = _case(21, n=400)
    _, reduction = drop_tokens(x, torch.ones(3, 400), 150, num_prefix=1)
    assert torch.equal(reduction.kept, torch.arange(151).expand(3, -1))
    # All pairs alike, and exactly so in every order of computing: the first of the first set go, to the first of the
    # second.
    _, reduction = bipartite_merge(x, torch.ones(3, 400, 1), 50, num_prefix=1)
    assert torch.equal(reduction.kept[:, 1:150], torch.arange(102, 400, 2).expand(3, -1))
    assert reduction.sizes[:, 150].tolist() == [51.0] * 3
