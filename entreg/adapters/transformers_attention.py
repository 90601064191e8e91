"""What transformers calls in place of its own attention while a decoder has the sparse path or a probe.

One function is registered for all models, under one name, in transformers' AttentionInterface; masks are those of its
SDPA attention. What a model's layers do is kept in an :class:`Attachment`, which the function finds from the attention
module that calls it.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from entreg.adapters.handles import DecoderCapture, DecoderSparsifyHandle, ProbeHandle, Selection
from entreg.errors import InputError
from entreg.sparse import PageSummaries, decoder_attention

NAME = "entreg"
"""Of the attention implementation in transformers' registry."""

_KEY = "_entreg_attachment"
# Arguments of transformers' attention functions that change the result and that SDPA or the sparse path ignores.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


class Attachment:
    """What is attached to one decoder: at most one sparse path, any number of probes.

    A copy of the model has the sparse path, with its own handle, but no probes. Without a sparse path and probes it is
    the stock model again.

    Args:
        body: stock decoder without its head.
        attentions: its attention modules, in the order of the layers.
    """

    def __init__(self, body: nn.Module, attentions: list[nn.Module]) -> None:
        self.body, self.attentions, self.config = body, attentions, body.config
        self.stock_implementation = body.config._attn_implementation
        self.sparse: DecoderSparsifyHandle | None = None
        self.probes: list[tuple[ProbeHandle, frozenset[int]]] = []
        self._seen: set[int] = set()
        self._caches: dict[int, ReferenceType[Cache]] = {}
        # Masks of this pass, which layers share, and what is left of each.
        self._masks: dict[int, tuple[Tensor, Tensor | None]] = {}
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        body.set_attn_implementation(NAME)
        self._hooks = [body.register_forward_pre_hook(_begin)]
        body.__dict__[_KEY] = self
        for attention in attentions:
            attention.__dict__[_KEY] = self
            self._hooks.append(attention.register_forward_pre_hook(_see_cache, with_kwargs=True))

    @staticmethod
    def of(module: nn.Module) -> Attachment | None:
        """What is attached to the body or attention module of a decoder; None if nothing is."""
        attachment = module.__dict__.get(_KEY)
        # A copy of a model that was only watched has an attachment that never was in use.
        return attachment if attachment is not None and attachment._hooks else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        twin = object.__new__(Attachment)
        memo[id(self)] = twin
        for name in ("body", "attentions", "config", "stock_implementation", "sparse", "_hooks"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin.probes, twin._seen, twin._caches, twin._masks = [], set(), {}, {}
        twin.detach_if_unused()
        return twin

    def detach_if_unused(self) -> None:
        """Restore the stock model if neither a sparse path nor a probe is left."""
        if self.sparse is not None or self.probes:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in (self.body, *self.attentions):
            module.__dict__.pop(_KEY, None)
        self.config._attn_implementation = self.stock_implementation

    def begin(self) -> None:
        """Forget the forward pass before."""
        if self.config._attn_implementation != NAME:
            raise InputError(
                f"the model's attention implementation was set to {self.config._attn_implementation!r}, past the "
                "sparse path or probe in it: remove() them first"
            )
        if self.probes and self.body.training and torch.is_grad_enabled() and _checkpoints_reentrantly(self.body):
            raise InputError(
                "captures have no gradient under reentrant checkpointing; enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self._seen.clear()
        self._masks.clear()
        if self.sparse is not None:
            self.sparse.selections = []
        for handle, _ in self.probes:
            handle.captures = []

    def see_cache(self, layer: int, cache: Cache | None) -> None:
        """Remember, without holding it alive, the cache that a layer's next attention reads."""
        if cache is None:
            self._caches.pop(layer, None)
        else:
            self._caches[layer] = ref(cache)

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        dropout: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """One layer's attention, as transformers wants it; arguments as in :func:`attend`."""
        layer = module.layer_idx
        # Gradient checkpointing runs a layer again, whose captures and choices are known already.
        again = layer in self._seen
        self._seen.add(layer)
        watching = [] if again else [handle for handle, layers in self.probes if layer in layers]
        sparse = self.sparse if self.sparse is not None and self.sparse.acts_on(layer) else None
        leaves_out = sparse is not None and sparse.is_sparse(q.shape[2])
        plan, out = None, None
        if watching or leaves_out:
            _require_supported(module, options)
            cache = self._caches.get(layer, lambda: None)()
            keys, values = _filled(cache, layer, k, v)
            seen_mask = None if mask is None else self._needed(mask, keys.shape[2])
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            for handle in watching:
                handle.captures.append(DecoderCapture(layer, q, keys, values, scale, seen_mask))
            if leaves_out:
                _require_plain(mask, dropout)
                out, plan = decoder_attention(
                    *_as_autocast(q, keys, values),
                    sparse.settings,
                    scale=scale,
                    mask=seen_mask,
                    pages=None if cache is None else _pages(sparse, cache, layer),
                )
        if sparse is not None and sparse.record and not again:
            sparse.selections.append(Selection(layer, plan=plan))
        if out is None:
            return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **options)
        return out.transpose(1, 2).contiguous(), None

    def _needed(self, mask: Tensor, num_keys: int) -> Tensor | None:
        """The mask of so many keys; None if it says no more than that attention is causal."""
        if id(mask) not in self._masks:
            needed = mask[..., :num_keys]
            if mask.dtype == torch.bool:
                n, m = needed.shape[2:]
                causal = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril(m - n)
                if torch.equal(needed, causal.expand_as(needed)):
                    needed = None
            # With the mask itself, so that no other gets its id.
            self._masks[id(mask)] = mask, needed
        return self._masks[id(mask)][1]


# What is kept between calls is no part of a compiled graph; neither is a choice that depends on the data.
@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: what is attached to the module, or stock SDPA.

    Args:
        module: stock attention module of a decoder.
        query: (batch, heads, n, d), after rotary positions.
        key: (batch, key_heads, m, d), likewise, after the cache.
        value: (batch, key_heads, m, d_v).
        attention_mask: (batch, 1, n, m) bool, True = may attend; None for causal attention.
        scaling: factor of the logits; default 1/sqrt(d).
        dropout: probability in [0, 1) with which attention weights are dropped.
        options: what else transformers hands to attention functions.

    Returns:
        (batch, n, heads, d_v), and None for the weights.

    Raises:
        InputError: an argument that the sparse path or a probe cannot serve.
    """
    attachment = Attachment.of(module)
    if attachment is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return attachment.attend(module, query, key, value, attention_mask, scaling, dropout, options)


@torch.compiler.disable
def _begin(body: nn.Module, args: Any) -> None:
    Attachment.of(body).begin()


@torch.compiler.disable
def _see_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    # Under several names in transformers' models.
    found = (value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
    Attachment.of(module).see_cache(module.layer_idx, next(found, None))


def _filled(cache: Cache | None, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values without the empty places of a static cache, which come last."""
    length = 0 if cache is None else int(cache.get_seq_length(layer))
    if not 0 < length < k.shape[2]:
        return k, v
    return k[:, :, :length], v[:, :, :length]


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of SDPA's arguments: rotary positions leave queries and keys in float32, not values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _pages(sparse: DecoderSparsifyHandle, cache: Cache, layer: int) -> PageSummaries:
    """What is remembered of a layer's keys in a cache, for as long as the cache lives."""
    by_layer = sparse.pages.setdefault(cache, {})
    if layer not in by_layer:
        by_layer[layer] = PageSummaries(sparse.settings.page_size)
    return by_layer[layer]


def _require_supported(module: nn.Module, options: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise InputError(
                f"{type(module).__name__} attends with {name!r}, which the sparse path and probes do not know; "
                "remove() them first"
            )
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise InputError(f"{type(module).__name__} attends without a causal mask; remove() the sparse path first")


def _require_plain(mask: Tensor | None, dropout: float) -> None:
    if dropout > 0:
        raise InputError("the sparse path has no attention dropout; set attention_dropout=0 in the model's config")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"attention masks of the sparse path are bool, True = may attend, got {mask.dtype}")


def _checkpoints_reentrantly(body: nn.Module) -> bool:
    """Whether a layer is checkpointed in the way that runs it without gradients at first."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", False)
        for module in body.modules()
    )
