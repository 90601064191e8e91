"""What a quantity that can be penalised is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from entreg.names import Registry

if TYPE_CHECKING:
    from entreg.training.penalties import PenaltySettings


class Quantity:
    """One number or more of one layer. A new one overrides :meth:`values`.

    Attributes:
        normalizes: it heeds the setting ``normalize``.
        of_decoders: causal decoders have it.
        of_gate: it is read from the gates of the sparse path instead of the captures of a probe.
        with_anchors: it has anchors for each layer, made by :meth:`make_anchors` and trained with the model.
    """

    normalizes = False
    of_decoders = True
    of_gate = False
    with_anchors = False

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        """Measure one layer.

        Args:
            settings: of the penalty.
            source: the layer's capture, see :func:`entreg.adapters.probe`; of a gate its values, (batch, patches).
            anchors: of the layer, or None.

        Returns:
            of any shape, with gradient; entropies in nats.
        """
        raise NotImplementedError

    def make_anchors(self, settings: PenaltySettings, width: int) -> nn.Module:
        """Make the anchors for points of a width; they are initialised by their ``initialize_from``."""
        raise NotImplementedError


QUANTITIES: Registry[Quantity] = Registry("penalty")
"""What can be penalised, by name."""
