"""The soft partition against its formula in loops, its limits, and what its gradients reach."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.errors import ConfigError, InputError
from entreg.sparse import fuse_tokens, partition_tokens
from entreg.sparse.config import EntropyBudget, TokenSparsity

PREFIX = 2


def example(batch=2, n=11, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, width, generator=generator, dtype=torch.float64)
    scores = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    features = torch.randn(batch, n, 3, generator=generator, dtype=torch.float64)
    return x, scores, features


def by_hand(x, scores, features, chosen, sharpness):
    """One image: means and masses of the soft partition with the given anchors, in plain loops."""
    w = scores[PREFIX:] / scores[PREFIX:].sum()
    unit = features / features.norm(dim=-1, keepdim=True)
    masses, sums = torch.zeros(len(chosen)).double(), torch.zeros(len(chosen), x.shape[1]).double()
    for i in range(PREFIX, len(x)):
        cosines = torch.stack([unit[i] @ unit[j] for j in chosen])
        p = (sharpness * cosines).exp() / (sharpness * cosines).exp().sum()
        for j in range(len(chosen)):
            masses[j] += w[i - PREFIX] * p[j]
            sums[j] += w[i - PREFIX] * p[j] * x[i]
    return sums / masses[:, None], masses


@pytest.mark.parametrize("anchors", ["top", "residual"])
def test_means_and_masses_follow_the_formula(anchors):
    x, scores, features = example()
    reduced, reduction = partition_tokens(
        x, scores, 4, num_prefix=PREFIX, features=features, sharpness=3.0, anchors=anchors
    )
    assert torch.equal(reduced[:, :PREFIX], x[:, :PREFIX])
    for image in range(2):
        chosen = reduction.kept[image, PREFIX:].tolist()
        assert len(set(chosen)) == 4
        means, masses = by_hand(x[image], scores[image], features[image], chosen, 3.0)
        torch.testing.assert_close(reduced[image, PREFIX:], means)
        torch.testing.assert_close(reduction.sizes[image, PREFIX:], 4 * masses)
    torch.testing.assert_close(reduction.sizes[:, PREFIX:].sum(1), torch.full((2,), 4.0).double())
    assert (reduction.sizes[:, :PREFIX] == 1).all()


def test_top_anchors_are_the_heaviest_and_residual_ones_avoid_what_is_explained():
    features = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 0, 1, 2]][None]
    scores = torch.tensor([[9.0, 9.0, 5.0, 4.0, 3.0, 2.0]]).double()
    x = torch.randn(1, 6, 4).double()
    _, top = partition_tokens(x, scores, 2, num_prefix=2, features=features, anchors="top")
    assert top.kept[0, 2:].tolist() == [2, 3]
    _, residual = partition_tokens(x, scores, 2, num_prefix=2, features=features, sharpness=20.0, anchors="residual")
    # Token 3 looks like token 2, which explains it; the next mass is token 4's.
    assert residual.kept[0, 2:].tolist() == [2, 4]


def test_sharp_partition_of_equal_tokens_keeps_the_mass_weighted_sum():
    x, scores, features = example(seed=3)
    reduced, reduction = partition_tokens(x, scores, 5, num_prefix=PREFIX, features=features, sharpness=5000.0)
    w = scores[:, PREFIX:] / scores[:, PREFIX:].sum(1, keepdim=True)
    total = (w.unsqueeze(-1) * x[:, PREFIX:]).sum(1)
    kept = (reduction.sizes[:, PREFIX:, None] / 5 * reduced[:, PREFIX:]).sum(1)
    torch.testing.assert_close(kept, total)
    # Hard in the limit: each representative is the mean of the members that the assignment names.
    for j in range(PREFIX, PREFIX + 5):
        for image in range(2):
            members = (reduction.assignment[image] == j).nonzero()[:, 0]
            mass = scores[image, members]
            expected = (mass[:, None] * x[image, members]).sum(0) / mass.sum()
            torch.testing.assert_close(reduced[image, j], expected, rtol=1e-3, atol=1e-3)


def test_every_score_gets_a_gradient():
    x, scores, features = example()
    scores.requires_grad_()
    reduced, reduction = partition_tokens(x, scores, 3, num_prefix=PREFIX, features=features)
    (reduced.square().sum() + reduction.key_bias.sum()).backward()
    assert (scores.grad[:, PREFIX:] != 0).all()
    assert (scores.grad[:, :PREFIX] == 0).all()


def test_gradients_are_those_of_finite_differences():
    x, scores, features = example(batch=1, n=6)

    def value(x, scores, features):
        reduced, reduction = partition_tokens(x, scores, 2, num_prefix=PREFIX, features=features, anchors="top")
        return reduced, reduction.key_bias

    inputs = tuple(t.requires_grad_() for t in (x, scores + 0.1, features))
    assert torch.autograd.gradcheck(value, inputs)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from(["top", "residual"]))
def test_result_does_not_depend_on_the_order_of_the_tokens(seed, keep, anchors):
    x, scores, features = example(batch=1, seed=seed)
    order = torch.cat([torch.arange(PREFIX), PREFIX + torch.randperm(9, generator=torch.Generator().manual_seed(seed))])
    first, one = partition_tokens(x, scores, keep, num_prefix=PREFIX, features=features, anchors=anchors)
    second, two = partition_tokens(
        x[:, order], scores[:, order], keep, num_prefix=PREFIX, features=features[:, order], anchors=anchors
    )
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(one.sizes, two.sizes)
    assert torch.equal(order[two.kept[0]], one.kept[0])


def test_tokens_without_any_attention_give_finite_values():
    x, scores, features = example()
    scores = torch.zeros_like(scores).float().requires_grad_()
    reduced, reduction = partition_tokens(x.float(), scores, 3, num_prefix=PREFIX, features=features.float())
    (reduced.sum() + reduction.key_bias.sum()).backward()
    assert reduced.isfinite().all()
    assert reduction.key_bias.isfinite().all()
    assert scores.grad.isfinite().all()


def test_fused_token_is_the_score_weighted_mean_of_the_rest():
    x, scores, _ = example()
    reduced, reduction = fuse_tokens(x, scores, 4, num_prefix=PREFIX)
    for image in range(2):
        order = sorted(range(PREFIX, 11), key=lambda i: -scores[image, i].item())
        kept, rest = sorted(order[:3]), order[3:]
        assert torch.equal(reduced[image, PREFIX:-1], x[image, kept])
        weights = scores[image, rest]
        expected = (weights[:, None] * x[image, rest]).sum(0) / weights.sum()
        torch.testing.assert_close(reduced[image, -1], expected)
        assert (reduction.assignment[image, rest] == PREFIX + 3).all()
        assert reduction.assignment[image, kept].tolist() == [PREFIX, PREFIX + 1, PREFIX + 2]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"keep": 0}, "at least 1"),
        ({"keep": 10}, "number of patch tokens"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"anchors": "middle"}, "anchors"),
        ({"features": torch.zeros(2, 3, 4)}, "features"),
    ],
)
def test_what_does_not_fit_is_refused(change, word):
    x, scores, features = example()
    arguments = {"keep": 3, "features": features, **change}
    with pytest.raises(InputError, match=word):
        partition_tokens(x, scores, arguments.pop("keep"), num_prefix=PREFIX, **arguments)


def test_configuration_knows_the_limits():
    assert TokenSparsity(keep=3, reduction="partition", sharpness=2.0, anchors="top").anchors == "top"
    with pytest.raises(ConfigError, match="sharpness"):
        TokenSparsity(keep=3, reduction="partition", sharpness=-1.0)
    with pytest.raises(ConfigError, match="same number"):
        TokenSparsity(entropy_budget=EntropyBudget(), reduction="partition")
