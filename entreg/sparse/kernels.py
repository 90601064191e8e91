"""Which kernel attention really ran: PyTorch chooses one by device, dtype, mask and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entreg.sparse.attention import dense_attention, sparse_attention
from entreg.sparse.backends.recording import RECORDERS
from entreg.sparse.plan import SparsityPlan

# Beginnings of the operators that SDPA turns into. The plain one turns into a product, a softmax and a product.
_OPERATORS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_fused_attention": "fused",
}
_SOFTMAX = ("_softmax", "_safe_softmax")


class _Recorder(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operator = func.overloadpacket.__name__
        for beginning, name in _OPERATORS.items():
            if operator.startswith(beginning) and "backward" not in operator:
                self.names.append(name)
        if operator in _SOFTMAX and args[0].dim() == 4:
            self.names.append("math")
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_kernels() -> Iterator[list[str]]:
    """Collect the names of the attention kernels that run inside, in order.

    Names: ``"flash"`` (also PyTorch's own on the CPU), ``"efficient"``, ``"cudnn"``, ``"fused"`` (other devices),
    kernels of our own (``"triton"``; on a CPU ``"products"`` for prompts, ``"loops"`` for a token that is written) and
    ``"math"`` (a softmax over four axes that some other operator computed: SDPA without a fused kernel, or a model's
    own unfused attention). Compiled models hide their operators; record the model uncompiled.

    Yields:
        the list, filled while the block runs.
    """
    names: list[str] = []
    RECORDERS.append(names)
    try:
        with _Recorder(names):
            yield names
    finally:
        # By identity: equal lists may be listening.
        RECORDERS[:] = [one for one in RECORDERS if one is not names]


def attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsityPlan | None = None,
    *,
    causal: bool = False,
    backend: str = "gather",
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> str:
    """Name of the kernel that runs for these tensors, found by running it once.

    Gradients matter: with tensors that require them PyTorch may choose differently.

    Args:
        q, k, v: as in :func:`entreg.sparse.attention.sparse_attention`.
        plan: of sparse attention; None for dense attention.
        causal: of dense attention; a plan knows its own.
        backend: of sparse attention.
        scale: factor of the logits.
        key_bias: as in :func:`entreg.sparse.attention.sparse_attention`.

    Returns:
        one of the names of :func:`recorded_kernels`, or ``"reference"``, ``"flex"``, ``"triton"`` or
        ``"flash-attn"`` for backends that call no SDPA kernel.
    """
    if plan is not None and backend != "gather":
        sparse_attention(q, k, v, plan, backend=backend, scale=scale, key_bias=key_bias)
        return {"flash": "flash-attn"}.get(backend, backend)
    with recorded_kernels() as names:
        if plan is None:
            dense_attention(q, k, v, causal=causal, scale=scale, key_bias=key_bias)
        else:
            sparse_attention(q, k, v, plan, scale=scale, key_bias=key_bias)
    return names[0]
