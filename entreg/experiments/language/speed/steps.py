"""What the language models' speed benchmark times: prefills and decoding steps of stock decoders, dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from entreg.adapters import probe
from entreg.adapters.growing_cache import GrowingLayer
from entreg.sparse import DecoderSparsity, PageSummaries, decoder_plan
from entreg.sparse.backends import products
from entreg.sparse.backends.page_loops import attend_chosen_pages

FREE = "entreg_free"
"""Attention implementation that computes nothing: zeros in place of attention's output."""

GROUPED = "entreg_grouped"
"""SDPA in which the query heads that share a key head are rows of one product while a token is written.

transformers itself does this only under a mask. Without one, SDPA on the CPU reads every key once for each query head.
"""

PRODUCTS = "entreg_products"
"""The same as two plain matrix products around a softmax.

Few rows of queries give a fused kernel nothing to fuse: with keys in one piece, as in a static cache, two products took
half of its time on a CPU in bfloat16.
"""

OWN = "entreg_own"
"""The sparse path's own kernels on a CPU, with nothing left out: what is left of a speed-up is sparsity's part.

While a token is written, these are compiled loops over all pages; for a prompt in bfloat16 products of some rows.
"""

_PAGE = 16

CACHES = ("dynamic", "static", "growing")
"""Kinds of caches: transformers' own two, and :class:`entreg.adapters.growing_cache.GrowingCache`."""


def free_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """(batch, n, heads, d_v) of zeros."""
    batch, heads, n, _ = query.shape
    return query.new_zeros(batch, n, heads, value.shape[-1]), None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stock SDPA, of one query without a mask with its heads grouped."""
    batch, heads, n, width = query.shape
    if n > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(batch, key.shape[1], -1, width)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


def product_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stock SDPA, of one query by products of grouped heads; a mask is bool, (batch, 1, 1, m)."""
    batch, heads, n, width = query.shape
    if n > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    groups = key.shape[1]
    grouped = query.reshape(batch * groups, heads // groups, width)
    logits = torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2)).view(batch, groups, heads // groups, -1)
    logits = logits.float() * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    weights = torch.softmax(logits, dim=-1).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).reshape(batch, 1, heads, -1), None


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stock SDPA, without a mask by the kernels of :mod:`entreg.sparse`."""
    batch, _, n, width = query.shape
    if attention_mask is not None or (n > 1 and not products.serves(query, key, value)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    scale = width**-0.5 if scaling is None else scaling
    if n > 1:
        return products.attend_causal(query, key, value, scale).transpose(1, 2), None
    pages = torch.ones(batch, 1, 1, -(-key.shape[2] // _PAGE), dtype=torch.bool)
    return attend_chosen_pages(query, key, value, pages, _PAGE, scale).transpose(1, 2), None


for _name, _function in (
    (FREE, free_attention),
    (GROUPED, grouped_attention),
    (PRODUCTS, product_attention),
    (OWN, own_attention),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder.

    Attributes:
        layers, heads, key_heads, head_dim, hidden, intermediate: as usual.
        parameters: numbers.
        itemsize: bytes of each.
    """

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    parameters: int
    itemsize: int

    @staticmethod
    def of(model: nn.Module) -> DecoderSizes:
        """The sizes of a model."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        return DecoderSizes(
            layers=config.num_hidden_layers,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            itemsize=next(model.parameters()).element_size(),
        )

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return self.parameters * self.itemsize

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in all layers."""
        return 2 * self.layers * self.key_heads * self.head_dim * tokens * self.itemsize

    def prefill_bytes(self, tokens: int) -> int:
        """About what a prefill needs beside the weights, with queries and keys of all layers kept for selection."""
        queries = self.layers * self.heads * self.head_dim * tokens * self.itemsize
        activations = (3 * self.intermediate + 8 * self.hidden) * tokens * self.itemsize
        return 2 * self.cache_bytes(tokens) + queries + activations


class Prefill:
    """Reads a prompt: from token ids to the logits of the last token, with a fresh cache, as ``generate`` does it.

    Args:
        model: decoder; perhaps compiled.
        input_ids: (batch, n).
    """

    tokens_per_call = 1

    def __init__(self, model: nn.Module, input_ids: Tensor) -> None:
        self.model, self.input_ids = model, input_ids

    def __call__(self) -> Tensor:
        """(batch, 1, vocabulary) logits."""
        return self.model(input_ids=self.input_ids, use_cache=True, logits_to_keep=1).logits


