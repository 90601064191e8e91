"""Attention and blocks of a timm ViT as the sparse path runs them: modules that share the stock ones' own parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entreg.adapters.handles import Selection, VisionSparsifyHandle
from entreg.errors import InputError
from entreg.sparse import (
    BlockSparsity,
    ColumnSparsity,
    dense_attention,
    make_block_plan,
    make_column_plan,
    sparse_attention,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_output(attention: nn.Module, x: Tensor, attend: Attend) -> Tensor:
    """What timm's ``Attention.forward`` computes, with ``attend(q, k, v)`` in place of its product.

    Args:
        attention: stock ``timm.layers.Attention``.
        x: (batch, n, c), normalised.
        attend: of (batch, heads, n, d) tensors.
    """
    if attention.training and attention.attn_drop.p > 0:
        raise InputError("the sparse path has no attention dropout; build the model with attn_drop_rate=0")
    gate = getattr(attention, "gate", None)
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    out = attend(attention.q_norm(q), attention.k_norm(k), v).transpose(1, 2).flatten(2)
    out = getattr(attention, "norm", nn.Identity())(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


class SparseAttention(nn.Module):
    """A stock attention module, sharing its submodules, that computes a plan's entries only.

    Args:
        attention: the stock module.
        layer: index from 0 of its block.
        plan: how keys or blocks are chosen.
        num_prefix: tokens that are always kept.
        handle: knows the layer's budget, and is told what was chosen.
        generator: of sampled queries.
    """

    def __init__(
        self,
        attention: nn.Module,
        layer: int,
        plan: ColumnSparsity | BlockSparsity,
        num_prefix: int,
        handle: VisionSparsifyHandle,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        # The stock module's own dictionaries: same parameters, same names.
        self.__dict__.update(attention.__dict__)
        # In a tuple it is no submodule, so that names in the state dictionary stay.
        self._stock = (attention,)
        self.settings, self.layer = plan, layer
        self.num_prefix, self.generator, self.handle = num_prefix, generator, handle

    def stock(self) -> nn.Module:
        """The stock module, with what was changed of this one since."""
        (attention,) = self._stock
        return taken_back(attention, self)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the stock module; a mask may only be a bias per key, (batch, 1, 1, n)."""
        if is_causal or (attn_mask is not None and attn_mask.shape[2] != 1):
            raise InputError("the sparse path of a ViT takes no attention mask; remove() it first")
        key_bias = None if attn_mask is None else attn_mask[:, 0, 0]
        return attention_output(self, x, lambda q, k, v: self.attend(q, k, v, key_bias))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        """(batch, heads, n, d) each, and a (batch, n) bias of the keys, to (batch, heads, n, d)."""
        settings, handle = self.settings, self.handle
        budget = handle.budgets[self.layer]
        if isinstance(settings, ColumnSparsity):
            plan = make_column_plan(
                q.detach(),
                k.detach(),
                budget,
                score=settings.score,
                num_prefix=self.num_prefix,
                num_sampled_queries=settings.num_sampled_queries,
                scale=self.scale,
                values=v,
                share_heads=settings.share_heads,
                generator=self.generator,
            )
        else:
            plan = make_block_plan(
                q.detach(),
                k.detach(),
                budget,
                num_prefix=self.num_prefix,
                scale=self.scale,
                block_size=settings.block_size,
                num_parts=settings.num_parts,
            )
        # Gradient checkpointing runs a layer twice.
        if handle.record and all(one.layer != self.layer or one.plan is None for one in handle.selections):
            kept = plan.keys
            if kept is not None:
                kept = handle.positions.unsqueeze(1).expand(-1, kept.shape[1], -1).gather(2, kept)
            handle.selections.append(Selection(self.layer, kept=kept, plan=plan))
        if handle.counting:
            handle.computed_entries[-1] = handle.computed_entries[-1] * plan.density
        return sparse_attention(q, k, v, plan, backend=settings.backend, scale=self.scale, key_bias=key_bias)


