"""Budgets of plans against counts by hand over every possible number of tokens or keys."""

import math

import pytest

from entreg.adapters.budgets import resolve_budgets
from entreg.errors import ConfigError
from entreg.sparse import BlockSparsity, ColumnSparsity, TokenMerging, TokenSparsity

SIZES = {"num_tokens": 65, "num_prefix": 1, "depth": 8}
FIRST = TokenSparsity(keep=32, before_layer=1, score="magnitude")
# Rows of scores by default: 16 sampled and the class token's.
ROWS = 17


def budgets(*plans):
    return resolve_budgets(plans, **SIZES)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_later_reduction_keeps_the_most_that_its_share_of_what_is_left_allows(layer, sparsity):
    left = 65**2 + 7 * 33**2
    before = 65**2 + (layer - 1) * 33**2
    fitting = [
        keep for keep in range(33) if before + ROWS * 33 + (8 - layer) * (keep + 1) ** 2 <= (1 - sparsity) * left
    ]
    wanted = max(fitting, default=None) if sparsity else 32
    plans = (FIRST, TokenSparsity(sparsity=sparsity, before_layer=layer))
    if wanted is None:
        largest = 1 - (before + ROWS * 33 + 8 - layer) / left
        with pytest.raises(ConfigError, match=f"largest possible is {math.floor(largest * 1e4) / 1e4:g}$"):
            budgets(*plans)
    else:
        assert budgets(*plans).keep == (32, wanted)


def test_a_reduction_after_columns_or_merging_saves_of_what_they_leave():
    later = TokenSparsity(sparsity=0.3, before_layer=4, score="magnitude")
    left = 8 * 65 * 7
    wanted = max(k for k in range(65) if 4 * 65 * 7 + 4 * (k + 1) * min(7, k + 1) <= 0.7 * left)
    assert budgets(ColumnSparsity(keys=7, score="magnitude"), later).keep == (wanted,)
    merged = [65 - 4 * layer for layer in range(8)]

    def counts(keep):
        tokens = [min(count, keep + 1 - 4 * (layer - 4)) if layer >= 4 else count for layer, count in enumerate(merged)]
        return sum(count**2 for count in tokens)

    wanted = max(keep for keep in range(20, 50) if counts(keep) <= 0.7 * sum(count**2 for count in merged))
    assert budgets(TokenMerging(4), later).keep == (wanted,)


def test_columns_in_some_layers_save_for_all_that_the_tokens_leave():
    plan = ColumnSparsity(sparsity=0.2, layers=(4, 5, 6, 7), score="magnitude")
    assert budgets(plan).attention == {layer: pytest.approx(0.6) for layer in (4, 5, 6, 7)}
    density = 1 - 0.2 * (65**2 + 7 * 33**2) / (4 * 33**2)
    assert budgets(FIRST, plan).attention == {layer: pytest.approx(density) for layer in (4, 5, 6, 7)}
    # In all layers the fraction is that of each, whatever the tokens.
    assert budgets(FIRST, ColumnSparsity(sparsity=0.2)).attention == dict.fromkeys(range(8), 0.8)


@pytest.mark.parametrize(
    ("plan", "largest"),
    [
        (TokenSparsity(sparsity=0.95), 1 - (65**2 + ROWS * 65 + 7) / (8 * 65**2)),
        (TokenSparsity(sparsity=0.95, score="magnitude", reduction="merge"), 1 - (65**2 + 7 * 4) / (8 * 65**2)),
        (ColumnSparsity(sparsity=0.9), 1 - (1 + ROWS) / 65),
        (ColumnSparsity(sparsity=0.9, score="magnitude", layers=(1, 2)), 0.25 * (1 - 1 / 65)),
        (BlockSparsity(sparsity=0.9), 1 - 16 / 65 - (5 / 65) ** 2),
    ],
)
def test_what_cannot_be_reached_is_refused_and_the_largest_possible_is_possible(plan, largest):
    wanted = math.floor(largest * 1e4) / 1e4
    with pytest.raises(ConfigError, match=f"largest possible is {wanted:g}$"):
        budgets(plan)
    values = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    budgets(type(plan)(**{**values, "sparsity": wanted}))


def test_budgets_below_what_always_stays_are_refused():
    for plan in (
        ColumnSparsity(keys=3),
        TokenSparsity(keep=0, reduction="merge"),
        TokenSparsity(keep=0, reduction="fuse"),
    ):
        with pytest.raises(ConfigError, match="at least"):
            resolve_budgets([plan], num_tokens=68, num_prefix=4, depth=8)
    assert resolve_budgets([TokenSparsity(keep=0)], num_tokens=68, num_prefix=4, depth=8).keep == (0,)
    with pytest.raises(ConfigError, match="at least 1"):
        resolve_budgets([TokenSparsity(keep=0)], num_tokens=64, num_prefix=0, depth=8)


def test_scores_of_tokens_that_are_gone_are_refused():
    previous = TokenSparsity(keep=5, before_layer=3, score_source="previous")
    assert budgets(FIRST, previous).keep == (32, 5)
    for other in (TokenMerging(2), TokenSparsity(keep=9, before_layer=3)):
        with pytest.raises(ConfigError, match="previous"):
            budgets(other, previous)
    with pytest.raises(ConfigError, match="previous"):
        budgets(previous, TokenMerging(2))
