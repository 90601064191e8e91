"""Scores by name: what they give for queries and keys that are there, and what they cost."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.entropy.attention import check_attention_inputs
from entreg.errors import InputError
from entreg.names import require_choice
from entreg.sparse.registries import SCORES
from entreg.sparse.scores.score import ScoreInputs, ScoreSizes


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
    """Score every key, per query head; differentiable in q and k (``"magnitude"``: in what is measured).

    * ``"received"``: mean over the sampled queries of the attention that the key receives; an estimate of the mean
      over all queries, unbiased if a generator draws the sample, exact if all are sampled. Sums to one.
    * ``"prefix"``: mean of the prefix tokens' attention rows. Sums to one.
    * ``"mixed"``: half of each; without prefix tokens, or under a causal mask (where they see only themselves),
      ``"received"`` alone.
    * ``"magnitude"``: L2 norm of the value vector, or of the token if only ``features`` are given.
    * ``"part"``: the tokens after the prefix are partitioned by their features (keys of all heads if none are given);
      each has the mean ``"mixed"`` score of its part.

    Args:
        q: (batch, heads, n, d), floating point.
        k: (batch, key_heads, m, d); heads is a multiple of key_heads.
        score: a name in :data:`entreg.sparse.registries.SCORES` (``"gate"`` is computed by its owner and passed on as
            a tensor).
        num_prefix: leading class and register tokens, 0 to m, at most n where their rows are used.
        num_sampled_queries: at least 1; n or more, or None, means all queries.
        scale: factor of the logits; default 1/sqrt(d).
        values: (batch, key_heads, m, d_v).
        features: (batch, m, c).
        num_parts: of ``"part"``, at least 1.
        causal: query i sees the keys 0 ... i + m - n only; needs m >= n.
        generator: a CPU generator from which positions of queries are drawn. Without one, the positions are always the
            same for a given n, one in each of equal intervals, so that an image's scores do not depend on what was run
            before.

    Returns:
        (batch, heads, m), float32 or float64.

    Raises:
        InputError: arguments that do not fit the above, or an input that the score needs is missing.
    """
    check_attention_inputs(q, k, causal)
    inputs = ScoreInputs(
        ScoreSizes(q.shape[2], k.shape[2], num_prefix, num_sampled_queries, causal),
        queries=q,
        make_keys=lambda: k,
        scale=scale,
        values=values,
        features=features,
        num_parts=num_parts,
        generator=generator,
        device=q.device,
    )
    return score_of(score, inputs).expand(-1, q.shape[1], -1)


def score_of(name: str, inputs: ScoreInputs) -> Tensor:
    """Score every key by what a score may look at.

    Args:
        name: in :data:`entreg.sparse.registries.SCORES`.
        inputs: see :class:`ScoreInputs`.

    Returns:
        (batch, heads, m), or 1 for heads that are all alike; float32 or float64.

    Raises:
        InputError: an unknown name, or something that the score needs is missing.
    """
    require_choice("score", name, SCORES, InputError)
    if SCORES[name].needs_prefix and inputs.sizes.prefix_rows == 0:
        raise InputError(f"the score {name!r} needs prefix tokens that see all keys; use 'received'")
    return SCORES[name].scores(inputs)


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

    Args:
        score: a name as in :func:`selection_scores`; ``"gate"`` costs none.
        num_queries: n.
        num_keys: m.
        num_prefix: as in :func:`selection_scores`.
        num_sampled_queries: as in :func:`selection_scores`.
        causal: as in :func:`selection_scores`.

    Returns:
        the number; 0 for scores that look at no attention.

    Raises:
        InputError: an unknown score, or a number out of range.
    """
    require_choice("score", score, SCORES, InputError)
    return SCORES[score].entries(ScoreSizes(num_queries, num_keys, num_prefix, num_sampled_queries, causal))
