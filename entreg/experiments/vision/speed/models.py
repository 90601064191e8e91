"""Models and parts of models whose time is measured: copies that share weights, attention alone, blocks alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters import vision_model
from entreg.adapters.timm_blocks import attention_output
from entreg.errors import ConfigError
from entreg.experiments.measuring import shared_copy
from entreg.names import require_choice
from entreg.sparse import SparsityPlan, sparse_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Step = Callable[[], object]


def speed_model(name: str, options: Mapping[str, Any], dtype: str, device: torch.device) -> nn.Module:
    """A timm vision transformer with random weights in evaluation mode; weights do not matter for speed.

    Raises:
        ConfigError: an unknown dtype, or a model that timm does not have.
    """
    require_choice("dtype", dtype, DTYPES)
    model = vision_model(name, **options)
    return model.to(device, DTYPES[dtype]).eval()


def set_fused_attention(model: nn.Module, fused: bool) -> nn.Module:
    """Choose between torch's scaled dot product attention and explicit products in every attention of a timm model.

    Raises:
        ConfigError: the model has no attention with such a switch.
    """
    switches = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not switches:
        raise ConfigError(f"{type(model).__name__} has no attention with a switch between fused and unfused")
    for module in switches:
        module.fused_attn = fused
    return model


@dataclass(frozen=True)
class Geometry:
    """Sizes of a timm vision transformer.

    Attributes:
        tokens: all tokens of an image, prefix tokens included.
        prefix: class and register tokens.
        dim: width.
        heads: attention heads per layer.
        depth: layers.
        image: channels, height and width.
    """

    tokens: int
    prefix: int
    dim: int
    heads: int
    depth: int
    image: tuple[int, int, int]

    @staticmethod
    def of(model: nn.Module) -> Geometry:
        """The sizes of a model."""
        embedding, blocks = model.patch_embed, model.blocks
        return Geometry(
            tokens=embedding.num_patches + model.num_prefix_tokens,
            prefix=model.num_prefix_tokens,
            dim=model.embed_dim,
            heads=blocks[0].attn.num_heads,
            depth=len(blocks),
            image=(embedding.proj.in_channels, *embedding.img_size),
        )

    def images(self, batch: int, like: nn.Module) -> Tensor:
        """A batch of standard normal images."""
        parameter = next(like.parameters())
        return torch.randn(batch, *self.image, dtype=parameter.dtype, device=parameter.device)


def without_attention(model: nn.Module) -> nn.Module:
    """The model with values in place of attention's products and softmaxes: what a pattern cannot save.

    Taken out of the model, because attention alone in a loop would find its inputs in the cache.
    """
    free = shared_copy(model)
    for block in free.blocks:
        block.attn = _Attention(block.attn, lambda q, k, v: v)
    return free


def without_blocks(model: nn.Module) -> nn.Module:
    """Everything but the blocks (patches, position, last norm, head): what no sparse path touches."""
    rest = shared_copy(model)
    rest.blocks = nn.Identity()
    return rest


@contextmanager
def counted_tokens(model: nn.Module) -> Iterator[list[int]]:
    """Collect how many tokens the MLP of each layer sees, counted there."""
    counts: list[int] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[-2]))
        for block in model.blocks
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class _Attention(nn.Module):
    """timm's attention with another function in place of its products."""

    def __init__(self, attention: nn.Module, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.attend = attend

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return attention_output(self.attention, x, self.attend)


def give_columns(model: nn.Module, batch: int, sparsity: float, backend: str) -> float:
    """Make every layer attend to random columns that cost nothing to choose: the most that columns can bring.

    Args:
        model: a stock timm vision transformer; changed in place.
        batch: images per batch.
        sparsity: of the score entries, in [0, 1).
        backend: see :func:`entreg.sparse.sparse_attention`.

    Returns:
        The realised sparsity.
    """
    sizes = Geometry.of(model)
    device = next(model.parameters()).device
    count = max(sizes.prefix, 1, math.floor((1.0 - sparsity) * sizes.tokens))
    for block in model.blocks:
        scores = torch.rand(batch, sizes.heads, sizes.tokens, device=device)
        scores[..., : sizes.prefix] = 2.0
        keys = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        plan = SparsityPlan("columns", sizes.tokens, sizes.tokens, sizes.heads, keys=keys)
        block.attn = _Attention(block.attn, functools.partial(sparse_attention, plan=plan, backend=backend))
    return 1.0 - count / sizes.tokens
