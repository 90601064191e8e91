"""The one sparse path: from a budget to a plan, from a plan to attention, and fewer tokens in the residual stream.

The entropy of a partition of the data bounds the work: exp(H) keys are what a head uses, so a budget of that many keys
is enough. :func:`make_plan` chooses them, :func:`sparse_attention` computes nothing else, and
:attr:`SparsityPlan.sparsity` counts what was really left out.
"""

from entreg.sparse.attention import dense_attention, sparse_attention
from entreg.sparse.kernels import attention_kernel, recorded_kernels
from entreg.sparse.plan import SparsityPlan
from entreg.sparse.planning import make_plan
from entreg.sparse.scores import score_entries, selection_scores

__all__ = [
    "SparsityPlan",
    "attention_kernel",
    "dense_attention",
    "make_plan",
    "recorded_kernels",
    "score_entries",
    "selection_scores",
    "sparse_attention",
]
