"""Sparse plans as configuration values: what is accepted, what is refused and in which words."""

import dataclasses

import pytest

from entreg.errors import ConfigError
from entreg.sparse.config import (
    SPARSITIES,
    BlockSparsity,
    ColumnSparsity,
    Combined,
    DecoderSparsity,
    EntropyBudget,
    TokenMerging,
    TokenSparsity,
    sparsity_from_mapping,
)


def test_every_kind_is_built_from_plain_values():
    built = sparsity_from_mapping(
        {
            "kind": "combined",
            "parts": [
                {"kind": "tokens", "entropy_budget": {"multiplier": 2, "maximum": 40}, "reduction": "merge"},
                {"kind": "columns", "sparsity": 0.5, "layers": [3, 1], "num_sampled_queries": None},
                {"kind": "blocks", "sparsity": 0.5, "block_size": 8},
                {"kind": "token_merging", "r": [4, 0, 2]},
            ],
        }
    )
    assert built == Combined(
        (
            TokenSparsity(entropy_budget=EntropyBudget(2, 1, 40), reduction="merge"),
            ColumnSparsity(sparsity=0.5, layers=(1, 3), num_sampled_queries=None),
            BlockSparsity(sparsity=0.5, block_size=8),
            TokenMerging((4, 0, 2)),
        )
    )
    assert sparsity_from_mapping({"kind": "none"}) is None
    assert sparsity_from_mapping({"kind": "decoder", "sparsity": 0.75, "layers": [2, 0]}).layers == (0, 2)


