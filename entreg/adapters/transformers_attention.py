"""What transformers calls in place of its own attention while a decoder has the sparse path or a probe.

One function is registered for all models, under one name, in transformers' AttentionInterface; masks are those of its
SDPA attention. The name equals that of SDPA, since some models ask for it. What a model's layers do is kept in an
:class:`Attachment`, which the function finds from the attention module that calls it.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from entreg.adapters.handles import DecoderCapture, DecoderSparsifyHandle, ProbeHandle, Selection
from entreg.errors import InputError
from entreg.sparse import MaskForm, PageSummaries, decoder_attention, mask_form


class _Implementation(str):
    """Name of an attention implementation that is SDPA to whoever asks.

    The forward passes of some models depend on the name: where it is ``"sdpa"`` they put the keys that they select
    themselves into the mask, and cut queries that nobody reads; elsewhere they expect the implementation to do so.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == _SDPA

    def __ne__(self, other: object) -> bool:
        return not self == other

    # Lookups in transformers' registries find what is registered under the name itself.
    __hash__ = str.__hash__


_SDPA = "sdpa"
NAME = _Implementation("entreg")
"""Of the attention implementation in transformers' registry."""

_KEY = "_entreg_attachment"
# Layers share a mask or two; those that select keys have one each, which are not to be held.
_MASKS_AT_ONCE = 4
# What attention functions are handed and need not know: the mask and the queries and keys say it already, or it is for
# the outputs of the model or for the trainer.
_HARMLESS = frozenset(
    (
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    )
)
# What SDPA takes besides, or names in an error of its own. It is handed blocks of keys that the mask holds already.
_OF_SDPA = frozenset(("block_indices", "cache", "position_bias", "softcap"))


