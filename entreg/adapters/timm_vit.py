"""The sparse path and probes in stock timm Vision Transformers (ViT, DeiT, with registers or distilled).

Everything is done by swapping modules for ones that share the stock modules' parameters under the same names, so a
state dictionary does not change, and by hooks; both are undone by the handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters.budgets import Plan, resolve_budgets
from entreg.adapters.handles import Capture, ProbeHandle, VisionSparsifyHandle, watched_layers
from entreg.adapters.timm_blocks import SparseAttention
from entreg.adapters.timm_path import attach, attached, require_fit
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


def sparsify(
    model: nn.Module,
    sparsity: float | Sparsity,
    *,
    record: bool = False,
    gate: nn.ModuleDict | None = None,
    generator: torch.Generator | None = None,
) -> VisionSparsifyHandle:
    """Put the sparse path into a model.

    A second call replaces what the first one put in. The model may be changed meanwhile: after
    ``prune_intermediate_layers`` the path goes on in the blocks that are left, as far as the plan is possible in them;
    heads, pooling and image sizes may be others; a pass with replaced or further blocks raises an InputError. What
    :meth:`remove` gives back is the model with such changes. ``torch.jit.trace`` gives a model for images of the traced
    batch size. Where timm runs the blocks one by one (its own switch for gradient
    checkpointing, attention masks, ``forward_intermediates``), the pass raises an InputError: it would be dense; the
    path has a switch of its own, ``model.blocks.set_checkpointing``, which the training loop uses.

    Args:
        model: stock timm ViT, see the module.
        sparsity: a number in [0, 1): realised sparsity of the default plan, patch tokens dropped by half received,
            half prefix attention, before layer 1, or before layer 0 where a sparsity that large needs it; or a whole
            configuration. 0 leaves the stock logits.
        record: keep what was chosen in ``handle.selections``.
        gate: of an earlier handle, for plans with the score ``gate``; made anew without it.
        generator: CPU generator of sampled queries; without one, queries are always the same.

    Returns:
        The handle that lists what changed and undoes it.

    Raises:
        InputError: the model is not supported.
        ConfigError: the plan does not fit the model; a sparsity that cannot be reached, unless the model takes images
            of any size, whose number of tokens only the forward pass knows: then that raises.
    """
    _require_supported(model)
    plans = _plans(model, sparsity)
    gate = _gate(model, plans, gate)
    earlier = attached(model)
    if earlier is not None:
        earlier.remove()
    handle = VisionSparsifyHandle(model, gate, record)
    attach(handle, plans, generator)
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
    chosen = watched_layers(layers, len(model.blocks))
    hooks: list[Any] = []

    def undo(_: nn.Module) -> None:
        for hook in hooks:
            hook.remove()

    handle = ProbeHandle(model, [f"blocks.{layer}" for layer in chosen], undo)
    open_captures: dict[int, Capture] = {}
    watched = {layer: model.blocks[layer].attn.qkv for layer in chosen}

    # A copy of the model has copies of the hooks, which still lead here: they must not report.
    def begin(module: nn.Module, args: Any) -> None:
        if module is model.patch_embed:
            handle.captures = []
            open_captures.clear()
            for layer, projection in watched.items():
                # What the model has no more is not missed.
                if layer < len(model.blocks) and model.blocks[layer].attn.qkv is not projection:
                    raise InputError(
                        f"attention of block {layer} was replaced after probe(): remove() it, then call probe() again"
                    )

    def saw_projection(layer: int, attention: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if module is not attention.qkv:
                return
            capture = Capture(layer, model.num_prefix_tokens, attention.scale, attention, qkv=output)
            open_captures[layer] = capture
            handle.captures.append(capture)

        return hook

    def saw_block(layer: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # The sparse path may run the block through a module that shares its parts.
            if module._modules is block._modules and layer in open_captures:
                open_captures[layer].tokens = output

        return hook

    hooks.append(model.patch_embed.register_forward_pre_hook(begin))
    for layer in chosen:
        block = model.blocks[layer]
        hooks.append(block.attn.qkv.register_forward_hook(saw_projection(layer, block.attn)))
        hooks.append(block.register_forward_hook(saw_block(layer, block)))
    return handle


def _require_supported(model: nn.Module) -> None:
    try:
        from timm.layers import Attention
        from timm.models.vision_transformer import Block, VisionTransformer
    except ModuleNotFoundError as error:
        raise ConfigError("the ViT adapter needs timm: install entreg[vision]") from error
    fits = isinstance(model, VisionTransformer) and isinstance(model.blocks, nn.Sequential) and len(model.blocks) > 0
    what = type(model).__name__
    if fits:
        others = [block for block in model.blocks if not isinstance(block, Block)] or [
            block.attn for block in model.blocks if not isinstance(block.attn, Attention | SparseAttention)
        ]
        if not others:
            return
        what += f" with {type(others[0]).__name__}"
    raise InputError(f"{what} is not supported: nothing was changed; supported are {_SUPPORTED}")


def _plans(model: nn.Module, sparsity: float | Sparsity) -> list[Plan]:
    """The single plans, as far as can be told possible for the model."""
    if isinstance(sparsity, Combined):
        plans = list(sparsity.parts)
    elif isinstance(sparsity, ColumnSparsity | BlockSparsity | TokenSparsity | TokenMerging):
        plans = [sparsity]
    elif isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be a number in [0, 1) or a plan of entreg.sparse, got {sparsity!r}")
    else:
        try:
            return _plans(model, TokenSparsity(sparsity=float(sparsity), before_layer=1))
        except ConfigError:
            return _plans(model, TokenSparsity(sparsity=float(sparsity), before_layer=0))
    require_fit(model, plans)
    tokens = _num_tokens(model)
    if tokens is not None:
        prefix, depth = model.num_prefix_tokens, len(model.blocks)
        resolve_budgets(plans, num_tokens=tokens, num_prefix=prefix, depth=depth)
    return plans


def _num_tokens(model: nn.Module) -> int | None:
    """Tokens that the blocks see, prefix included; None where that depends on the image."""
    patches = getattr(model.patch_embed, "num_patches", None)
    if patches is None or getattr(model, "dynamic_img_size", False):
        return None
    return patches + model.num_prefix_tokens


def _gate(model: nn.Module, plans: Sequence[Plan], given: nn.ModuleDict | None) -> nn.ModuleDict | None:
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
