"""The one sparse path: from a budget to a plan, from a plan to attention, and fewer tokens in the residual stream.

The entropy of a partition of the data bounds the work: exp(H) keys are what a head uses, so a budget of that many keys
is enough. :func:`make_plan` chooses them, :func:`sparse_attention` computes nothing else, and
:attr:`SparsityPlan.sparsity` counts what was really left out.
"""

from entreg.names import import_modules
from entreg.sparse.attention import dense_attention, sparse_attention
from entreg.sparse.budgets import (
    bucket_by_budget,
    entropy_budget,
    keep_for_sparsity,
    merged_token_counts,
    token_sparsity,
)
from entreg.sparse.config import (
    SPARSITIES,
    BlockSparsity,
    ColumnSparsity,
    Combined,
    DecoderSparsity,
    EntropyBudget,
    Sparsity,
    TokenMerging,
    TokenSparsity,
    sparsity_from_mapping,
)
from entreg.sparse.decoder.decoding import PageSummaries, decoder_attention, decoder_plan, is_decoding
from entreg.sparse.decoder.masks import MaskForm, Segment, mask_form
from entreg.sparse.kernels import attention_kernel, recorded_kernels
from entreg.sparse.plan import SegmentedPlan, SparsityPlan
from entreg.sparse.planning import make_block_plan, make_column_plan, make_plan
from entreg.sparse.scores import score_entries, selection_scores
from entreg.sparse.tokens.reduction import (
    TokenReduction,
    bipartite_merge,
    compose_reductions,
    drop_tokens,
    merge_tokens,
    unmerge,
)
from entreg.sparse.tokens.soft_partition import fuse_tokens, partition_tokens

__all__ = [
    "SPARSITIES",
    "BlockSparsity",
    "ColumnSparsity",
    "Combined",
    "DecoderSparsity",
    "EntropyBudget",
    "MaskForm",
    "PageSummaries",
    "Segment",
    "SegmentedPlan",
    "Sparsity",
    "SparsityPlan",
    "TokenMerging",
    "TokenReduction",
    "TokenSparsity",
    "attention_kernel",
    "bipartite_merge",
    "bucket_by_budget",
    "compose_reductions",
    "decoder_attention",
    "decoder_plan",
    "dense_attention",
    "drop_tokens",
    "entropy_budget",
    "fuse_tokens",
    "is_decoding",
    "keep_for_sparsity",
    "make_block_plan",
    "make_column_plan",
    "make_plan",
    "mask_form",
    "merge_tokens",
    "merged_token_counts",
    "partition_tokens",
    "recorded_kernels",
    "score_entries",
    "selection_scores",
    "sparse_attention",
    "sparsity_from_mapping",
    "token_sparsity",
    "unmerge",
]

# Whatever registers a selection there.
import_modules("entreg.sparse.decoder")
