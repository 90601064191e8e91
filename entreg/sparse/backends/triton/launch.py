"""What all kernels ask of their inputs, and the sizes of their tiles."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse.config import KERNEL_SIZES
from entreg.sparse.plan import BlockLists, SparsityPlan

_DTYPES = (torch.float16, torch.bfloat16)


def require_supported(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, mask: Tensor | None) -> None:
    """Make sure that the kernels can attend to these tensors.

    Raises:
        InputError: they cannot.
    """
    if not q.is_cuda and not interpreted():
        raise InputError(f"the backend 'triton' needs a CUDA device, got {q.device.type}; use 'gather' there")
    if q.dtype not in _DTYPES:
        raise InputError(f"the backend 'triton' takes float16 or bfloat16, got {q.dtype}; use 'gather'")
    if size not in KERNEL_SIZES:
        raise InputError(f"the backend 'triton' takes blocks and pages of {KERNEL_SIZES} tokens, got {size}")
    if max(q.shape[3], v.shape[3]) > 128:
        raise InputError(f"the backend 'triton' takes heads up to a width of 128, got {max(q.shape[3], v.shape[3])}")
    if mask is not None:
        raise InputError("the backend 'triton' takes no mask (padding, packed documents); use 'gather' or 'flex'")
    if scale <= 0:
        raise InputError(f"the backend 'triton' needs a scale above 0, got {scale}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InputError("the backend 'triton' has no gradient; use 'gather' for training")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes tensors of the CPU."""
    return triton.knobs.runtime.interpret


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor, or a copy of it if the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number of at least 1. (Triton's own takes longer than a launch.)"""
    return 1 << (number - 1).bit_length()


def padded_width(width: int) -> int:
    """The next power of two, at least what a tensor core takes."""
    return max(16, power_of_two(width))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at once, at the least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def listed_blocks(plan: SparsityPlan) -> BlockLists:
    """The plan's lists; made from its mask if it has none."""
    if plan.block_lists is not None:
        return plan.block_lists
    mask = plan.block_mask.contiguous()
    batch, heads, rows, columns = mask.shape
    index = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    lengths = torch.empty(mask.shape[:3], dtype=torch.int32, device=mask.device)
    padded = power_of_two(columns)
    _list_kernel[(batch * heads * rows,)](
        mask.view(torch.uint8),
        index,
        lengths,
        rows,
        columns,
        (plan.num_keys - plan.num_queries) // plan.block_size,
        COLUMNS=padded,
        num_warps=max(1, min(8, padded // 1024)),
    )
    return BlockLists(index, lengths)


@triton.jit
def _list_kernel(mask, index, lengths, rows, columns, first, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    own = program % rows + first
    column = tl.arange(0, COLUMNS)
    begin = program.to(tl.int64) * columns
    kept = tl.load(mask + begin + column, mask=column < columns, other=0).to(tl.int32)
    before = tl.where(column < own, kept, 0)
    place = tl.cumsum(before, 0) - before
    tl.store(index + begin + place, column, mask=before != 0)
    has_own = tl.sum(tl.where(column == own, kept, 0), 0)
    tl.store(lengths + program, 2 * tl.sum(before, 0) + has_own)
