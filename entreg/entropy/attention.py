"""Entropies of an attention matrix, from queries and keys, never holding all of its n x m entries.

Attention is P = softmax(scale q k^T), row i the distribution of query i over the keys. Three entropies per head, in
nats:

* the **row entropy**, mean_i H(P_i): how many keys a query uses;
* the **block entropy**, the same of the row's mass summed over blocks of consecutive keys: how many key blocks a query
  uses, which is what a block-sparse path pays for; at most the row entropy;
* the **key entropy**, H(mean_i P_i): how many keys the head uses at all, an upper bound of the row entropy.

exp of an entropy is an *effective support*, a number of keys or blocks. (The paper speaks of the entropy of attention
patterns without saying which; all are our reading.)

Rows are processed in chunks that are recomputed in the backward pass. With ``num_sampled_queries`` only that many
rows are looked at, drawn without replacement, the same positions for every head (and, without masks, for every
batch element): memory is O(m x sampled), time O(m x sampled x d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from entreg.entropy.soft_partition import entropy_of_masses
from entreg.errors import InputError

# Attention probabilities held at once by default: 64 MiB of float32 per temporary.
_CHUNK_ELEMENTS = 2**24


def effective_support(entropy: Tensor) -> Tensor:
    """Number of equally likely outcomes that has this entropy: exp(H), H in nats."""
    return torch.exp(entropy)


def attention_row_entropy(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    num_sampled_queries: int | None = None,
    query_indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Mean over the query rows of the entropy of their attention, for each head.

    Exact by default; with ``num_sampled_queries`` an unbiased estimate of the exact value.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d); heads is a multiple of key_heads (grouped-query attention: query head h reads key
            head h // (heads / key_heads)).
        causal: query i may attend to keys 0 ... i + m - n; needs m >= n (the last query sees every key, as with a key
            cache).
        scale: factor of the logits; default 1/sqrt(d).
        key_mask: (batch, m) bool, True where the key may be attended to.
        query_mask: (batch, n) bool, True where the query counts.
        num_sampled_queries: at least 1; number of rows to look at, all if None or more than there are. With masks,
            rows are drawn from those that count in each batch element.
        query_indices: (r,) int64 distinct positions in [0, n) to look at instead of drawing them, the same for the
            whole batch, e.g. to share one sample between layers. The estimate is unbiased if they were drawn
            uniformly from the rows that count.
        generator: source of the sample; torch's global CPU generator by default.
        normalize: divide each row's entropy by log(number of keys it may attend to), so that every row lies in
            [0, 1]; rows with a single key, whose entropy is 0 whatever the model does, are then left out.
        chunk_size: query rows processed at once; by default so many that 2^24 probabilities are held.
        check_finite: whether a non-finite result raises (waits for the result on a GPU).

    Returns:
        (batch, heads) nats, or fractions of the maximum if ``normalize``; float32 or float64.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above, a batch element without any row that counts,
            or non-finite logits.
    """
    rows = _select_rows(
        q,
        k,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
        num_sampled_queries=num_sampled_queries,
        query_indices=query_indices,
        generator=generator,
        minimum=2 if normalize else 1,
    )

    def summed(logits: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        return _row_entropies(logits, weights, lengths, normalize)

    result = _sum_over_rows(q, k, rows, summed, scale, chunk_size)
    _require_finite(result, check_finite)
    return result


def attention_block_entropy(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    num_sampled_queries: int | None = None,
    query_indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Mean over the query rows of the entropy of their attention mass per block of keys, for each head.

    Blocks are ``block_size`` consecutive keys, counted from key 0; the last one may be shorter. exp of a row's value
    is the number of key blocks that the query uses: what a block-sparse path pays for (our choice; the paper does not
    say). By the chain rule of entropy a row's entropy is that of its blocks plus the mean, over its mass, of the
    entropy within a block, so for each head

        H_block <= H_row <= H_block + log(block_size),

    with H_block = H_row at block_size 1 and H_block = 0 when one block holds all keys. Exact by default; with
    ``num_sampled_queries`` an unbiased estimate of the exact value.

    Args:
        block_size: keys per block, at least 1.
        normalize: divide each row's entropy by log(number of blocks with a key that it may attend to), so that every
            row lies in [0, 1]; rows with a single block, whose entropy is 0 whatever the model does, are then left
            out, and every batch element needs a row with two.

    Other arguments and errors as in :func:`attention_row_entropy`.

    Returns:
        (batch, heads) nats, or fractions of the maximum if ``normalize``; float32 or float64.
    """
    if not isinstance(block_size, int) or block_size < 1:
        raise InputError(f"block_size must be a whole number of at least 1, got {block_size}")
    rows = _select_rows(
        q,
        k,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
        num_sampled_queries=num_sampled_queries,
        query_indices=query_indices,
        generator=generator,
        block_size=block_size,
        minimum=2 if normalize else 1,
    )

    def summed(logits: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        padded = F.pad(logits, (0, -logits.shape[-1] % block_size), value=torch.finfo(logits.dtype).min)
        # The logits of the blocks: masses then never underflow to an entropy without gradient.
        blocks = padded.unflatten(-1, (-1, block_size)).logsumexp(-1)
        return _row_entropies(blocks, weights, lengths, normalize)

    result = _sum_over_rows(q, k, rows, summed, scale, chunk_size)
    _require_finite(result, check_finite)
    return result


def attention_received(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    num_sampled_queries: int | None = None,
    query_indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Mean attention that each key receives from the queries; sums to one over the keys.

    Exact by default; with ``num_sampled_queries`` an unbiased estimate of the exact value. Arguments and errors as in
    :func:`attention_row_entropy`.

    Returns:
        (batch, heads, m), float32 or float64.
    """
    rows = _select_rows(
        q,
        k,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
        num_sampled_queries=num_sampled_queries,
        query_indices=query_indices,
        generator=generator,
    )
    received = _sum_over_rows(q, k, rows, _received, scale, chunk_size)
    _require_finite(received, check_finite)
    return received


def attention_key_entropy(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    num_sampled_queries: int | None = None,
    query_indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    correct_bias: bool = True,
    normalize: bool = False,
    chunk_size: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Entropy of the mean attention that each key receives, for each head.

    Exact by default. From a sample of r of N rows, what is unbiased is the attention received
    (:func:`attention_received`). Its entropy, a concave function, comes out too low on average, by half the sum over
    the keys of variance / mean to leading order. With ``correct_bias`` that term is estimated from the sample (with
    the factor 1 - r/N of sampling without replacement) and added: the bias falls from O(1/r) to O(1/r^2), and is zero
    at r = N. No estimate of an entropy from a sample of the rows is unbiased for every matrix. The correction is at
    most r / (2 (r - 1)) nats, so that a corrected value can slightly exceed log m.

    Args:
        correct_bias: add the correction; needs at least 2 sampled rows.
        normalize: divide by log(number of keys that are not masked out); needs at least 2 of them.

    Other arguments and errors as in :func:`attention_row_entropy`.

    Returns:
        (batch, heads) nats, or fractions of the maximum if ``normalize``; float32 or float64.
    """
    rows = _select_rows(
        q,
        k,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
        num_sampled_queries=num_sampled_queries,
        query_indices=query_indices,
        generator=generator,
    )
    if correct_bias and rows.indices is not None:
        too_few = (rows.counted < rows.population).any() & (rows.counted.max() < 2)
        if _happens(too_few):
            raise InputError("the bias correction needs at least 2 sampled rows, got 1; or pass correct_bias=False")
        moments = _sum_over_rows(q, k, rows, _received_and_square, scale, chunk_size)
        received, square = moments.unbind(0)
        # Population rows N, sampled r: Var(mean) = (1 - r/N) s^2 / r with s^2 the sample variance.
        factor = (1.0 - rows.counted.double() / rows.population) / (rows.counted - 1).clamp_min(1)
        variance = factor.to(received).unsqueeze(-1) * (square - received.square()).clamp_min(0.0)
        ratio = variance / received.clamp_min(torch.finfo(received.dtype).tiny)
        result = entropy_of_masses(received) + 0.5 * ratio.sum(-1)
    else:
        received = _sum_over_rows(q, k, rows, _received, scale, chunk_size)
        result = entropy_of_masses(received)
    if normalize:
        available = torch.full((1,), k.shape[2]) if key_mask is None else key_mask.sum(-1)
        if _happens((available < 2).any()):
            raise InputError("normalize needs at least 2 keys that are not masked out in every batch element")
        result = result / torch.log(available.to(result))[:, None]
    _require_finite(result, check_finite)
    return result


def _row_entropies(logits: Tensor, weights: Tensor, lengths: Tensor, normalize: bool) -> Tensor:
    """Weighted sum over the rows of the entropy of softmax(logits), as a fraction of log(lengths) if ``normalize``."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    if normalize:
        entropy = entropy / torch.log(lengths.clamp_min(2).to(entropy.dtype))
    return (entropy * weights.to(entropy.dtype)).sum(-1)


def _received(logits: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    probabilities = torch.softmax(logits, dim=-1)
    return (weights.to(logits.dtype).unsqueeze(-2) @ probabilities).squeeze(-2)


def _received_and_square(logits: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    probabilities = torch.softmax(logits, dim=-1)
    row_weights = weights.to(logits.dtype).unsqueeze(-2)
    return torch.stack(((row_weights @ probabilities).squeeze(-2), (row_weights @ probabilities.square()).squeeze(-2)))


@dataclass(frozen=True)
class _Rows:
    """The query rows to look at. ``b`` is 1 where all batch elements share them, else batch.

    Attributes:
        indices: (b, r) positions of the rows; None for all n rows in order.
        weights: (b, 1, r), zero for rows that do not count, else 1 / number of those that do.
        lengths: (b, 1, r) number of keys, or blocks of them, that each row may attend to.
        counted: (b, 1) number of rows looked at that count.
        population: (b, 1) number of all rows that count.
        allowed: function of a slice of the rows, giving the (b or batch, 1, rows or 1, m) mask of allowed keys; None
            if all are.
    """

    indices: Tensor | None
    weights: Tensor
    lengths: Tensor
    counted: Tensor
    population: Tensor
    allowed: Callable[[slice], Tensor] | None


def _select_rows(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    num_sampled_queries: int | None,
    query_indices: Tensor | None,
    generator: torch.Generator | None,
    block_size: int = 1,
    minimum: int = 1,
) -> _Rows:
    """The rows that count, or a sample of them; those that may attend to at least ``minimum`` blocks count."""
    check_attention_inputs(q, k, causal, key_mask, query_mask)
    n, m = q.shape[2], k.shape[2]
    if num_sampled_queries is not None and query_indices is not None:
        raise InputError("give num_sampled_queries or query_indices, not both")
    if num_sampled_queries is not None and num_sampled_queries < 1:
        raise InputError(f"num_sampled_queries must be at least 1, got {num_sampled_queries}")
    # Without masks nothing here depends on device data: done on the CPU, it makes no GPU wait.
    device = q.device if key_mask is not None or query_mask is not None else torch.device("cpu")
    last_key = torch.arange(m - n, m, device=device)[None] if causal else None
    lengths = _allowed_blocks(last_key, key_mask, n, m, block_size, device)
    counts = lengths >= minimum
    if query_mask is not None:
        counts = counts & query_mask
    lengths = lengths.expand_as(counts)
    population = counts.sum(-1, keepdim=True)
    if _happens((population == 0).any()):
        what = "key(s)" if block_size == 1 else f"block(s) of {block_size} keys"
        raise InputError(
            f"every batch element needs a query row that counts: not masked out, and with at least {minimum} allowed "
            f"{what}"
        )
    indices = None
    if query_indices is not None:
        indices = _checked_indices(query_indices, n, device).expand(len(counts), -1)
    elif num_sampled_queries is not None and num_sampled_queries < n:
        # Where fewer rows count, all of them are drawn.
        indices = _draw_rows(counts, num_sampled_queries, generator)
    if indices is not None:
        counts, lengths = counts.gather(1, indices), lengths.gather(1, indices)
        last_key = None if last_key is None else indices + (m - n)
    counted = counts.sum(-1, keepdim=True)
    if query_indices is not None and _happens((counted == 0).any()):
        raise InputError("query_indices must name at least one row that counts in every batch element")

    def allowed(rows: slice) -> Tensor:
        mask = None
        if last_key is not None:
            mask = torch.arange(m, device=q.device) <= last_key[:, rows, None].to(q.device)
        if key_mask is not None:
            mask = key_mask[:, None] if mask is None else mask & key_mask[:, None]
        return mask.unsqueeze(1)

    return _Rows(
        indices=None if indices is None else indices.to(q.device),
        weights=(counts.double() / counted).unsqueeze(1).to(q.device),
        lengths=lengths.unsqueeze(1).to(q.device),
        counted=counted,
        population=population,
        allowed=None if last_key is None and key_mask is None else allowed,
    )


def _allowed_blocks(
    last_key: Tensor | None, key_mask: Tensor | None, n: int, m: int, block_size: int, device: torch.device
) -> Tensor:
    """(1 or batch, n) number of key blocks with a key that each query row may attend to."""
    if key_mask is None:
        if last_key is None:
            return torch.full((1, n), -(-m // block_size), device=device)
        return last_key // block_size + 1
    # A block is there from its first key that is not masked out on.
    blocks = F.pad(key_mask, (0, -m % block_size)).unflatten(-1, (-1, block_size))
    opened = (blocks & (blocks.cumsum(-1) == 1)).flatten(1)[:, :m].cumsum(-1)
    if last_key is None:
        return opened[:, -1:].expand(-1, n)
    return opened.gather(1, last_key.expand(len(opened), -1))


def _draw_rows(counts: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """(b, number) positions, uniform without replacement among the True ones; rest, if too few, among the False."""
    # Float64 draws: ties, which would favour low positions, do not occur in practice.
    where = "cpu" if generator is None else generator.device
    draws = torch.rand(counts.shape, generator=generator, dtype=torch.float64, device=where)
    return draws.to(counts.device).masked_fill(~counts, -1.0).topk(number, dim=-1).indices


def _checked_indices(query_indices: Tensor, n: int, device: torch.device) -> Tensor:
    indices = query_indices.to(device)
    if indices.dim() != 1 or indices.numel() == 0 or indices.dtype != torch.int64:
        raise InputError(
            f"query_indices must be a non-empty (r,) int64 tensor, got {indices.dtype} {tuple(indices.shape)}"
        )
    outside = (indices < 0).any() | (indices >= n).any()
    if _happens(outside | (indices.sort().values.diff() == 0).any()):
        raise InputError(f"query_indices must be distinct positions in [0, {n})")
    return indices[None]


def _sum_over_rows(
    q: Tensor,
    k: Tensor,
    rows: _Rows,
    summed: Callable[[Tensor, Tensor, Tensor], Tensor],
    scale: float | None,
    chunk_size: int | None,
) -> Tensor:
    """Sum over chunks of rows of ``summed(logits (batch, heads, rows, m), weights, lengths)``."""
    batch, heads, _, width = q.shape
    key_heads, m = k.shape[1], k.shape[2]
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, got {chunk_size}")
    factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
    size = chunk_size or max(1, _CHUNK_ELEMENTS // (batch * heads * m))
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)

    def part(chosen: Tensor, k: Tensor, start: int) -> Tensor:
        chunk = slice(start, start + chosen.shape[2])
        # The query heads that share a key head become more rows of one product, so that keys are never repeated.
        # Rows are scaled, not logits: there are fewer of them.
        grouped = (chosen.to(dtype) * factor).reshape(batch, key_heads, -1, width)
        logits = (grouped @ k.to(dtype).transpose(-1, -2)).view(batch, heads, -1, m)
        if rows.allowed is not None:
            # A finite fill: -inf would make 0 * -inf = NaN of the entropy of a forbidden key.
            logits = logits.masked_fill(~rows.allowed(chunk), torch.finfo(dtype).min)
        return summed(logits, rows.weights[..., chunk], rows.lengths[..., chunk])

    with torch.autocast(q.device.type, enabled=False):
        if rows.indices is None:
            chosen = q
        elif len(rows.indices) == 1:
            chosen = q.index_select(2, rows.indices[0])
        else:
            chosen = q.gather(2, rows.indices[:, None, :, None].expand(-1, heads, -1, width))
        # One split, not a slice per chunk: the gradient of every slice would be as large as q.
        chunks = chosen.split(size, dim=2)
        total = None
        for index, chunk in enumerate(chunks):
            if len(chunks) > 1 and torch.is_grad_enabled():
                value = checkpoint(part, chunk, k, index * size, use_reentrant=False, preserve_rng_state=False)
            else:
                value = part(chunk, k, index * size)
            total = value if total is None else total + value
        return total


def check_attention_inputs(
    q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None = None, query_mask: Tensor | None = None
) -> None:
    """Raise an InputError unless shapes and dtypes are those that :func:`attention_row_entropy` describes."""
    for name, tensor in (("q", q), ("k", k)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 4:
            raise InputError(f"{name} must be a floating-point tensor of shape (batch, heads, length, d)")
        if tensor.numel() == 0:
            raise InputError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise InputError(
            "q and k must agree in batch and d, with q's heads a multiple of k's, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if causal and k.shape[2] < q.shape[2]:
        raise InputError(f"causal attention needs at least as many keys as queries, got {k.shape[2]} < {q.shape[2]}")
    for name, mask, length in (("key_mask", key_mask, k.shape[2]), ("query_mask", query_mask, q.shape[2])):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], length)):
            raise InputError(
                f"{name} must be bool of shape {(q.shape[0], length)}, got {mask.dtype} {tuple(mask.shape)}"
            )


def _happens(condition: Tensor) -> bool:
    """Whether a condition on values holds; not asked in a compiled graph, which reading a value would break."""
    return not torch.compiler.is_compiling() and bool(condition)


def _require_finite(result: Tensor, check_finite: bool) -> None:
    # A NaN or infinite query or key makes its logits, and so the result of its head, non-finite.
    if check_finite and _happens(~torch.isfinite(result).all()):
        raise InputError("q and k must be finite and small enough for finite logits")
