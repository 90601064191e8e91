"""Selection scores: how much each key or token seems to be needed, from few query rows.

The paper does not say how keys are chosen; all scores are our choice. A score must cost far less than the attention
that it saves, so attention rows are computed for a small sample of the queries: O(sampled x n), never n x n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entreg.entropy.attention import attention_received, check_attention_inputs
from entreg.errors import InputError
from entreg.sparse.ball_partition import token_parts
from entreg.sparse.config import SCORES

_GOLDEN_RATIO = (1.0 + math.sqrt(5.0)) / 2.0
_FROM_ROWS = ("received", "prefix", "mixed", "part")


def selection_scores(
    q: Tensor,
    k: Tensor,
    score: str = "mixed",
    *,
    num_prefix: int = 0,
    num_sampled_queries: int | None = 16,
    scale: float | None = None,
    values: Tensor | None = None,
    features: Tensor | None = None,
    num_parts: int = 8,
    causal: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score of every key, per query head; differentiable in q and k (``"magnitude"``: in what is measured).

    * ``"received"``: mean over the sampled queries of the attention that the key receives; an estimate of the mean
      over all queries, unbiased if a generator draws the sample, exact if all are sampled. Sums to one.
    * ``"prefix"``: mean of the prefix tokens' attention rows. Sums to one.
    * ``"mixed"``: half of each; without prefix tokens, or under a causal mask (where they see only themselves),
      ``"received"`` alone.
    * ``"magnitude"``: L2 norm of the value vector, or of the token if only ``features`` are given.
    * ``"random"``: uniform in [0, 1).
    * ``"part"``: the tokens after the prefix are partitioned by their features (keys of all heads if none are given);
      each has the mean ``"mixed"`` score of its part.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d); heads is a multiple of key_heads.
        score: one of the names above (``"gate"`` is computed by its owner and passed on as a tensor).
        num_prefix: leading class and register tokens, 0 to m, at most n where their rows are used.
        num_sampled_queries: at least 1; n or more, or None, means all queries.
        scale: factor of the logits; default 1/sqrt(d).
        values: (batch, key_heads, m, d_v).
        features: (batch, m, c).
        num_parts: of ``"part"``, at least 1.
        causal: query i sees the keys 0 ... i + m - n only; needs m >= n.
        generator: a CPU generator from which positions of queries, or random scores, are drawn. Without one, the
            positions are always the same for a given n, one in each of equal intervals, so that an image's scores do
            not depend on what was run before; random scores come from torch's global generator.

    Returns:
        (batch, heads, m), float32 or float64.

    Raises:
        InputError: arguments that do not fit the above, or an input that the score needs is missing.
    """
    check_attention_inputs(q, k, causal)
    _check_arguments(q, k, score, num_prefix, num_sampled_queries, causal)
    if score == "magnitude":
        return _magnitude(q, k, values, features)
    if score == "random":
        shape = (q.shape[0], q.shape[1], k.shape[2])
        where = "cpu" if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=where).to(q.device)
    result = _from_rows(q, k, score, num_prefix, num_sampled_queries, scale, causal, generator)
    if score != "part":
        return result
    points = k.transpose(1, 2).flatten(2) if features is None else features
    _check_features(points, k)
    labels = token_parts(points.detach(), num_parts, num_prefix=num_prefix)
    return _part_means(result, labels, num_prefix, num_parts)


def score_entries(
    score: str,
    num_queries: int,
    num_keys: int,
    *,
    num_prefix: int = 0,
    num_sampled_queries: int | None = 16,
    causal: bool = False,
) -> int:
    """Score entries per head that :func:`selection_scores` computes: rows looked at times keys.

    Rows count in full under a causal mask too: they are computed in full.

    Args:
        score: a name as in :func:`selection_scores`; ``"gate"`` costs none.
        num_queries: n.
        num_keys: m.
        num_prefix: as in :func:`selection_scores`.
        num_sampled_queries: as in :func:`selection_scores`.
        causal: as in :func:`selection_scores`.

    Returns:
        the number; 0 for scores that look at no attention.
    """
    if score not in _FROM_ROWS:
        return 0
    sampled = num_queries if num_sampled_queries is None else min(num_queries, num_sampled_queries)
    rows = (0 if score == "prefix" else sampled) + (num_prefix if _uses_prefix(score, num_prefix, causal) else 0)
    return rows * num_keys


def _check_arguments(
    q: Tensor, k: Tensor, score: str, num_prefix: int, num_sampled_queries: int | None, causal: bool
) -> None:
    if score == "gate":
        raise InputError("a gate's scores are computed by the gate: pass them on as a tensor")
    if score not in SCORES:
        raise InputError(f"score must be one of {SCORES}, got {score!r}")
    if not 0 <= num_prefix <= k.shape[2]:
        raise InputError(f"num_prefix must be between 0 and the number of keys, {k.shape[2]}, got {num_prefix}")
    if num_sampled_queries is not None and num_sampled_queries < 1:
        raise InputError(f"num_sampled_queries must be at least 1, got {num_sampled_queries}")
    if score == "prefix" and (num_prefix == 0 or causal):
        raise InputError("the score 'prefix' needs prefix tokens that see all keys; use 'received'")
    if score in ("prefix", "mixed", "part") and num_prefix > q.shape[2]:
        raise InputError(f"the rows of {num_prefix} prefix tokens are needed, got {q.shape[2]} queries")