class FilledCache:
    """Keys and values of a context, standard normal; caches of all kinds share their memory.

    Args:
        model: decoder whose layers attend to all tokens before.
        batch: sequences.
        context: places.
    """

    def __init__(self, model: nn.Module, batch: int, context: int) -> None:
        sizes, parameter = DecoderSizes.of(model), next(model.parameters())
        shape = (batch, sizes.key_heads, context, sizes.head_dim)

        def normal() -> Tensor:
            return torch.randn(shape, dtype=parameter.dtype, device=parameter.device)

        self.config, self.context = model.config, context
        self.parts = [(normal(), normal()) for _ in range(sizes.layers)]

    def cache(self, kind: str) -> Cache:
        """A cache of one of :data:`CACHES` over this memory; :meth:`rewind` says how much of it is filled."""
        if kind == "growing":
            return Cache(layers=[GrowingLayer.over(keys, values, self.context) for keys, values in self.parts])
        cache = DynamicCache(config=self.config)
        if kind == "static":
            cache = StaticCache(config=self.config, max_cache_len=self.context)
        for layer, (keys, values) in zip(cache.layers, self.parts, strict=True):
            layer.lazy_initialization(keys[:, :, :1], values[:, :, :1])
            layer.keys, layer.values = keys, values
        return cache

    def rewind(self, cache: Cache, length: int) -> None:
        """Let a cache hold the first ``length`` places."""
        for layer, (keys, values) in zip(cache.layers, self.parts, strict=True):
            if isinstance(layer, DynamicLayer):
                layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
            else:
                layer.cumulative_length.fill_(length)


class Decoding:
    """Writes the last tokens of a context one by one; the cache grows as it does in ``generate``.

    Every call starts at the same length with other tokens than the call before, so that nothing that is kept between
    steps (summaries of pages) is found ready for the new tokens.

    Args:
        model: decoder; perhaps compiled.
        filled: keys and values.
        kind: of cache.
        input_ids: (calls, batch, tokens per call): tokens of one call after the other, then from the start again.
    """

    def __init__(self, model: nn.Module, filled: FilledCache, kind: str, input_ids: Tensor) -> None:
        self.model, self.filled, self.input_ids = model, filled, input_ids
        self.tokens_per_call = input_ids.shape[2]
        self.cache = filled.cache(kind)
        filled.rewind(self.cache, filled.context - self.tokens_per_call)
        self._calls = 0

    def __call__(self) -> Tensor:
        """(batch, 1, vocabulary) logits of the last step, whose query sees the whole context."""
        tokens = self.input_ids[self._calls % len(self.input_ids)]
        self._calls += 1
        for place in range(self.tokens_per_call):
            token = tokens[:, place : place + 1]
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        # At the end, because a dynamic cache has a copy of its own by now.
        self.filled.rewind(self.cache, self.filled.context - self.tokens_per_call)
        return out.logits


class Choosing:
    """The choice of blocks or pages alone, for queries and keys of all layers that a plan acts on.

    Args:
        seen: per layer queries, keys and scale, see :func:`seen_by_layers`.
        plan: what chooses.
    """

    tokens_per_call = 1

    def __init__(self, seen: Mapping[int, tuple[Tensor, Tensor, float]], plan: DecoderSparsity) -> None:
        self.plan = plan
        self.seen = {layer: one for layer, one in seen.items() if plan.layers is None or layer in plan.layers}
        self.pages = {layer: PageSummaries(plan.page_size) for layer in self.seen}

    def __call__(self) -> None:
        for layer, (q, k, scale) in self.seen.items():
            decoder_plan(q, k, self.plan, scale=scale, pages=self.pages[layer])


def seen_by_layers(model: nn.Module, step: Prefill | Decoding) -> dict[int, tuple[Tensor, Tensor, float]]:
    """Queries (batch, heads, n, d), keys (batch, key_heads, m, d) and scale of every layer in one (last) pass."""
    with probe(model) as handle:
        step()
        return {one.layer: (one.queries, one.keys, one.scale) for one in handle.captures}
