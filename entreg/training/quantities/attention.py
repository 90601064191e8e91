"""Entropies of the attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from entreg.entropy import attention_block_entropy, attention_key_entropy, attention_row_entropy
from entreg.training.quantities.quantity import QUANTITIES, Quantity

if TYPE_CHECKING:
    from entreg.training.penalties import PenaltySettings


@dataclass(frozen=True)
class AttentionEntropy(Quantity):
    """An entropy of the attention per head: (batch, heads).

    Attributes:
        entropy: of queries and keys.
        by_blocks: it has a block size.
    """

    entropy: Callable[..., Tensor]
    by_blocks: bool = False
    normalizes = True

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        return self.entropy(
            source.queries,
            source.keys,
            causal=source.causal,
            scale=source.scale,
            key_mask=source.key_mask,
            query_mask=source.query_mask,
            num_sampled_queries=settings.num_sampled_queries,
            normalize=settings.normalize,
            **({"block_size": settings.block_size} if self.by_blocks else {}),
        )


QUANTITIES.register("row_entropy", AttentionEntropy(attention_row_entropy))
QUANTITIES.register("block_entropy", AttentionEntropy(attention_block_entropy, by_blocks=True))
QUANTITIES.register("key_entropy", AttentionEntropy(attention_key_entropy))
