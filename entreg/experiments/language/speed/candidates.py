"""What the language models' speed benchmark times against each other in one phase, context and batch.

Every candidate is checked before it is timed: sparsity 0 is stock SDPA to the bit, all dense variants attend alike, and
outputs are finite.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters import sparsify
from entreg.adapters.handles import DecoderSparsifyHandle
from entreg.experiments.language.speed.steps import (
    FREE,
    GROUPED,
    OWN,
    PRODUCTS,
    Choosing,
    DecoderSizes,
    Decoding,
    FilledCache,
    Prefill,
    seen_by_layers,
)
from entreg.experiments.measuring import shared_copy
from entreg.sparse import recorded_kernels, sparsity_from_mapping

DENSE = "dense"
FREE_METHOD = "attention for free"
_PRODUCTS, _LOOPS, _OWN, _EAGER = "dense_grouped_products", "dense_own_loops", "dense_own_products", "dense_eager"
UNFUSED = (_PRODUCTS, _LOOPS, _OWN, _EAGER)
"""The dense ways that go through no fused kernel of PyTorch."""

# Calls whose tokens differ from each other.
_TOKEN_SETS = 4
DENSE_DECODING = {
    "dense_dynamic_cache": ("sdpa", "dynamic"),
    "dense_static_cache": ("sdpa", "static"),
    "dense_growing_cache": ("sdpa", "growing"),
    "dense_grouped_heads": (GROUPED, "growing"),
    _PRODUCTS: (PRODUCTS, "static"),
    _LOOPS: (OWN, "growing"),
}
"""Dense decoding: attention implementation and cache by the name of the row that is not the fastest."""

# Of the largest output of the first layer's attention. All that follows amplifies rounding: in bfloat16 the logits of
# two fused kernels of torch, on a cache of made-up keys and values, are 0.2 apart after 30 layers.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}

Step = Prefill | Decoding


@dataclass(frozen=True)
class Cell:
    """What is timed against each other: one phase, context and batch."""

    phase: str
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.phase}, context {self.context}, batch {self.batch}"


@dataclass(frozen=True)
class Candidate:
    """One way through the model that is timed.

    Attributes:
        method: ``dense``, a plan's name, or what a dense variant is called.
        role: ``baseline``, ``ours``, ``rival`` or ``bound`` (attention that costs nothing).
        step: what is timed.
        kernel: attention kernels of one pass and how often they run, see :func:`entreg.sparse.recorded_kernels`, or the
            name of the backend; recorded uncompiled. ``math`` beside another kernel is the softmax of a selection.
        sparsity: realised, over all layers.
        cache: of decoding, one of :data:`~entreg.experiments.language.speed.steps.CACHES`.
        choosing: of a plan: its choice alone.
    """

    method: str
    role: str
    step: Step
    kernel: str
    sparsity: float
    cache: str | None = None
    choosing: Choosing | None = None


def candidates_of(
    model: nn.Module, cell: Cell, config: Mapping[str, Any], not_run: dict[str, str]
) -> Iterator[Candidate]:
    make_step = steps_of(model, cell, config)
    dense = list(dense_variants(model, cell, config, not_run))
    stock = with_attention(model, "sdpa")
    reference_step = make_step(stock, "growing")
    reference = reference_step()
    nothing_left_out = with_attention(model, "sdpa")
    sparsify(nothing_left_out, 0.0)
    found = make_step(nothing_left_out, "growing")()
    # Some kernels of CUDA add up in another order each time. Where stock SDPA repeats itself, nothing may differ.
    noise = (make_step(stock, "growing")() - reference).abs().max()
    if not (found - reference).abs().max() <= 4.0 * noise:
        raise RuntimeError(f"{cell}: the sparse path at sparsity 0 differs from stock SDPA")
    seen = seen_by_layers(stock, make_step(stock, "growing"))
    first = _first_attention(stock, make_step(stock, "growing"))
    for method, variant, cache in dense:
        step = make_step(variant, cache)
        deviation = (_first_attention(variant, step) - first).abs().max()
        if deviation > _TOLERANCES[config["dtype"]] * first.abs().max():
            raise RuntimeError(f"{cell}: the attention of '{method}' is not that of stock SDPA")
        _, kernel = _recorded(make_step(variant, cache))
        if method == "dense_flash_attention_2":
            kernel = "flash-attn"
        yield Candidate(
            method, "baseline", _compiled(variant, cache, make_step, config), kernel, 0.0, _cache(cell, cache)
        )
    for role, plans in (("ours", config["plans"]), ("rival", config["rivals"])):
        for method, values in plans.items():
            plan = sparsity_from_mapping(values)
            variant = with_attention(model, "sdpa")
            handle = sparsify(variant, plan, record=True)
            step = make_step(variant, "growing")
            if plan.backend == "gather":
                out, kernel = _recorded(step)
            else:
                # A recorder would keep the flexible kernel from being compiled.
                out, kernel = step(), plan.backend
            if not torch.isfinite(out).all():
                raise RuntimeError(f"{cell}: the output of plan '{method}' is not finite")
            sparsity = _realised(handle)
            handle.record, handle.selections = False, []
            compiled = _compiled(variant, "growing", make_step, config)
            yield Candidate(method, role, compiled, kernel, sparsity, _cache(cell, "growing"), Choosing(seen, plan))
    free = _compiled(with_attention(model, FREE), "growing", make_step, config)
    yield Candidate(FREE_METHOD, "bound", free, "none", 1.0, _cache(cell, "growing"))


def dense_variants(
    model: nn.Module, cell: Cell, config: Mapping[str, Any], not_run: dict[str, str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, model and kind of cache."""
    if cell.phase == "decode":
        sizes = DecoderSizes.of(model)
        for method, (attention, cache) in DENSE_DECODING.items():
            if attention == GROUPED and sizes.heads == sizes.key_heads:
                continue
            if attention == OWN and (config["device"] != "cpu" or config["dtype"] == "float16"):
                continue
            needed = sizes.weight_bytes + 2.2 * sizes.cache_bytes(cell.batch * cell.context)
            if cache == "dynamic" and needed > device_memory(next(model.parameters()).device):
                not_run[f"{method}, {cell}"] = "the copy of the cache that every step makes does not fit into memory"
                continue
            yield method, with_attention(model, attention), cache
        return
    yield "dense_fused", with_attention(model, "sdpa"), "dynamic"
    if cell.context <= config["eager_up_to"]:
        yield _EAGER, with_attention(model, "eager"), "dynamic"
    if config["device"] == "cpu" and config["dtype"] == "bfloat16":
        yield _OWN, with_attention(model, OWN), "dynamic"
    if config["device"] != "cuda":
        not_run["dense_flash_attention_2"] = "flash-attn is for CUDA"
    elif importlib.util.find_spec("flash_attn") is None:
        not_run["dense_flash_attention_2"] = "flash-attn is not installed; SDPA has a FlashAttention kernel of its own"
    elif config["dtype"] == "float32":
        not_run["dense_flash_attention_2"] = "flash-attn has no float32"
    else:
        yield "dense_flash_attention_2", with_attention(model, "flash_attention_2"), "dynamic"


