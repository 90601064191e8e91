"""What a selection score is: what it may look at, what it gives, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entreg.errors import InputError


@dataclass(frozen=True)
class ScoreSizes:
    """All that the cost of a score depends on.

    Attributes:
        num_queries: n.
        num_keys: m.
        num_prefix: leading class and register tokens, 0 to m.
        num_sampled_queries: query rows to look at, at least 1; n or more, or None, means all.
        causal: query i sees the keys 0 ... i + m - n only; needs m >= n.

    Raises:
        InputError: a number out of range.
    """

    num_queries: int
    num_keys: int
    num_prefix: int = 0
    num_sampled_queries: int | None = 16
    causal: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.num_prefix <= self.num_keys:
            raise InputError(
                f"num_prefix must be between 0 and the number of keys, {self.num_keys}, got {self.num_prefix}"
            )
        if self.num_sampled_queries is not None and self.num_sampled_queries < 1:
            raise InputError(f"num_sampled_queries must be at least 1, got {self.num_sampled_queries}")

    @property
    def sampled_rows(self) -> int:
        """Query rows that a score which samples them looks at."""
        wanted = self.num_sampled_queries
        return self.num_queries if wanted is None else min(self.num_queries, wanted)

    @property
    def prefix_rows(self) -> int:
        """Prefix tokens whose rows say something: under a causal mask they see only themselves."""
        return 0 if self.causal else self.num_prefix


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may look at. Queries and keys are projected when a score asks for them, and only its rows.

    Attributes:
        sizes: of the queries and keys.
        queries: (batch, heads, n, d); or a function from (rows,) int64 positions to (batch, heads, rows, d), for
            queries that are not there yet (not of causal attention).
        make_keys: gives (batch, key_heads, m, d); called once, if at all.
        scale: factor of the logits; default 1/sqrt(d).
        values: (batch, key_heads, m, d_v), or None.
        features: (batch, m, c) tokens, or None.
        gate: a learned gate, from (batch, tokens, c) to (batch, tokens, 1) logits, or None.
        num_parts: of scores that partition the tokens.
        generator: from which positions of queries are drawn; None for fixed ones.
        device: where positions are wanted.
    """

    sizes: ScoreSizes
    queries: Tensor | Callable[[Tensor], Tensor]
    make_keys: Callable[[], Tensor]
    scale: float | None = None
    values: Tensor | None = None
    features: Tensor | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    num_parts: int = 8
    generator: torch.Generator | None = None
    device: torch.device | str = "cpu"
    _made: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if callable(self.queries) and self.sizes.causal:
            raise InputError("queries that are projected on demand cannot be causal")

    @property
    def keys(self) -> Tensor:
        """(batch, key_heads, m, d)."""
        # Not a cached_property: torch.compile does not follow its lock.
        if not self._made:
            self._made.append(self.make_keys())
        return self._made[0]

    def queries_at(self, rows: Tensor) -> Tensor:
        """(batch, heads, rows, d) queries at (rows,) int64 positions."""
        return self.queries(rows) if callable(self.queries) else self.queries.index_select(2, rows)

    def of_query_heads(self, values: Tensor) -> Tensor:
        """(batch, key_heads, m) values of key heads for the query heads that read them: (batch, heads, m).

        Of queries that are not there yet a value for every key head is enough.
        """
        if callable(self.queries):
            return values
        return values.repeat_interleave(self.queries.shape[1] // values.shape[1], dim=1)

    def checked_features(self) -> Tensor:
        """The features.

        Raises:
            InputError: they are not one vector for each key.
        """
        features, batch = self.features, len(self.features if callable(self.queries) else self.queries)
        if features.dim() != 3 or features.shape[:2] != (batch, self.sizes.num_keys):
            wanted = (batch, self.sizes.num_keys)
            raise InputError(f"features must have shape {wanted} + (c,), got {tuple(features.shape)}")
        return features


class Score:
    """How much each key or token is needed. A new one overrides :meth:`scores`; and :meth:`entries` if it has a cost.

    Attributes:
        needs_prefix: it has no value without prefix tokens that see all keys.
        learned: it has parameters of its own, so that it cannot be had from a frozen model.
    """

    needs_prefix = False
    learned = False

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """Rank the keys.

        Returns:
            (batch, heads, m), or 1 for heads that are all alike; float32 or float64; best differentiable.

        Raises:
            InputError: something that it needs is missing.
        """
        raise NotImplementedError

    def entries(self, sizes: ScoreSizes) -> int:
        """Score entries per head that :meth:`scores` computes: rows of attention times keys. By default none."""
        return 0


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself, or as float32 if it is of a narrower dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