def _from_rows(
    q: Tensor,
    k: Tensor,
    score: str,
    num_prefix: int,
    num_sampled_queries: int | None,
    scale: float | None,
    causal: bool,
    generator: torch.Generator | None,
) -> Tensor:
    n = q.shape[2]
    with_prefix = _uses_prefix(score, num_prefix, causal)
    rows = torch.arange(num_prefix, device=q.device)
    if score == "prefix":
        return _weighted_rows(q, k, rows, _equal_weights(rows, 1.0), scale, causal)
    if num_sampled_queries is None or num_sampled_queries >= n:
        # All rows: in chunks, recomputed in the backward pass.
        received = attention_received(q, k, causal=causal, scale=scale, check_finite=False)
        if not with_prefix:
            return received
        return 0.5 * received + _weighted_rows(q, k, rows, _equal_weights(rows, 0.5), scale, causal)
    sampled = sampled_positions(n, num_sampled_queries, generator, q.device)
    if not with_prefix:
        return _weighted_rows(q, k, sampled, _equal_weights(sampled, 1.0), scale, causal)
    weights = torch.cat((_equal_weights(rows, 0.5), _equal_weights(sampled, 0.5)))
    return _weighted_rows(q, k, torch.cat((rows, sampled)), weights, scale, causal)


def _equal_weights(rows: Tensor, total: float) -> Tensor:
    return torch.full(rows.shape, total / len(rows), dtype=torch.float64, device=rows.device)


def _uses_prefix(score: str, num_prefix: int, causal: bool) -> bool:
    return score != "received" and num_prefix > 0 and not causal


def _weighted_rows(q: Tensor, k: Tensor, rows: Tensor, weights: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Weighted sum of a few attention rows: (batch, heads, m). Holds batch x heads x rows x m probabilities."""
    batch, heads, n, width = q.shape
    m = k.shape[2]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
        # Query heads that share a key head become more rows of one product. Low-precision keys are not copied to
        # float32: products accumulate in float32 anyway, and only the softmax needs it.
        chosen = q.index_select(2, rows).to(k.dtype).reshape(batch, k.shape[1], -1, width)
        logits = (chosen @ k.transpose(-1, -2)).view(batch, heads, -1, m).to(dtype) * factor
        if causal:
            hidden = torch.arange(m, device=q.device) > (rows + (m - n))[:, None]
            logits = logits.masked_fill(hidden, torch.finfo(dtype).min)
        weights = weights.to(dtype).expand(batch, heads, 1, -1)
        return (weights @ torch.softmax(logits, dim=-1)).squeeze(-2)


def sampled_positions(
    length: int, number: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Query positions to look at, without replacement: (number,) int64.

    With a generator uniformly drawn ones. Without, always the same ones: one in each of ``number`` equal intervals, at
    an irregular place in it, so that no row or column of an image is preferred.
    """
    if generator is not None:
        return torch.randperm(length, generator=generator, device=generator.device)[:number].to(device)
    index = torch.arange(number, device=device)
    start = index * length // number
    size = (index + 1) * length // number - start
    # Multiples of the golden ratio modulo 1 never fall into step with the width of an image.
    return start + (index.double() * _GOLDEN_RATIO % 1.0 * size).long()


def _magnitude(q: Tensor, k: Tensor, values: Tensor | None, features: Tensor | None) -> Tensor:
    if values is not None:
        if values.shape[:3] != k.shape[:3]:
            raise InputError(f"values must have shape {tuple(k.shape[:3])} + (d_v,), got {tuple(values.shape)}")
        norms = torch.linalg.vector_norm(_at_least_float32(values), dim=-1)
        return norms.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if features is None:
        raise InputError("the score 'magnitude' needs values or features")
    _check_features(features, k)
    return torch.linalg.vector_norm(_at_least_float32(features), dim=-1).unsqueeze(1).expand(-1, q.shape[1], -1)


def _part_means(scores: Tensor, labels: Tensor, num_prefix: int, num_parts: int) -> Tensor:
    """Every token's score replaced by the mean of its part; the prefix, part 0, keeps its own scores."""
    member = torch.nn.functional.one_hot(labels, num_parts + 1).to(scores.dtype)
    means = (scores @ member) / member.sum(1).clamp_min(1.0).unsqueeze(1)
    pooled = means.gather(2, labels.unsqueeze(1).expand(-1, scores.shape[1], -1))
    return torch.cat((scores[..., :num_prefix], pooled[..., num_prefix:]), dim=-1)


def _check_features(features: Tensor, k: Tensor) -> None:
    if features.dim() != 3 or features.shape[:2] != (k.shape[0], k.shape[2]):
        raise InputError(f"features must have shape {(k.shape[0], k.shape[2])} + (c,), got {tuple(features.shape)}")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