def steps_of(model: nn.Module, cell: Cell, config: Mapping[str, Any]) -> Callable[[nn.Module, str], Step]:
    """How a step is made of a model and a kind of cache; all of a cell have the same inputs."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    if cell.phase == "prefill":
        ids = torch.randint(vocabulary, (cell.batch, cell.context), device=device)
        return lambda variant, _: Prefill(variant, ids)
    filled = FilledCache(model, cell.batch, cell.context)
    shape = (_TOKEN_SETS, cell.batch, config["tokens_per_call"])
    ids = torch.randint(vocabulary, shape, device=device)
    return lambda variant, kind: Decoding(variant, filled, kind, ids)


def with_attention(model: nn.Module, name: str) -> nn.Module:
    variant = shared_copy(model)
    variant.set_attn_implementation(name)
    return variant


def _compiled(
    variant: nn.Module, cache: str, make_step: Callable[[nn.Module, str], Step], config: Mapping[str, Any]
) -> Step:
    if config["compilation"] != "none":
        variant = torch.compile(variant, mode=config["compilation"])
    return make_step(variant, cache)


def _first_attention(model: nn.Module, step: Step) -> Tensor:
    """Output of the first layer's attention in the first pass of a call: the same input for all ways to attend."""
    outputs: list[Tensor] = []
    layer = next(module for module in model.modules() if getattr(module, "layer_idx", None) == 0)
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        step()
    finally:
        hook.remove()
    return outputs[0]


def _recorded(step: Step) -> tuple[Tensor, str]:
    """The output of a call, and its attention kernels per pass."""
    with recorded_kernels() as names:
        out = step()
    counts = Counter(names).items()
    return out, ", ".join(f"{count // step.tokens_per_call} {name}" for name, count in counts)


def _realised(handle: DecoderSparsifyHandle) -> float:
    """Of the last pass: mean over all layers, 0 where a layer is or ran dense."""
    return sum(one.plan.sparsity for one in handle.selections if one.plan is not None) / handle.depth


def _cache(cell: Cell, kind: str) -> str | None:
    return kind if cell.phase == "decode" else None


def device_memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
