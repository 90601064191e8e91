"""A look at the attention of every layer while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from entreg.adapters import probe
from entreg.entropy import attention_row_entropy, effective_support
from entreg.errors import first_line
from entreg.tracking.settings import TrackerSettings
from entreg.tracking.tracker import Tracker, say


class AttentionWatch:
    """Row entropies of every layer's attention on the same few items.

    ``row_entropy/layer_...`` is their histogram over items and heads, in nats; ``row_support/layer_...`` the effective
    support exp(H) of their mean, a number of keys. Under a sparse path these are of the tokens that are left.

    Args:
        tracker: of the run.
        settings: ``attention_every`` and ``attention_queries`` of them.
        forward: runs a model on the items.
    """

    def __init__(self, tracker: Tracker, settings: TrackerSettings, forward: Callable[[nn.Module], Any]) -> None:
        self.every = settings.attention_every
        self._tracker, self._queries, self._forward = tracker, settings.attention_queries, forward
        self._failed = False

    def __call__(self, model: nn.Module, step: int) -> None:
        """Look, in a model that is in evaluation mode, without gradients; called by all processes of a run alike.

        Args:
            model: stock model, its handles attached or not.
            step: finished steps.
        """
        if self._failed:
            return
        try:
            self._look(model, step)
        except Exception as error:
            # A look may need memory that training does not; the run does not depend on it.
            self._failed = True
            say(f"The attention is not tracked any more ({first_line(error)}); the run goes on.")

    def _look(self, model: nn.Module, step: int) -> None:
        with probe(model) as handle:
            self._forward(model)
            captures = handle.captures
        supports = {}
        for one in captures:
            # The same rows every time: curves are of the model, not of the sample.
            generator = torch.Generator().manual_seed(0)
            entropies = attention_row_entropy(
                one.queries,
                one.keys,
                causal=one.causal,
                scale=one.scale,
                key_mask=one.key_mask,
                query_mask=one.query_mask,
                num_sampled_queries=self._queries,
                generator=generator,
            )
            layer = f"layer_{one.layer:02d}"
            self._tracker.histogram(f"row_entropy/{layer}", entropies.float().cpu(), step)
            supports[f"row_support/{layer}"] = effective_support(entropies.mean()).item()
        self._tracker.log(supports, step)