@dataclass(frozen=True, eq=False)
class _Mask:
    """A mask of a forward pass, which layers share, and what there is to know of it.

    Attributes:
        given: by the model; held so that no other gets its identity.
        needed: (batch or 1, 1 or heads, n, m) of the keys that there are; None if it says no more than that attention
            is causal.
        looks_ahead: whether a query may see a key after its own.
    """

    given: Tensor
    needed: Tensor | None
    looks_ahead: bool
    _forms: dict[int, MaskForm] = field(default_factory=dict)

    def form(self, batch: int) -> MaskForm | None:
        """What the needed part consists of, for a batch of such a size."""
        if self.needed is None:
            return None
        if batch not in self._forms:
            self._forms[batch] = mask_form(self.needed.expand(batch, -1, -1, -1))
        return self._forms[batch]

    @classmethod
    def of(cls, mask: Tensor, num_keys: int) -> _Mask:
        needed = mask[..., :num_keys]
        allowed = needed if mask.dtype == torch.bool else needed > torch.finfo(mask.dtype).min
        n, m = needed.shape[2:]
        causal = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril(m - n)
        if mask.dtype == torch.bool and torch.equal(needed, causal.expand_as(needed)):
            return cls(mask, None, False)
        return cls(mask, needed, bool((allowed & ~causal).any()))


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
        self.head: nn.Module | None = None
        self._start()
        self.config._attn_implementation = NAME
        self._hooks = [body.register_forward_pre_hook(_begin, with_kwargs=True)]
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

    def _start(self) -> None:
        """Nothing is watched yet, and nothing known of a forward pass."""
        self.probes: list[tuple[ProbeHandle, frozenset[int]]] = []
        self._seen: set[int] = set()
        self._caches: dict[int, ReferenceType[Cache]] = {}
        # By identity of the keys that a layer reads the layer that wrote them.
        self._writers: dict[int, tuple[ReferenceType[Tensor], int]] = {}
        self._masks: deque[_Mask] = deque(maxlen=_MASKS_AT_ONCE)
        # Guesses of an assistant at the end of this pass, and of the next one.
        self._guessed = self._announced = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("body", "head", "attentions", "config", "stock_implementation", "sparse", "_hooks")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        twin = object.__new__(Attachment)
        memo[id(self)] = twin
        twin.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        twin.detach_if_unused()
        return twin

    def detach_if_unused(self) -> None:
        """Restore the stock model if neither a sparse path nor a probe is left."""
        if self.sparse is not None or self.probes:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.head = None
        for module in (self.body, *self.attentions):
            module.__dict__.pop(_KEY, None)
        self.config._attn_implementation = self.stock_implementation

    def begin(self, output_attentions: bool) -> None:
        """Forget the forward pass before.

        Args:
            output_attentions: whether the attention weights are asked for.

        Raises:
            InputError: they are; or the model was changed past the handles.
        """
        if not isinstance(self.config._attn_implementation, _Implementation):
            raise InputError(
                f"the model's attention implementation was set to {self.config._attn_implementation!r}, past the "
                "sparse path or probe in it: remove() them first"
            )
        if output_attentions or self.config.output_attentions:
            raise InputError(
                "output_attentions=True asks for attention weights, which neither the sparse path nor SDPA computes: "
                "remove() what is in the model and set its attention implementation to 'eager'"
            )
        if self.probes and self.body.training and torch.is_grad_enabled() and _checkpoints_reentrantly(self.body):
            raise InputError(
                "captures have no gradient under reentrant checkpointing; enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self._guessed, self._announced = self._announced, 0
        self._seen.clear()
        self._writers.clear()
        self._masks.clear()
        if self.sparse is not None:
            self.sparse.selections = []
        for handle, _ in self.probes:
            handle.captures = []

    def watch_head(self, head: nn.Module) -> None:
        """See from the arguments of the model with its head which of the next tokens are guesses.

        Assisted generation verifies the first guesses together with the prompt, and asks for the logits of the last
        token before them and theirs.
        """
        if self.head is None and head is not self.body:
            self.head = head
            self._hooks.append(head.register_forward_pre_hook(_see_guesses, with_kwargs=True))

    def see_guesses(self, logits_to_keep: Any, cache: Cache | None) -> None:
        """Remember how many tokens at the end of the next pass are guesses."""
        counts = isinstance(logits_to_keep, int) and logits_to_keep > 1
        self._announced = logits_to_keep - 1 if counts and cache is not None else 0

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
        leaves_out = sparse is not None and sparse.leaves_out
        writer = self._writer(layer, k)
        plan, out = None, None
        # Logits of more tokens than there are may be asked for, but nothing is guessed before any token is known.
        guessed = self._guessed if self._guessed < q.shape[2] else 0
        if watching or leaves_out:
            cache = self._caches.get(layer, lambda: None)()
            keys, values = _filled(cache, writer, k, v)
            leaves_out = leaves_out and sparse.is_sparse(q.shape[2], keys.shape[2], guessed)
        if watching or leaves_out:
            _require_known(module, options, leaves_out)
            seen = None if mask is None else self._mask(mask, keys.shape[2])
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            needed = None if seen is None else seen.needed
            causal = _is_causal(module, options) if seen is None else not seen.looks_ahead
            for handle in watching:
                handle.captures.append(DecoderCapture(layer, q, keys, values, scale, needed, causal))
            if leaves_out:
                _require_plain(seen, causal, dropout)
                out, plan = decoder_attention(
                    *_as_autocast(q, keys, values),
                    sparse.settings,
                    scale=scale,
                    mask=None if seen is None else seen.form(len(q)),
                    pages=None if cache is None else _pages(sparse, cache, layer),
                    num_guessed=guessed,
                )
        elif self.stock_implementation != _SDPA:
            _require_served_by_sdpa(module, options, self.stock_implementation)
        if sparse is not None and sparse.record and not again:
            sparse.selections.append(Selection(layer, plan=plan))
        if out is None:
            return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **options)
        return out.transpose(1, 2).contiguous(), None

    def _writer(self, layer: int, k: Tensor) -> int:
        """The layer that wrote these keys: an earlier one if this one shares its keys."""
        known = self._writers.get(id(k))
        if known is not None and known[0]() is k:
            return known[1]
        self._writers[id(k)] = ref(k), layer
        return layer

    def _mask(self, mask: Tensor, num_keys: int) -> _Mask:
        """What there is to know of a mask, for so many keys."""
        known = next((one for one in self._masks if one.given is mask), None)
        if known is None:
            known = _Mask.of(mask, num_keys)
            self._masks.append(known)
        return known


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


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.disable
def _begin(body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    attachment = Attachment.of(body)
    if attachment.sparse is None and not attachment.probes:
        # Read from a file that a model was written to which was only watched.
        attachment.detach_if_unused()
    else:
        attachment.begin(bool(kwargs.get("output_attentions")))


@torch.compiler.disable
def _see_guesses(head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    attachment = Attachment.of(head.base_model)
    if attachment is not None:
        attachment.see_guesses(kwargs.get("logits_to_keep"), kwargs.get("past_key_values"))


@torch.compiler.disable
def _see_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    # Under several names in transformers' models.
    found = (value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
    attachment = Attachment.of(module)
    if attachment is not None:
        attachment.see_cache(module.layer_idx, next(found, None))


def _filled(cache: Cache | None, writer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values without the empty places of a static cache, which come last.

    Args:
        cache: of the model; None if there is none.
        writer: layer whose keys these are.
        k: (batch, key_heads, m, d).
        v: (batch, key_heads, m, d_v).
    """
    length = 0 if cache is None else int(cache.get_seq_length(writer))
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


def _require_known(module: nn.Module, options: dict[str, Any], leaves_out: bool) -> None:
    """Make sure that what is captured, or attended to sparsely, is all that the layer attends with."""
    if leaves_out and torch.jit.is_tracing():
        raise InputError(
            "torch.jit.trace cannot record the sparse path, whose choice depends on the input; remove() it first"
        )
    known = _HARMLESS if leaves_out else _HARMLESS | {"block_indices"}
    for name in _unknown(options, known):
        raise InputError(
            f"{type(module).__name__} attends with {name!r}, which the sparse path and probes do not know; "
            "remove() them first"
        )


def _require_served_by_sdpa(module: nn.Module, options: dict[str, Any], implementation: str | None) -> None:
    """Make sure that a model which was not on SDPA before does not lose what SDPA does not know."""
    for name in _unknown(options, _HARMLESS | _OF_SDPA):
        raise InputError(
            f"{type(module).__name__} attends with {name!r}, which SDPA ignores and its own attention implementation "
            f"{implementation!r} may not; remove() the sparse path and probes first"
        )


def _unknown(options: dict[str, Any], known: frozenset[str]) -> list[str]:
    return [name for name, value in options.items() if value is not None and name not in known]


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether SDPA is causal without a mask."""
    causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _require_plain(mask: _Mask | None, causal: bool, dropout: float) -> None:
    if dropout > 0:
        raise InputError("the sparse path has no attention dropout; set attention_dropout=0 in the model's config")
    if mask is not None and mask.given.dtype != torch.bool:
        raise InputError(f"attention masks of the sparse path are bool, True = may attend, got {mask.given.dtype}")
    if not causal:
        raise InputError(
            "attention lets tokens see later ones here (a prefix, an image, both directions), which the sparse path of "
            "decoders cannot do; keep prompts dense, DecoderSparsity(sparsity=0.0, decode_sparsity=...), or remove() it"
        )
    if mask is not None and mask.given.shape[1] != 1:
        raise InputError(f"attention masks of the sparse path are alike for all heads, got {mask.given.shape[1]} masks")


def _checkpoints_reentrantly(body: nn.Module) -> bool:
    """Whether a layer is checkpointed in the way that runs it without gradients at first."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", False)
        for module in body.modules()
    )
