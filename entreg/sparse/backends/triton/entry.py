"""The way to the kernels of our own: what they cannot do is said before Triton is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from torch import Tensor

from entreg.errors import InputError
from entreg.sparse.backends.recording import record_kernel
from entreg.sparse.config import DecoderSparsity
from entreg.sparse.decoder.selection import LEAST_CHOICE
from entreg.sparse.plan import BlockLists, SparsityPlan

FUSED_SELECTIONS = ("validated", "pooled", "sampled")
"""Selections whose estimates the kernels compute; the others are cheap, or for comparison only."""


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan,
    scale: float,
    key_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """(batch, heads, n, d_v), by the kernel for prompts or, of one query, that for pages."""
    if plan.kind != "blocks" or not plan.causal or key_bias is not None:
        raise InputError("the backend 'triton' takes causal block plans without key_bias; use the backend 'gather'")
    if plan.first_keys is not None:
        raise InputError("the backend 'triton' takes sequences that begin at the first key; use the backend 'gather'")
    require_kernels(q, k, v, plan.block_size, scale, mask)
    record_kernel("triton")
    if plan.num_queries == 1:
        from entreg.sparse.backends.triton.pages import attend_pages

        return attend_pages(q, k, v, plan, scale)
    from entreg.sparse.backends.triton.blocks import attend_blocks

    return attend_blocks(q, k, v, plan, scale)


def require_kernels(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, mask: Tensor | None) -> None:
    """Make sure that there is Triton and that its kernels can serve these tensors.

    Raises:
        InputError: they cannot.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("the backend 'triton' needs Triton, which PyTorch for CUDA brings along; use 'gather'")
    from entreg.sparse.backends.triton.launch import require_supported

    require_supported(q, k, v, size, scale, mask)


def chosen_by_kernels(
    q: Tensor,
    k: Tensor,
    sparsity: DecoderSparsity,
    count: int,
    density: float,
    densities: Sequence[float],
    scale: float,
) -> tuple[Tensor, BlockLists]:
    """A prompt's blocks for a ``uniform`` or ``entropy`` budget.

    Args:
        q: (batch, heads, n, d).
        k: (batch, key_heads, m, d).
        sparsity: with one of the :data:`FUSED_SELECTIONS`.
        count: key blocks per row of the uniform budget.
        density: of the budget, not rounded to whole blocks.
        densities: for 1, 2, ... key blocks per row the density that they have.
        scale: factor of the logits.

    Returns:
        the plan's mask and its lists.
    """
    from entreg.sparse.backends.triton.selection import estimated_blocks, kept_blocks, shared_counts

    first = (k.shape[2] - q.shape[2]) // sparsity.block_size
    estimated = estimated_blocks(q, k, sparsity, count, scale)
    counts = (
        count
        if sparsity.budget == "uniform"
        else shared_counts(estimated, density, first, min(count, LEAST_CHOICE), densities)
    )
    return kept_blocks(estimated, counts, first, sparsity.local_blocks, sparsity.dense_tail_blocks)


def estimated_by_kernels(q: Tensor, k: Tensor, sparsity: DecoderSparsity, count: int, scale: float) -> Tensor:
    """As :func:`entreg.sparse.decoder.selection.block_scores`; arguments as in :func:`chosen_by_kernels`."""
    from entreg.sparse.backends.triton.selection import estimated_blocks

    return estimated_blocks(q, k, sparsity, count, scale)


def pages_by_kernels(
    q: Tensor, k: Tensor, buffers: tuple[Tensor, Tensor] | None, sparsity: DecoderSparsity, count: int, scale: float
) -> tuple[Tensor, BlockLists, tuple[Tensor, Tensor]]:
    """As :func:`entreg.sparse.backends.triton.pages.chosen_pages`."""
    from entreg.sparse.backends.triton.pages import chosen_pages

    maximum = sparsity.group_reduction == "max"
    return chosen_pages(q, k, buffers, sparsity.page_size, count, scale, maximum)