class RecordedPatchDropout(nn.Module):
    """Stock dropout of patches that knows afterwards which ones it left.

    Args:
        dropout: the stock ``timm.layers.PatchDropout``.
    """

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(dropout.__dict__)
        self._stock = (dropout,)
        self._tokens, self._kept = 0, None

    def stock(self) -> nn.Module:
        """The stock module, with what was changed of this one since."""
        (dropout,) = self._stock
        return taken_back(dropout, self)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, c) to (batch, m, c), as the stock module, with the same random numbers."""
        from timm.layers.patch_dropout import patch_dropout_forward

        left, kept = patch_dropout_forward(x, self.prob, self.num_prefix_tokens, self.ordered, self.training)
        self._tokens, self._kept = x.shape[1], kept
        return left

    def positions(self, x: Tensor) -> tuple[int, Tensor]:
        """Original number of tokens in the last pass, and the original position of each that was left, (batch, m).

        Args:
            x: (batch, m, c), the tokens that were left.
        """
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        if self._kept is None:
            return x.shape[1], positions
        prefix = self.num_prefix_tokens
        return self._tokens, torch.cat((positions[:, :prefix], self._kept + prefix), 1)


class BlockInParts(nn.Module):
    """A stock block, sharing its submodules and hooks, that can be looked into between attention and MLP.

    Args:
        block: the stock ``timm`` block; its attention may be a :class:`SparseAttention`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(block.__dict__)

    def forward(
        self, x: Tensor, key_bias: Tensor | None, between: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """What the stock block computes, with ``between`` called after attention.

        Args:
            x: (batch, n, c).
            key_bias: (batch, n) bias of the keys, or None.
            between: gets the tokens after attention, (batch, n, c), and the (batch, heads, n, d) queries and keys;
                returns the tokens that go on, (batch, m, c).
        """
        seen: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.extend((q, k))
            if isinstance(self.attn, SparseAttention):
                return self.attn.attend(q, k, v, key_bias)
            if self.attn.fused_attn:
                return dense_attention(q, k, v, scale=self.attn.scale, key_bias=key_bias)
            # An unfused model stays one.
            logits = (q * self.attn.scale) @ k.mT
            return (logits if key_bias is None else logits + key_bias[:, None, None]).softmax(-1) @ v

        x = x + self.drop_path1(self.ls1(attention_output(self.attn, self.norm1(x), attend)))
        x = between(x, *seen)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class BlockGuard:
    """Hook of the first block that lets it run for the sparse path only, once per :meth:`admit`.

    timm runs the blocks one by one, past the path, for masks, gradient checkpointing and intermediate features.
    """

    def __init__(self) -> None:
        self.admitted = False

    def admit(self) -> None:
        """The next run of the block is the path's own."""
        self.admitted = True

    def __call__(self, block: nn.Module, args: Any) -> None:
        if not self.admitted:
            raise InputError(
                "the sparse path runs the blocks of a ViT as a whole: with no attention mask, gradient checkpointing "
                "or intermediate features of timm's; do without them, or remove() the sparse path first"
            )
        self.admitted = False


class _PlainSizes(Tensor):
    """A tensor whose sizes are numbers while ``torch.jit.trace`` runs, which makes tensors of them."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(super().__torch_function__, function, types, args, kwargs or {})
        if function not in (Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.__len__):
            return call()
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)
        try:
            return call()
        finally:
            torch._C._set_tracing_state(state)


def with_plain_sizes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` while ``torch.jit.trace`` runs, with sizes that are numbers for whatever comes from x.

    What is traced holds for these sizes: another batch size ends in PyTorch's error about the shape.
    """
    sizes = [int(size) for size in x.shape]
    return function(x.view(sizes).as_subclass(_PlainSizes)).as_subclass(Tensor)


def taken_back(stock: nn.Module, ours: nn.Module) -> nn.Module:
    """A stock module, with whatever was set or replaced in the module that stood in for it."""
    vars(stock).update({name: value for name, value in vars(ours).items() if name in vars(stock)})
    return stock


def projected(block: nn.Module, x: Tensor, index: int) -> Tensor:
    """(batch, heads, rows, d): queries (0) or keys (1) of normalised tokens, without the other projections."""
    attention: Any = block.attn
    if isinstance(attention.qkv, nn.Linear) and type(attention.qkv).forward is nn.Linear.forward:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        y = F.linear(x, weight.chunk(3)[index], None if bias is None else bias.chunk(3)[index])
    else:
        # Something was put around it, whose weight may not be all that counts. Hooks must not see this pass.
        y = attention.qkv.forward(x).chunk(3, -1)[index]
    y = y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    return (attention.q_norm if index == 0 else attention.k_norm)(y)


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype that queries will have, which a bias must share."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
