"""A forward pass through the blocks of a timm ViT on the sparse path, with an explicit state per pass."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from entreg.adapters.budgets import Budgets, Plan, resolve_budgets
from entreg.adapters.handles import Selection, VisionSparsifyHandle
from entreg.adapters.timm_blocks import (
    BlockGuard,
    BlockInParts,
    RecordedPatchDropout,
    SparseAttention,
    attention_dtype,
    projected,
    taken_back,
    with_plain_sizes,
)
from entreg.errors import ConfigError, InputError
from entreg.sparse import (
    BlockSparsity,
    ColumnSparsity,
    TokenMerging,
    TokenReduction,
    TokenSparsity,
    bipartite_merge,
    bucket_by_budget,
    entropy_budget,
)
from entreg.sparse.registries import REDUCTIONS, SCORES
from entreg.sparse.scores import ScoreInputs, ScoreSizes, score_of
from entreg.sparse.tokens.plans import ReductionInputs

_CHANGED = (
    "blocks of the model were replaced, or others put beside them, after sparsify(), and the sparse path does not know "
    "them: remove() it, then call sparsify() again"
)

# Groups in which images with budgets of their own are run.
_BUCKETS = 4


@dataclass
class _State:
    """What one forward pass knows beside the tokens.

    Attributes:
        tokens: original number of tokens, those that the model dropped by itself included.
        keep: patch tokens that each plan in turn keeps; None where every image decides.
        positions: (batch, m) original position of each token, kept while recording.
        sizes: (batch, m) how many tokens each stands for; None while every one stands for itself.
        biased: whether sizes bias the attention.
        valid: (batch, m) bool, False for padding.
        keys, queries: of the block before, (batch, heads, m, d), where a plan asks for them.
    """

    tokens: int
    keep: tuple[int | None, ...]
    positions: Tensor | None = None
    sizes: Tensor | None = None
    biased: bool = False
    valid: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None

    def key_bias(self) -> Tensor | None:
        if self.biased and self.sizes is not None:
            return self.sizes.log()
        if self.valid is not None:
            return torch.zeros(self.valid.shape, device=self.valid.device).masked_fill(~self.valid, -torch.inf)
        return None

    def of(self, images: Tensor) -> _State:
        """The state of some of the images."""
        chosen = {
            name: None if value is None else value[images]
            for name, value in vars(self).items()
            if name not in ("tokens", "keep", "biased")
        }
        return _State(self.tokens, self.keep, biased=self.biased, **chosen)


class SparseBlocks(nn.Sequential):
    """The stock blocks under their own names, with tokens reduced between them.

    Args:
        blocks: the stock container, whose attention modules are already those of the path.
        plans: all single plans, in order of application.
        num_prefix: tokens that always stay.
        handle: told what was chosen.
        generator: of sampled queries.

    Attributes:
        checkpointing: whether the blocks are computed again in the backward pass, see :meth:`set_checkpointing`.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        plans: Sequence[Plan],
        num_prefix: int,
        handle: VisionSparsifyHandle,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.__dict__.update(blocks.__dict__)
        # In a tuple it is no submodule, so that names in the state dictionary stay.
        self._stock = (blocks,)
        self.plans = tuple(plans)
        self.reductions = [plan for plan in plans if isinstance(plan, TokenSparsity)]
        self.merging = next((plan for plan in plans if isinstance(plan, TokenMerging)), None)
        self.num_prefix, self.generator, self.handle = num_prefix, generator, handle
        self.checkpointing = False
        self._budgets: dict[tuple[int, str], Budgets] = {}
        self._made_for = tuple((block, block.attn) for block in self)
        read = {plan.before_layer - 1 for plan in self.reductions if plan.score_source == "previous"}
        in_parts = range(len(self)) if self.merging is not None else sorted(read)
        self._in_parts = {layer: BlockInParts(self[layer]) for layer in in_parts}
        self._guard = BlockGuard()
        self._hooks = [
            self[0].register_forward_pre_hook(self._guard),
            handle.model.patch_embed.register_forward_pre_hook(PassGuard(handle)),
        ]

    def restore(self, model: nn.Module) -> None:
        """Give the model its stock modules back, with what was changed of them since; this one is of no use any more.

        Blocks that the model has no more are stock ones again as well; blocks that it got since stay as they are.
        """
        for block, attention in self._made_for:
            if isinstance(attention, SparseAttention) and block.attn is attention:
                block.attn = attention.stock()
        for hook in self._hooks:
            hook.remove()
        if isinstance(model.patch_drop, RecordedPatchDropout):
            model.patch_drop = model.patch_drop.stock()
        if isinstance(model.blocks, SparseBlocks):
            (blocks,) = self._stock
            model.blocks = taken_back(blocks, model.blocks)

    def budgets(self, num_tokens: int) -> Budgets:
        """What the plans leave of a model's number of tokens, see :func:`resolve_budgets`.

        Raises:
            ConfigError: the plans do not fit the model, as it is now, or the number of tokens.
        """
        model = self.handle.model
        # Pooling may have changed since.
        key = num_tokens, model.global_pool
        if key not in self._budgets:
            require_fit(model, self.plans)
            self._budgets[key] = resolve_budgets(
                self.plans, num_tokens=num_tokens, num_prefix=self.num_prefix, depth=len(self)
            )
        return self._budgets[key]

    def set_checkpointing(self, wanted: bool) -> None:
        """Compute the blocks again in the backward pass of training, instead of keeping what they computed.

        What is chosen between the blocks is kept. A block that is looked into (the one before a reduction by the
        attention before it) is kept as well.

        Raises:
            ConfigError: the path merges tokens inside all blocks, or draws from a generator, so that the second time
                would choose otherwise.
        """
        if wanted and (self.merging is not None or self.generator is not None):
            raise ConfigError("gradient checkpointing is not possible with token merging, nor with a generator")
        self.checkpointing = wanted

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A block; the first ones as the path through them; or others in a plain container, which is no path."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        chosen = list(self._modules.items())[index]
        if not chosen or chosen != list(self._modules.items())[: len(chosen)]:
            return nn.Sequential(OrderedDict(chosen))
        first = copy.copy(self)
        first._modules = OrderedDict(chosen)
        first._budgets = {}
        return first

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, c) to (batch, m, c).

        Raises:
            InputError: the blocks are not those that the path was made for; or ``torch.jit.trace`` runs them, and what
                the plans choose cannot be traced.
            ConfigError: see :meth:`budgets`.
        """
        self._require_unchanged()
        handle = self.handle
        if torch.jit.is_tracing():
            # What leaves nothing out is traced for any number of images.
            if self._is_dense(int(x.shape[1])):
                return self._pass(x)
            self._require_traceable()
            return with_plain_sizes(self._pass, x)
        if len(x) > 0:
            return self._pass(x)
        # How many tokens of no image are left is seen on one.
        left = self._pass(torch.cat((x, x.new_zeros(1, *x.shape[1:]))))[:0]
        handle.selections, handle.gates = [], [gate[:0] for gate in handle.gates]
        return left

    def _is_dense(self, tokens: int) -> bool:
        patches = tokens - self.num_prefix
        return len(self.plans) == len(self.reductions) and all(
            plan.score != "gate" and keep is not None and keep >= patches
            for plan, keep in zip(self.reductions, self.budgets(tokens).keep, strict=True)
        )

    def _pass(self, x: Tensor) -> Tensor:
        # A number even while torch.jit.trace runs.
        tokens = int(x.shape[1])
        budgets = self.budgets(tokens)
        handle = self.handle
        handle.begin(budgets.attention)
        state = _State(tokens, budgets.keep)
        if handle.record:
            dropout = handle.model.patch_drop
            if isinstance(dropout, RecordedPatchDropout):
                state.tokens, state.positions = dropout.positions(x)
            else:
                state.positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return self._run(x, 0, state)

    def _require_unchanged(self) -> None:
        for layer, block in enumerate(self):
            made_for, attention = self._made_for[layer] if layer < len(self._made_for) else (None, None)
            # A wrapper of the block will do where the block is run as a whole.
            same = block is made_for or (layer not in self._in_parts and getattr(block, "attn", None) is attention)
            if not same or made_for.attn is not attention:
                raise InputError(_CHANGED)

    def _require_traceable(self) -> None:
        for plan in self.plans:
            what = None
            if isinstance(plan, BlockSparsity) or (isinstance(plan, ColumnSparsity) and plan.backend != "gather"):
                what = "block plans, nor column plans of another backend than 'gather'"
            elif isinstance(plan, TokenSparsity) and plan.entropy_budget is not None:
                what = "budgets that every image has for itself"
            elif isinstance(plan, TokenSparsity) and plan.score == "gate":
                what = "a learned gate, which is no part of the model"
            elif self.generator is not None:
                what = "what a generator draws"
            if what is not None:
                raise InputError(f"torch.jit.trace cannot follow {what}; remove() the sparse path first")

    def _run(self, x: Tensor, first: int, state: _State) -> Tensor:
        for layer in range(first, len(self)):
            for plan, keep in zip(self.reductions, state.keep, strict=True):
                if plan.before_layer == layer:
                    x, budgets = self._reduce(x, layer, plan, keep, state)
                    if budgets is not None:
                        return self._run_buckets(x, layer, state, budgets)
            x = self._block(x, layer, state)
        return x

    def _run_buckets(self, x: Tensor, layer: int, state: _State, budgets: Tensor) -> Tensor:
        """The layers from here on for images of different budgets, similar ones together, without reducing again."""
        parts = []
        groups = bucket_by_budget(budgets, _BUCKETS)
        for group in groups:
            longest = int(budgets[group].max()) + self.num_prefix
            own = state.of(group)
            # Padding is at the end: a group of small budgets is cut, not masked.
            for name in ("positions", "sizes", "valid"):
                value = getattr(own, name)
                setattr(own, name, None if value is None else value[:, :longest])
            y = x[group][:, :longest]
            for index in range(layer, len(self)):
                y = self._block(y, index, own, weight=len(group) / len(x))
            parts.append(F.pad(y, (0, 0, 0, x.shape[1] - longest)))
        order = torch.cat(groups).argsort()
        return torch.cat(parts)[order]

    def _block(self, x: Tensor, layer: int, state: _State, weight: float = 1.0) -> Tensor:
        if self.handle.counting:
            self._count((x.shape[1] / state.tokens) ** 2 * weight)
        bias = state.key_bias()
        if bias is not None:
            bias = bias.to(attention_dtype(x))
        mask = None if bias is None else bias[:, None, None]
        self.handle.positions = state.positions
        if layer not in self._in_parts:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                return checkpoint(self._whole_block, x, layer, mask, use_reentrant=False)
            return self._whole_block(x, layer, mask)
        if layer == 0:
            self._guard.admit()

        def between(x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
            state.queries, state.keys = queries, keys
            return x if self.merging is None else self._merge(x, layer, self.merging, state)

        return self._in_parts[layer](x, bias, between)

    def _whole_block(self, x: Tensor, layer: int, mask: Tensor | None) -> Tensor:
        if layer == 0:
            self._guard.admit()
        return self[layer](x) if mask is None else self[layer](x, attn_mask=mask)

    def _merge(self, x: Tensor, layer: int, plan: TokenMerging, state: _State) -> Tensor:
        r = plan.r if isinstance(plan.r, int) else plan.r[layer]
        x, reduction = bipartite_merge(x, state.keys.mean(1), r, num_prefix=self.num_prefix, sizes=state.sizes)
        self._adopt(reduction, layer, state, biased=plan.proportional_attention)
        return x

    def _reduce(
        self, x: Tensor, layer: int, plan: TokenSparsity, keep: int | Tensor | None, state: _State
    ) -> tuple[Tensor, Tensor | None]:
        """Fewer tokens by one plan; and the budgets of the images if they differ."""
        n, p = x.shape[1], self.num_prefix
        patches = n - p
        if isinstance(keep, int) and keep >= patches and plan.score != "gate":
            return x, None
        handle = self.handle
        inputs, way = self._score_inputs(x, layer, plan, state), REDUCTIONS[plan.reduction]
        keys = inputs.keys if way.uses_keys else None
        scores = score_of(plan.score, inputs).mean(1)
        if plan.score == "gate":
            gate = scores[:, p:]
            handle.gates.append(gate)
            x = torch.cat((x[:, :p], x[:, p:] * gate.unsqueeze(-1).to(x.dtype)), 1)
        if handle.counting:
            self._count(SCORES[plan.score].entries(inputs.sizes) / state.tokens**2)
        if plan.entropy_budget is not None:
            keep = entropy_budget(scores, plan.entropy_budget, num_prefix=p)
        budgets = keep if isinstance(keep, Tensor) else None
        keep = keep if budgets is not None else min(keep, patches)
        reduced, reduction = way.reduce(ReductionInputs(x, scores, keep, p, state.sizes, keys, plan))
        weighted = way.weighted and plan.proportional_attention
        self._adopt(reduction, layer, state, biased=weighted)
        return reduced, budgets

    def _adopt(self, reduction: TokenReduction, layer: int, state: _State, *, biased: bool) -> None:
        """Carry the state over to the reduced tokens, and report."""
        state.sizes, state.biased, state.valid = reduction.sizes, biased or state.biased, reduction.valid
        handle = self.handle
        if not handle.record:
            return
        kept = state.positions.gather(1, reduction.kept.clamp_min(0)).masked_fill(reduction.kept < 0, -1)
        scores = None
        if reduction.scores is not None:
            empty = reduction.scores.new_zeros(len(kept), state.tokens)
            scores = empty.scatter(1, state.positions.clamp_min(0), reduction.scores)
        handle.selections.append(Selection(layer, kept=kept, scores=scores, assignment=reduction.assignment))
        state.positions = kept

    def _score_inputs(self, x: Tensor, layer: int, plan: TokenSparsity, state: _State) -> ScoreInputs:
        """What the score of a plan may look at: queries and keys of the layer before, or of this one on demand."""
        block, previous = self[layer], plan.score_source == "previous"
        return ScoreInputs(
            ScoreSizes(x.shape[1], x.shape[1], self.num_prefix, plan.num_sampled_queries),
            queries=state.queries if previous else lambda rows: projected(block, block.norm1(x[:, rows]), 0),
            make_keys=lambda: state.keys if previous else projected(block, block.norm1(x), 1),
            scale=block.attn.scale,
            features=x,
            gate=self.handle.gate[str(layer)] if plan.score == "gate" else None,
            generator=self.generator,
            device=x.device,
        )

    def _count(self, entries: float) -> None:
        """Adds computed score entries, in units of one dense layer."""
        self.handle.computed_entries.append(entries)


class PassGuard:
    """Hook of the patch embedding, with which every pass begins: the model must still have the path.

    Args:
        handle: of the path.
    """

    def __init__(self, handle: VisionSparsifyHandle) -> None:
        self.handle = handle

    def __call__(self, embedding: nn.Module, args: Any) -> None:
        blocks = self.handle.model.blocks
        if not isinstance(blocks, SparseBlocks) or blocks.handle is not self.handle:
            raise InputError(_CHANGED)


def attach(handle: VisionSparsifyHandle, plans: Sequence[Plan], generator: torch.Generator | None) -> None:
    """Put the path into a stock model.

    Args:
        handle: of the model; it learns what changed.
        plans: single plans that fit the model.
        generator: of sampled queries.
    """
    model = handle.model
    prefix, blocks = model.num_prefix_tokens, model.blocks
    handle.changed.append("blocks")
    for plan in plans:
        if not isinstance(plan, ColumnSparsity | BlockSparsity):
            continue
        for layer in range(len(blocks)) if plan.layers is None else plan.layers:
            blocks[layer].attn = SparseAttention(blocks[layer].attn, layer, plan, prefix, handle, generator)
            handle.changed.append(f"blocks.{layer}.attn")
    if not isinstance(model.patch_drop, nn.Identity):
        model.patch_drop = RecordedPatchDropout(model.patch_drop)
        handle.changed.append("patch_drop")
    model.blocks = handle.path = SparseBlocks(blocks, plans, prefix, handle, generator)


def attached(model: nn.Module) -> VisionSparsifyHandle | None:
    """The handle of the path that is in a model, or of what is left of it; None if there is none."""
    for hook in model.patch_embed._forward_pre_hooks.values():
        if isinstance(hook, PassGuard):
            return hook.handle
    return None


def require_fit(model: nn.Module, plans: Sequence[Plan]) -> None:
    """Make sure that plans can be carried out in a model as it is.

    Args:
        model: timm ViT.
        plans: single plans.

    Raises:
        ConfigError: they do not fit the model or each other.
    """
    depth = len(model.blocks)
    if len(plans) > 1 and any(isinstance(plan, TokenSparsity) and plan.entropy_budget is not None for plan in plans):
        raise ConfigError("a plan with an entropy_budget cannot be combined with another plan")
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
            if SCORES[plan.score].needs_prefix and model.num_prefix_tokens == 0:
                raise ConfigError(f"the score '{plan.score}' needs a class token; use 'received'")
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
