"""The rival of entropies: the size of the logits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entreg.training.quantities.quantity import QUANTITIES, Quantity

if TYPE_CHECKING:
    from entreg.training.penalties import PenaltySettings


class LogitSize(Quantity):
    """Mean absolute attention logit per head over what may be seen: (batch, heads).

    Rows are a fixed, evenly spaced sample.
    """

    def values(self, settings: PenaltySettings, source: Any, anchors: nn.Module | None) -> Tensor:
        (batch, heads, n, width), m = source.queries.shape, source.keys.shape[2]
        rows = n if settings.num_sampled_queries is None else min(n, settings.num_sampled_queries)
        indices = torch.linspace(0, n - 1, rows, device=source.queries.device).round().long()
        # Query heads that share a key head are more rows of one product.
        grouped = source.queries[:, :, indices].reshape(batch, source.keys.shape[1], -1, width)
        logits = (grouped @ source.keys.transpose(-1, -2)).view(batch, heads, rows, m)
        sizes = (source.scale * logits).abs().float()
        seen = _seen(source, indices)
        return sizes.mean((-1, -2)) if seen is None else (sizes * seen).sum((-1, -2)) / seen.sum((-1, -2)).clamp_min(1)


QUANTITIES.register("l1_logits", LogitSize())


def _seen(capture: Any, indices: Tensor) -> Tensor | None:
    """(batch or 1, 1, rows, m) bool: which keys these query rows may see, of rows that count; None if all are."""
    n, m = capture.queries.shape[2], capture.keys.shape[2]
    masks = []
    if capture.causal:
        masks.append((torch.arange(m, device=indices.device) <= indices[:, None] + (m - n))[None, None])
    if capture.key_mask is not None:
        masks.append(capture.key_mask[:, None, None])
    if capture.query_mask is not None:
        masks.append(capture.query_mask[:, None, indices, None])
    return functools.reduce(torch.logical_and, masks).expand(-1, -1, len(indices), m) if masks else None
