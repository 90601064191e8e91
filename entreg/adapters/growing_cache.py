"""A key-value cache for stock transformers decoders that grows in place.

transformers' dynamic cache copies all keys and values at every step; its static cache does not, but attention runs
over its empty places too, under a mask. This one writes new keys and values behind the old ones and hands out views of
what is filled: no copy, no mask, the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from entreg.errors import InputError

# A full buffer is copied to one larger by this fraction: a long text is copied a few times, not once per token.
_GROWTH = 0.25
_LEAST_ROOM = 256


class GrowingLayer(DynamicLayer):
    """One layer's cache: ``keys`` and ``values`` are views of buffers with room behind them.

    Whatever replaces ``keys`` or ``values`` (reordering for beam search, another device) is taken over at the next
    update. Keys and values with a gradient are concatenated as in the dynamic cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    @classmethod
    def over(cls, keys: Tensor, values: Tensor, length: int) -> GrowingLayer:
        """A layer on given buffers of which the first places are filled.

        Args:
            keys: (batch, key_heads, capacity, d).
            values: (batch, key_heads, capacity, d_v).
            length: filled places, in [0, capacity].
        """
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer._buffers = (keys, values)
        layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys (batch, key_heads, n, d) and values; all of them so far, as views."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if not self._has_room(end):
            self._buffers = tuple(
                _with_room(old, new, length, end) for old, new in ((self.keys, key_states), (self.values, value_states))
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all keys and values."""
        self._buffers = None
        super().reset()

    def _has_room(self, end: int) -> bool:
        """Whether what is filled is the beginning of the buffers, and these have this many places."""
        if self._buffers is None or end > self._buffers[0].shape[2]:
            return False
        return all(
            part.data_ptr() == buffer.data_ptr()
            and part.stride() == buffer.stride()
            and part.shape[:2] == buffer.shape[:2]
            for part, buffer in zip((self.keys, self.values), self._buffers, strict=True)
        )


class GrowingCache(Cache):
    """A cache of :class:`GrowingLayer`, for ``past_key_values`` of a decoder or its ``generate``.

    Args:
        config: of the decoder; None is for decoders whose layers all attend to everything before.

    Raises:
        InputError: the decoder has layers that attend to a sliding window or have another kind of state.
    """

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        if config is not None:
            require_full_attention(config)
        super().__init__(layer_class_to_replicate=GrowingLayer)


def require_full_attention(config: PreTrainedConfig) -> None:
    """Make sure that every layer of a decoder attends to all tokens before.

    Raises:
        InputError: a layer does not.
    """
    config = config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or (window is not None and getattr(config, "use_sliding_window", True)):
        what = f"a sliding window of {window}" if window is not None else f"layers of the kind {min(kinds)}"
        raise InputError(f"a growing cache is for layers that attend to all tokens before; this model has {what}")


def _with_room(old: Tensor, new: Tensor, length: int, end: int) -> Tensor:
    """A buffer with more than ``end`` places, the first ``length`` of which are the old ones."""
    batch, heads, _, width = new.shape
    wanted = end + max(_LEAST_ROOM, int(end * _GROWTH))
    # A whole number of pages for every head, so that a sparse path can copy pages as they lie.
    buffer = new.new_empty(batch, heads, -(-wanted // _LEAST_ROOM) * _LEAST_ROOM, width)
    if length:
        buffer[:, :, :length] = old
    return buffer
