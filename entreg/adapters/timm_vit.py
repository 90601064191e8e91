"""The sparse path and probes in stock timm Vision Transformers (ViT, DeiT, with registers or distilled).

Everything is done by swapping modules for ones that share the stock modules' parameters under the same names, so a
state dictionary does not change, and by hooks; both are undone by the handle.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters.handles import Capture, ProbeHandle, SparsifyHandle
from entreg.adapters.timm_blocks import SparseAttention, SparseBlocks
from entreg.compat import ensure_torchvision
from entreg.errors import ConfigError, InputError
from entreg.sparse import (
    BlockSparsity,
    ColumnSparsity,
    Combined,
    Sparsity,
    TokenMerging,
    TokenSparsity,
)

_SUPPORTED = "timm's VisionTransformer and VisionTransformerDistilled (vit_*, deit_*) with stock blocks"

# One handle per model: a second call replaces the first one's setting.
_handles: weakref.WeakKeyDictionary[nn.Module, SparsifyHandle] = weakref.WeakKeyDictionary()


def sparsify(
    model: nn.Module,
    sparsity: float | Sparsity,
    *,
    record: bool = False,
    gate: nn.ModuleDict | None = None,
    generator: torch.Generator | None = None,
) -> SparsifyHandle:
    """Put the sparse path into a model.

    A second call replaces what the first one put in. Not for models that checkpoint gradients through timm's own
    switch, which runs the blocks one by one: the forward pass then raises.

    Args:
        model: stock timm ViT, see the module.
        sparsity: a number in [0, 1): realised sparsity of the default plan, patch tokens dropped before the second
            layer by half received, half prefix attention; or a whole configuration. 0 leaves the stock logits.
        record: keep what was chosen in ``handle.selections``.
        gate: of an earlier handle, for plans with the score ``gate``; made anew without it.
        generator: CPU generator of sampled queries and random scores; without one, queries are always the same.

    Returns:
        The handle that lists what changed and undoes it.

    Raises:
        InputError: the model is not supported.
        ConfigError: the plan does not fit the model.
    """
    _require_supported(model)
    plans = _plans(sparsity)
    _require_fit(model, plans)
    if model in _handles:
        _handles[model].remove()
    prefix = model.num_prefix_tokens
    blocks = model.blocks
    changed = ["blocks"]
    originals: dict[int, nn.Module] = {}

    def undo() -> None:
        # Children are shared; the swapped containers' own flags are not.
        blocks.training = model.blocks.training
        for layer, attention in originals.items():
            attention.training = blocks[layer].attn.training
            blocks[layer].attn = attention
        model.blocks = blocks
        hook.remove()
        _handles.pop(model, None)

    handle = SparsifyHandle(model, changed, undo, _gate(model, plans, gate), record)
    attention_plans = [plan for plan in plans if isinstance(plan, ColumnSparsity | BlockSparsity)]
    for plan in attention_plans:
        layers = range(len(blocks)) if plan.layers is None else plan.layers
        density = None if plan.sparsity is None else _layer_density(plan, len(blocks), len(layers))
        for layer in layers:
            originals[layer] = blocks[layer].attn
            swapped = SparseAttention(originals[layer], layer, plan, density, prefix, handle, generator)
            blocks[layer].attn = swapped
            changed.append(f"blocks.{layer}.attn")
    token_plans = [plan for plan in plans if isinstance(plan, TokenSparsity | TokenMerging)]
    model.blocks = SparseBlocks(blocks, token_plans, prefix, handle, generator)
    hook = model.register_forward_pre_hook(_refuse_block_by_block, with_kwargs=True)
    _handles[model] = handle
    return handle


def probe(model: nn.Module, layers: Sequence[int] | None = None) -> ProbeHandle:
    """Watch queries, keys, values and outputs of a model's blocks.

    Works together with :func:`sparsify`, in either order; what is seen then are the tokens that are left. A new
    forward pass forgets the captures before.

    Args:
        model: stock timm ViT, see the module.
        layers: indices from 0; None for all.

    Returns:
        The handle with the captures.

    Raises:
        InputError: the model is not supported, or has no such layer.
    """
    _require_supported(model)
    depth = len(model.blocks)
    chosen = list(range(depth)) if layers is None else sorted(set(layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise InputError(f"layers must be indices of the model's {depth} blocks, got {list(layers)}")
    hooks: list[Any] = []

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    handle = ProbeHandle(model, [f"blocks.{layer}" for layer in chosen], undo)
    open_captures: dict[int, Capture] = {}

    def begin(module: nn.Module, args: Any) -> None:
        handle.captures = []
        open_captures.clear()

    def saw_projection(layer: int, attention: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            capture = Capture(layer, model.num_prefix_tokens, attention.scale, attention, qkv=output)
            open_captures[layer] = capture
            handle.captures.append(capture)

        return hook

    def saw_block(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if layer in open_captures:
                open_captures[layer].tokens = output

        return hook

    hooks.append(model.register_forward_pre_hook(begin))
    for layer in chosen:
        block = model.blocks[layer]
        hooks.append(block.attn.qkv.register_forward_hook(saw_projection(layer, block.attn)))
        hooks.append(block.register_forward_hook(saw_block(layer)))
    return handle


def _refuse_block_by_block(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """timm runs the blocks one by one for masks and gradient checkpointing, past the sparse path: never silently."""
    if getattr(model, "grad_checkpointing", False) and not torch.jit.is_scripting():
        raise InputError(
            "timm's gradient checkpointing would run past the sparse path; set_grad_checkpointing(False), or remove() "
            "the sparse path first"
        )
    if len(args) > 1 or kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
        raise InputError("the sparse path of a ViT takes no attention mask; remove() it first")


def _require_supported(model: nn.Module) -> None:
    ensure_torchvision()
    try:
        from timm.layers import Attention
        from timm.models.vision_transformer import Block, VisionTransformer
    except ModuleNotFoundError as error:
        raise ConfigError("the ViT adapter needs timm: install entreg[vision]") from error
    fits = isinstance(model, VisionTransformer) and isinstance(model.blocks, nn.Sequential) and len(model.blocks) > 0
    stock = fits and all(
        isinstance(block, Block) and isinstance(block.attn, Attention | SparseAttention) for block in model.blocks
    )
    if not stock:
        raise InputError(f"{type(model).__name__} is not supported: nothing was changed; supported are {_SUPPORTED}")


def _plans(sparsity: float | Sparsity) -> list[Any]:
    if isinstance(sparsity, Combined):
        return list(sparsity.parts)
    if isinstance(sparsity, ColumnSparsity | BlockSparsity | TokenSparsity | TokenMerging):
        return [sparsity]
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be a number in [0, 1) or a plan of entreg.sparse, got {sparsity!r}")
    return [TokenSparsity(sparsity=float(sparsity))]


def _require_fit(model: nn.Module, plans: Sequence[Any]) -> None:
    depth = len(model.blocks)
    if sum(isinstance(plan, TokenMerging) for plan in plans) > 1:
        raise ConfigError("token merging can be given once only")
    seen: set[int] = set()
    for plan in plans:
        if isinstance(plan, TokenSparsity):
            if plan.before_layer >= depth:
                raise ConfigError(
                    f"before_layer must be in [0, {depth - 1}] for a model of {depth} layers, got {plan.before_layer}"
                )
            if plan.entropy_budget is not None and model.global_pool not in ("token", ""):
                raise ConfigError("budgets per image need a model that answers with its class token, not an average")
            if plan.score == "prefix" and model.num_prefix_tokens == 0:
                raise ConfigError("the score 'prefix' needs a class token; use 'received'")
        elif isinstance(plan, TokenMerging):
            if isinstance(plan.r, tuple) and len(plan.r) != depth:
                raise ConfigError(f"r must be one number or one for each of {depth} layers, got {len(plan.r)}")
        else:
            layers = set(range(depth)) if plan.layers is None else set(plan.layers)
            if layers and max(layers) >= depth:
                raise ConfigError(f"layers must be below {depth}, the number of blocks, got {max(layers)}")
            if layers & seen:
                raise ConfigError(f"layer {min(layers & seen)} has two attention plans; give it one")
            seen |= layers


def _layer_density(plan: ColumnSparsity | BlockSparsity, depth: int, layers: int) -> float:
    density = 1.0 - plan.sparsity * depth / layers
    if density <= 0:
        raise ConfigError(
            f"sparsity {plan.sparsity} cannot be reached in {layers} of {depth} layers; the largest possible is below "
            f"{layers / depth:.4g}"
        )
    return density


def _gate(model: nn.Module, plans: Sequence[Any], given: nn.ModuleDict | None) -> nn.ModuleDict | None:
    layers = [str(plan.before_layer) for plan in plans if isinstance(plan, TokenSparsity) and plan.score == "gate"]
    if not layers:
        return None
    if given is not None:
        missing = [layer for layer in layers if layer not in given]
        if missing:
            raise ConfigError(f"the gate has no part for layer {missing[0]}, only for {', '.join(given)}")
        return given
    gate = nn.ModuleDict()
    weight = next(model.parameters())
    for layer in layers:
        linear = nn.Linear(model.embed_dim, 1, device=weight.device, dtype=weight.dtype)
        # Open at first: the gated model starts as the stock model, nearly.
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, 3.0)
        gate[layer] = linear
    return gate
