"""Scores that are weighted sums of attention rows: of sampled queries, of the prefix tokens, or of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entreg.entropy.attention import attention_received
from entreg.errors import InputError
from entreg.sparse.registries import SCORES
from entreg.sparse.scores.score import Score, ScoreInputs, ScoreSizes

_GOLDEN_RATIO = (1.0 + math.sqrt(5.0)) / 2.0


@dataclass(frozen=True)
class AttentionRows(Score):
    """A mixture of the mean row of the prefix tokens and the mean row of the sampled queries.

    The second estimates the mean over all queries: unbiased if a generator draws the sample, exact if all are sampled.
    Scores sum to one. Without prefix tokens, or under a causal mask, the sampled queries decide alone.

    Attributes:
        prefix: share of the prefix tokens' rows.
        sampled: share of the sampled rows; the two sum to one.
    """

    prefix: float
    sampled: float

    @property
    def needs_prefix(self) -> bool:
        return self.sampled == 0

    def entries(self, sizes: ScoreSizes) -> int:
        """Rows count in full under a causal mask too: they are computed in full."""
        rows = (sizes.prefix_rows if self.prefix else 0) + (sizes.sampled_rows if self.sampled else 0)
        return rows * sizes.num_keys

    def scores(self, inputs: ScoreInputs) -> Tensor:
        sizes, keys = inputs.sizes, inputs.keys
        n = sizes.num_queries
        if self.prefix and sizes.num_prefix > n:
            raise InputError(f"the rows of {sizes.num_prefix} prefix tokens are needed, got {n} queries")
        leading = torch.arange(sizes.prefix_rows if self.prefix else 0, device=inputs.device)
        if not self.sampled:
            return _weighted_rows(inputs, inputs.queries_at(leading), leading, _equal_weights(leading, 1.0))
        every = sizes.sampled_rows == n
        share = self.sampled if len(leading) else 1.0
        if every and not callable(inputs.queries):
            first, others = inputs.queries_at(leading), inputs.queries
        else:
            rows = torch.arange(n) if every else sampled_positions(n, sizes.sampled_rows, inputs.generator)
            rows = torch.cat((leading, rows.to(inputs.device)))
            chosen = inputs.queries_at(rows)
            if not callable(inputs.queries):
                weights = torch.cat((_equal_weights(leading, self.prefix), _equal_weights(rows[len(leading) :], share)))
                return _weighted_rows(inputs, chosen, rows, weights)
            first, others = chosen.split((len(leading), len(rows) - len(leading)), dim=2)
        # They may be many: in chunks, recomputed in the backward pass.
        received = attention_received(others, keys, causal=sizes.causal, scale=inputs.scale, check_finite=False)
        if not len(leading):
            return received
        return share * received + _weighted_rows(inputs, first, leading, _equal_weights(leading, self.prefix))


SCORES.register("received", AttentionRows(prefix=0.0, sampled=1.0))
SCORES.register("prefix", AttentionRows(prefix=1.0, sampled=0.0))
SCORES.register("mixed", AttentionRows(prefix=0.5, sampled=0.5))


def _equal_weights(rows: Tensor, total: float) -> Tensor:
    return torch.full(rows.shape, total / max(len(rows), 1), dtype=torch.float64, device=rows.device)


def _weighted_rows(inputs: ScoreInputs, queries: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the attention rows of a few queries: (batch, heads, m).

    Holds batch x heads x rows x m probabilities.
    """
    k = inputs.keys
    batch, heads, _, width = queries.shape
    n, m = inputs.sizes.num_queries, k.shape[2]
    dtype = torch.promote_types(torch.promote_types(queries.dtype, k.dtype), torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        factor = 1.0 / math.sqrt(width) if inputs.scale is None else float(inputs.scale)
        # Query heads that share a key head become more rows of one product. Low-precision keys are not copied to
        # float32: products accumulate in float32 anyway, and only the softmax needs it.
        chosen = queries.to(k.dtype).reshape(batch, k.shape[1], -1, width)
        logits = (chosen @ k.transpose(-1, -2)).view(batch, heads, -1, m).to(dtype) * factor
        if inputs.sizes.causal:
            hidden = torch.arange(m, device=k.device) > (rows + (m - n))[:, None]
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
