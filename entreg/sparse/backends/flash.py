"""Sparse attention by the flash-attn package, where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse.backends.gather import gather
from entreg.sparse.plan import SparsityPlan


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan,
    scale: float,
    key_bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """(batch, heads, n, d_v), by dense calls of flash_attn_func on gathered keys and values."""
    function = _flash_attention()
    _require_supported(q)
    if plan.first_keys is not None:
        raise InputError("flash-attn takes no causal plan; use the backend 'gather'")
    gathered = gather(q, k, v, plan, key_bias, mask)
    if gathered.mask is not None:
        raise InputError(
            "flash-attn takes neither masks nor biases, so no causal or ragged plan, no key_bias, no mask, and only "
            "blocks whose size divides the number of tokens; use the backend 'gather'"
        )
    rows = (x.transpose(1, 2) for x in (gathered.q, gathered.k, gathered.v))
    return gathered.scatter(function(*rows, softmax_scale=scale).transpose(1, 2))


def _require_supported(q: Tensor) -> None:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"flash-attn needs float16 or bfloat16 on a CUDA device, got {q.dtype} on {q.device.type}")


def _flash_attention() -> Any:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise InputError(
            "the backend 'flash' needs the flash-attn package (pip install 'entreg[flash]', CUDA only); "
            "'gather' reaches PyTorch's own FlashAttention kernels without it"
        ) from error
    return flash_attn_func
