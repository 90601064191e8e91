"""Budgets: entropy of the scores, buckets against brute force, arithmetic of sparsity and its inverse."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.errors import ConfigError, InputError
from entreg.sparse.budgets import (
    bucket_by_budget,
    entropy_budget,
    keep_for_sparsity,
    merged_token_counts,
    token_sparsity,
)
from entreg.sparse.config import EntropyBudget


def test_a_uniform_choice_among_k_tokens_needs_k_tokens():
    scores = torch.zeros(3, 9)
    scores[0, 1:5] = 0.25
    scores[1, 1:] = 7.0
    scores[2, 3] = 1e-3
    # What the prefix token gets does not count.
    scores[:, 0] = torch.tensor([100.0, 0.0, 1.0])
    assert entropy_budget(scores, EntropyBudget(), num_prefix=1).tolist() == [4, 8, 1]
    assert entropy_budget(scores, EntropyBudget(1.6), num_prefix=1).tolist() == [6, 8, 2]
    assert entropy_budget(scores, EntropyBudget(0.5, 2, 3), num_prefix=1).tolist() == [2, 3, 2]
    assert entropy_budget(scores, EntropyBudget(0.5, 20), num_prefix=1).tolist() == [8, 8, 8]


def test_the_budget_is_the_rounded_exponential_of_the_entropy():
    scores = torch.rand(4, 3, 20, generator=torch.Generator().manual_seed(0)) ** 4
    budgets = entropy_budget(scores, EntropyBudget(1.3), num_prefix=2)
    assert budgets.shape == (4, 3)
    assert budgets.dtype == torch.int64
    for index in itertools.product(range(4), range(3)):
        weights = [float(value) for value in scores[index][2:].double()]
        entropy = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
        assert int(budgets[index]) == round(1.3 * math.exp(entropy))


def test_scores_that_prefer_nothing_ask_for_everything():
    assert entropy_budget(torch.zeros(2, 6), EntropyBudget(), num_prefix=1).tolist() == [5, 5]
    with pytest.raises(InputError, match=r"num_prefix must be in \[0, 5\], got 6"):
        entropy_budget(torch.zeros(2, 6), EntropyBudget(), num_prefix=6)


@settings(max_examples=60, deadline=None)
@given(budgets=st.lists(st.integers(0, 12), min_size=1, max_size=8), num_buckets=st.integers(1, 5))
def test_buckets_pad_as_little_as_the_best_of_all_groupings(budgets, num_buckets):
    buckets = bucket_by_budget(torch.tensor(budgets), num_buckets)
    assert 1 <= len(buckets) <= num_buckets
    assert sorted(index for bucket in buckets for index in bucket.tolist()) == list(range(len(budgets)))
    longest = [max(budgets[index] for index in bucket.tolist()) for bucket in buckets]
    assert longest == sorted(set(longest))
    cost = sum(len(bucket) * length for bucket, length in zip(buckets, longest, strict=True))
    labels = itertools.product(range(num_buckets), repeat=len(budgets)) if num_buckets ** len(budgets) < 3000 else ()
    for label in labels:
        groups = [[b for b, mine in zip(budgets, label, strict=True) if mine == g] for g in range(num_buckets)]
        assert cost <= sum(len(group) * max(group) for group in groups if group)


def test_as_many_buckets_as_budgets_pad_nothing():
    budgets = torch.tensor([5, 2, 5, 9, 2, 2])
    buckets = bucket_by_budget(budgets, 6)
    assert [bucket.tolist() for bucket in buckets] == [[1, 4, 5], [0, 2], [3]]
    assert [bucket.tolist() for bucket in bucket_by_budget(budgets, 1)] == [[1, 4, 5, 0, 2, 3]]


def test_buckets_refuse_what_they_cannot_use():
    with pytest.raises(InputError, match="num_buckets must be at least 1, got 0"):
        bucket_by_budget(torch.tensor([1]), 0)
    for wrong in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(InputError, match=r"non-empty \(batch,\) int64"):
            bucket_by_budget(wrong, 2)


def test_sparsity_counts_the_entries_of_a_score_matrix():
    # Two dense layers and two with 3 of 10 tokens; 40 entries computed only for scores.
    masks = [torch.zeros(10, 10, dtype=torch.bool) for _ in range(4)]
    for mask, tokens in zip(masks, (10, 10, 3, 3), strict=True):
        mask[:tokens, :tokens] = True
    skipped = 400 - sum(int(mask.sum()) for mask in masks) - 40
    assert token_sparsity([10, 10, 3, 3], 10, selection_entries=40) == pytest.approx(skipped / 400, abs=1e-15)
    assert token_sparsity([10] * 4, 10) == 0.0
    with pytest.raises(InputError, match="at least one layer"):
        token_sparsity([], 10)
    with pytest.raises(InputError, match="no count below 0"):
        token_sparsity([3, -1], 10)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_keeping_inverts_the_sparsity(data):
    num_prefix = data.draw(st.integers(0, 5))
    patches = data.draw(st.integers(1, 1200))
    depth = data.draw(st.integers(1, 24))
    before_layer = data.draw(st.integers(0, depth - 1))
    entries = data.draw(st.integers(0, 3 * (patches + num_prefix)))
    keep = data.draw(st.integers(0 if num_prefix else 1, patches))
    n = patches + num_prefix

    def realised(kept):
        layers = [n] * before_layer + [num_prefix + kept] * (depth - before_layer)
        return token_sparsity(layers, n, selection_entries=entries)

    arguments = dict(num_prefix=num_prefix, depth=depth, before_layer=before_layer, selection_entries=entries)
    if realised(keep) > 0:
        assert keep_for_sparsity(realised(keep), n, **arguments) == keep
    wanted = data.draw(st.floats(0.01, 0.999))
    try:
        found = keep_for_sparsity(wanted, n, **arguments)
    except ConfigError:
        assert realised(0 if num_prefix else 1) < wanted
    else:
        assert realised(found) >= wanted - 1e-9
        assert found == patches or realised(found + 1) < wanted


def test_an_unreachable_sparsity_names_the_largest_possible():
    with pytest.raises(ConfigError, match=r"sparsity 0.9 cannot be reached .* before layer 1 of 6; .* is 0.8332"):
        keep_for_sparsity(0.9, 145, num_prefix=1, depth=6, before_layer=1)
    # A merge keeps a representative, and scores cost entries too.
    largest = 1 - (145**2 + 5 * 2**2 + 17 * 145) / (6 * 145**2)
    with pytest.raises(ConfigError, match=f"is {math.floor(largest * 1e4) / 1e4:g}$"):
        keep_for_sparsity(0.83, 145, num_prefix=1, depth=6, before_layer=1, selection_entries=17 * 145, minimum_keep=1)
    assert keep_for_sparsity(0.8331, 145, num_prefix=1, depth=6, before_layer=1) == 1
    with pytest.raises(ConfigError, match=r"before_layer must be in \[0, 5\] for a model of 6 layers, got 6"):
        keep_for_sparsity(0.5, 145, num_prefix=1, depth=6, before_layer=6)


def test_sparsity_zero_keeps_every_token_whatever_the_scores_would_cost():
    assert keep_for_sparsity(0.0, 145, num_prefix=1, depth=6, before_layer=1, selection_entries=10**6) == 144


def test_token_counts_under_merging():
    # ViT-Base/16 at 224 with r = 8, as published: 197 tokens before the first layer, 8 fewer before each next.
    assert merged_token_counts(8, 197, num_prefix=1, depth=12) == [197 - 8 * layer for layer in range(12)]
    # Never more than half of the patch tokens at once.
    assert merged_token_counts(100, 12, num_prefix=2, depth=5) == [12, 7, 5, 4, 3]
    assert merged_token_counts((0, 3), 10, num_prefix=1, depth=2) == [10, 10]
    with pytest.raises(ConfigError, match="one for each of 3 layers, got 2"):
        merged_token_counts((1, 2), 10, num_prefix=1, depth=3)
