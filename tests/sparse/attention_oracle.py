"""Attention entry by entry in float64, and counters of what a computation really does."""

import contextlib
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def random_inputs(batch=2, heads=4, key_heads=4, n=11, m=11, width=5, value_width=5, seed=0, dtype=torch.float64):
    """q, k, v from one seed; q is larger, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = 2.0 * draw(batch, heads, n, width)
    k, v = draw(batch, key_heads, m, width), draw(batch, key_heads, m, value_width)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attention_matrix(q, k, causal=False, scale=None):
    """All of softmax(scale q k^T) in float64, causal aligned at the last query."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -math.inf)
    return torch.softmax(logits, -1)


def attention_by_loops(q, k, v, sees, scale=None, key_bias=None):
    """One query at a time; ``sees(batch, head, query, key)`` says whether an entry counts. Nothing seen: zeros."""
    batch, heads, n, width = q.shape
    key_heads, m = k.shape[1:3]
    factor = width**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            source = h // (heads // key_heads)
            for i in range(n):
                keys = [j for j in range(m) if sees(b, h, i, j)]
                if not keys:
                    continue
                logits = [
                    factor * float(q[b, h, i].double() @ k[b, source, j].double())
                    + (0.0 if key_bias is None else float(key_bias[b, j]))
                    for j in keys
                ]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                for j, weight in zip(keys, weights, strict=True):
                    out[b, h, i] += weight / sum(weights) * v[b, source, j].double()
    return out


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0
        self.softmax_numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        if func.overloadpacket.__name__ == "_softmax":
            self.softmax_numel += result.numel()
        return result


@contextlib.contextmanager
def counted_elements():
    """``.numel``: elements of the largest tensor made inside; ``.softmax_numel``: probabilities computed inside."""
    with _Largest() as counter:
        yield counter
