"""What is penalised of the choice of tokens: the entropy of its score, and the gates that learn it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from entreg.entropy.soft_partition import entropy_of_masses
from entreg.sparse import selection_scores
from entreg.training.quantities.quantity import QUANTITIES, Quantity

if TYPE_CHECKING:
    from entreg.training.penalties import PenaltySettings


class SelectionEntropy(Quantity):
    """Entropy of the score that token selection goes by, over the patches and shared by the heads: (batch,)."""

    of_decoders = False

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        scores = selection_scores(
            source.queries,
            source.keys,
            settings.score,
            num_prefix=source.num_prefix,
            num_sampled_queries=settings.num_sampled_queries,
            scale=source.scale,
            values=source.values,
        )
        patches = scores.mean(1)[:, source.num_prefix :]
        return entropy_of_masses(patches / patches.sum(-1, keepdim=True))


class GateSize(Quantity):
    """Mean value of a gate: (batch,)."""

    of_decoders = False
    of_gate = True

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        return source.float().mean(-1)


QUANTITIES.register("selection_entropy", SelectionEntropy())
QUANTITIES.register("l1_gate", GateSize())