def test_a_plan_survives_the_way_through_plain_values_and_serves_as_a_key():
    plan = TokenSparsity(keep=14, entropy_budget=None, straight_through=True)
    assert sparsity_from_mapping({"kind": "tokens", **dataclasses.asdict(plan)}) == plan
    assert len({plan, TokenSparsity(keep=14, straight_through=True), TokenSparsity(keep=13)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.keep = 3
    assert all(sparsity_class.__doc__ for sparsity_class in SPARSITIES.values())


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({}, "mapping with 'kind', one of columns"),
        ("columns", "mapping with 'kind'"),
        ({"kind": "rows"}, "no sparsity of kind 'rows'; the kinds are columns, blocks"),
        ({"kind": "none", "keep": 3}, "has no key 'keep'; it takes none"),
        ({"kind": "tokens", "keeps": 3}, "has no key 'keeps'; it takes sparsity, keep"),
        ({"kind": "tokens", "entropy_budget": {"multiplicity": 3}}, "entropy_budget has no key 'multiplicity'"),
        ({"kind": "tokens", "entropy_budget": 2.0}, "must be an EntropyBudget, got 2.0"),
        ({"kind": "token_merging"}, "needs 'r'"),
        ({"kind": "combined"}, "needs 'parts'"),
        ({"kind": "combined", "parts": []}, "at least one plan"),
        ({"kind": "combined", "parts": ["columns"]}, "mapping with 'kind'"),
        ({"kind": "combined", "parts": [{"kind": "none"}]}, "must be a single plan, got None"),
    ],
)
def test_mappings_that_are_refused(mapping, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sparsity_from_mapping(mapping)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ColumnSparsity(), "exactly one of sparsity, keys, got none"),
        (lambda: ColumnSparsity(sparsity=0.5, keys=3), "got sparsity and keys"),
        (lambda: ColumnSparsity(sparsity=1.0), r"number in \[0, 1\), got 1.0"),
        (lambda: ColumnSparsity(sparsity=-0.1), "got -0.1"),
        (lambda: ColumnSparsity(sparsity=float("nan")), "got nan"),
        (lambda: ColumnSparsity(sparsity=True), "got True"),
        (lambda: ColumnSparsity(keys=0), "keys must be an integer of at least 1"),
        (lambda: ColumnSparsity(keys=2.0), "got 2.0"),
        (lambda: ColumnSparsity(keys=2, score="mean"), "score must be one of received, prefix, mixed"),
        (lambda: ColumnSparsity(keys=2, backend="triton"), "backend must be one of reference"),
        (lambda: ColumnSparsity(keys=2, num_sampled_queries=0), "num_sampled_queries"),
        (lambda: ColumnSparsity(keys=2, layers=()), "at least one, got"),
        (lambda: ColumnSparsity(keys=2, layers=(0, -1)), "indices from 0"),
        (lambda: ColumnSparsity(keys=2, share_heads=1), "share_heads must be true or false"),
        (lambda: BlockSparsity(), "BlockSparsity needs sparsity"),
        (lambda: BlockSparsity(0.5, block_size=0), "block_size"),
        (lambda: BlockSparsity(0.5, num_parts=0), "num_parts"),
        (lambda: TokenSparsity(), "exactly one of sparsity, keep, entropy_budget"),
        (lambda: TokenSparsity(keep=-1), "keep must be an integer of at least 0"),
        (lambda: TokenSparsity(keep=3, before_layer=-1), "before_layer"),
        (lambda: TokenSparsity(keep=3, before_layer=None), "before_layer"),
        (lambda: TokenSparsity(keep=3, reduction="prune"), "reduction must be one of drop, merge"),
        (lambda: TokenSparsity(keep=3, anchors="first"), "anchors must be one of top, residual"),
        (lambda: TokenSparsity(keep=3, sharpness=0.0), "sharpness must be a number above 0"),
        (
            lambda: TokenSparsity(entropy_budget=EntropyBudget(), reduction="partition"),
            "reduction 'partition' needs sparsity or keep",
        ),
        (lambda: TokenSparsity(keep=3, score_source="next"), "score_source must be one of own, previous"),
        (lambda: TokenSparsity(keep=3, score_source="previous", before_layer=0), "needs before_layer of at least 1"),
        (lambda: TokenSparsity(keep=3, straight_through="yes"), "straight_through must be true or false"),
        (lambda: EntropyBudget(multiplier=0.0), "multiplier must be a number above 0"),
        (lambda: EntropyBudget(multiplier=float("inf")), "multiplier must be a number above 0"),
        (lambda: EntropyBudget(minimum=None), "minimum must be an integer"),
        (lambda: EntropyBudget(minimum=5, maximum=4), "maximum must be an integer of at least 5"),
        (lambda: TokenMerging(-1), "r must be an integer of at least 0"),
        (lambda: TokenMerging(()), "or one per layer"),
        (lambda: TokenMerging((1, 2.5)), "or one per layer"),
        (lambda: DecoderSparsity(), "DecoderSparsity needs sparsity, got none"),
        (lambda: DecoderSparsity(1.0), r"number in \[0, 1\), got 1.0"),
        (lambda: DecoderSparsity(0.5, selection="best"), "selection must be one of validated, mixture, pooled"),
        (lambda: DecoderSparsity(0.5, block_size=24), "pool_size must divide block_size 24"),
        (lambda: DecoderSparsity(0.5, num_sampled_queries=33), "at most that, got 16 and 33"),
        (lambda: DecoderSparsity(0.5, page_size=None), "page_size must be an integer of at least 1, got None"),
        (lambda: DecoderSparsity(0.5, local_blocks=-1), "local_blocks must be an integer of at least 0"),
        (lambda: DecoderSparsity(0.5, group_reduction="sum"), "group_reduction must be one of mean, max"),
        (lambda: DecoderSparsity(0.5, validation_margin=0), "validation_margin must be a number above 0, got 0"),
        (lambda: DecoderSparsity(0.5, budget="mass", selection="window"), "its budget must be uniform"),
        (lambda: DecoderSparsity(0.5, selection="topk"), "needs the backend reference, got 'gather'"),
        (lambda: DecoderSparsity(0.5, backend="flash"), "needs one of reference, gather, flex, triton, got 'flash'"),
        (lambda: DecoderSparsity(0.5, decode_sparsity=-1), "decode_sparsity must be a number"),
        (lambda: Combined(()), "at least one plan"),
        (lambda: Combined((DecoderSparsity(0.5),)), "must be a single plan"),
        (lambda: Combined((Combined((TokenMerging(1),)),)), "must be a single plan"),
    ],
)
def test_values_that_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_the_edges_of_the_valid_ranges_are_accepted():
    assert ColumnSparsity(sparsity=0.0, num_sampled_queries=1, layers=[0]).layers == (0,)
    assert TokenSparsity(keep=0, before_layer=0).keep == 0
    assert TokenSparsity(keep=1, before_layer=1, score_source="previous").score_source == "previous"
    assert EntropyBudget(minimum=0, maximum=0).maximum == 0
    assert TokenMerging(0).r == 0
