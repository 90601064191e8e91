"""The blocks of a timm ViT with the sparse path inside: the stock modules, run with an explicit state per call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entreg.adapters.handles import Selection, SparsifyHandle
from entreg.errors import InputError
from entreg.sparse import (
    BlockSparsity,
    ColumnSparsity,
    TokenMerging,
    TokenReduction,
    TokenSparsity,
    bipartite_merge,
    bucket_by_budget,
    dense_attention,
    drop_tokens,
    entropy_budget,
    fuse_tokens,
    keep_for_sparsity,
    make_plan,
    merge_tokens,
    partition_tokens,
    score_entries,
    selection_scores,
    sparse_attention,
)
from entreg.sparse.scores import sampled_positions

# Groups in which images with budgets of their own are run.
_BUCKETS = 4

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
    batch, n, _ = x.shape
    gate = getattr(attention, "gate", None)
    qkv = attention.qkv(x).reshape(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    out = attend(attention.q_norm(q), attention.k_norm(k), v).transpose(1, 2).reshape(batch, n, -1)
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
        density: of its score entries; None when the plan has a number of keys.
        num_prefix: tokens that are always kept.
        handle: told what was chosen.
        generator: of sampled queries.
    """

    def __init__(
        self,
        attention: nn.Module,
        layer: int,
        plan: ColumnSparsity | BlockSparsity,
        density: float | None,
        num_prefix: int,
        handle: SparsifyHandle,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        # The stock module's own dictionaries: same parameters, same names.
        self.__dict__.update(attention.__dict__)
        self.plan_settings, self.layer, self.density = plan, layer, density
        self.num_prefix, self.generator = num_prefix, generator
        self.report = [handle]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the stock module; a mask may only be a bias per key, (batch, 1, 1, n)."""
        if is_causal or (attn_mask is not None and attn_mask.shape[2] != 1):
            raise InputError("the sparse path of a ViT takes no attention mask; remove() it first")
        key_bias = None if attn_mask is None else attn_mask[:, 0, 0]
        return attention_output(self, x, lambda q, k, v: self._attend(q, k, v, key_bias))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        settings, handle = self.plan_settings, self.report[0]
        budget = settings.keys if self.density is None else self.density
        if isinstance(settings, ColumnSparsity):
            plan = make_plan(
                q.detach(),
                k.detach(),
                budget,
                kind="columns",
                score=settings.score,
                num_prefix=self.num_prefix,
                num_sampled_queries=settings.num_sampled_queries,
                scale=self.scale,
                values=v,
                share_heads=settings.share_heads,
                generator=self.generator,
            )
        else:
            plan = make_plan(
                q.detach(),
                k.detach(),
                budget,
                kind="blocks",
                num_prefix=self.num_prefix,
                scale=self.scale,
                block_size=settings.block_size,
                num_parts=settings.num_parts,
            )
        if handle.record:
            handle.selections.append(Selection(self.layer, kept=plan.keys, plan=plan))
        if handle.counting:
            handle.computed_entries[-1] = handle.computed_entries[-1] * plan.density
        return sparse_attention(q, k, v, plan, backend=settings.backend, scale=self.scale, key_bias=key_bias)


@dataclass
class _State:
    """What one forward pass knows beside the tokens.

    Attributes:
        tokens: original number of tokens.
        positions: (batch, m) original position of each token, kept while recording.
        sizes: (batch, m) how many tokens each stands for; None while every one stands for itself.
        biased: whether sizes bias the attention.
        valid: (batch, m) bool, False for padding.
        keys, queries: of the block before, (batch, heads, m, d), where a plan asks for them.
    """

    tokens: int
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
            if name not in ("tokens", "biased")
        }
        return _State(self.tokens, biased=self.biased, **chosen)


class SparseBlocks(nn.Sequential):
    """The stock blocks under their own names, with tokens reduced between them.

    Args:
        blocks: the stock container.
        plans: token plans (:class:`TokenSparsity`) and at most one :class:`TokenMerging`.
        num_prefix: tokens that always stay.
        handle: told what was chosen.
        generator: of sampled queries and random scores.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        plans: Sequence[TokenSparsity | TokenMerging],
        num_prefix: int,
        handle: SparsifyHandle,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.__dict__.update(blocks.__dict__)
        self.reductions = [plan for plan in plans if isinstance(plan, TokenSparsity)]
        self.merging = next((plan for plan in plans if isinstance(plan, TokenMerging)), None)
        self.num_prefix, self.generator = num_prefix, generator
        self.report = [handle]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, c) to (batch, m, c)."""
        handle = self.report[0]
        handle.begin()
        state = _State(x.shape[1])
        if handle.record:
            state.positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return self._run(x, 0, state)

    def _run(self, x: Tensor, first: int, state: _State) -> Tensor:
        for layer in range(first, len(self)):
            for plan in self.reductions:
                if plan.before_layer == layer:
                    x, budgets = self._reduce(x, layer, plan, state)
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
        block = self[layer]
        handle = self.report[0]
        if handle.counting:
            self._count(layer, (x.shape[1] / state.tokens) ** 2 * weight)
        bias = state.key_bias()
        if bias is not None:
            bias = bias.to(_attention_dtype(x))
        wanted = any(p.before_layer == layer + 1 and p.score_source == "previous" for p in self.reductions)
        if self.merging is None and not wanted:
            return block(x) if bias is None else block(x, attn_mask=bias[:, None, None])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            state.queries, state.keys = q, k
            if block.attn.fused_attn:
                return dense_attention(q, k, v, scale=block.attn.scale, key_bias=bias)
            # An unfused model stays one.
            logits = (q * block.attn.scale) @ k.mT
            return (logits if bias is None else logits + bias[:, None, None]).softmax(-1) @ v

        x = x + block.drop_path1(block.ls1(attention_output(block.attn, block.norm1(x), attend)))
        if self.merging is not None:
            r = self.merging.r if isinstance(self.merging.r, int) else self.merging.r[layer]
            x, reduction = bipartite_merge(x, state.keys.mean(1), r, num_prefix=self.num_prefix, sizes=state.sizes)
            self._adopt(reduction, layer, state, biased=self.merging.proportional_attention)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def _reduce(self, x: Tensor, layer: int, plan: TokenSparsity, state: _State) -> tuple[Tensor, Tensor | None]:
        """Fewer tokens by one plan; and the budgets of the images if they differ."""
        n, p = x.shape[1], self.num_prefix
        patches = n - p
        entries = score_entries(plan.score, n, n, num_prefix=p, num_sampled_queries=plan.num_sampled_queries)
        keep: int | Tensor | None = plan.keep
        if plan.sparsity is not None:
            keep = keep_for_sparsity(
                plan.sparsity,
                n,
                num_prefix=p,
                depth=len(self),
                before_layer=layer,
                selection_entries=entries,
                minimum_keep=0 if plan.reduction == "drop" else 1,
            )
        if isinstance(keep, int) and keep >= patches and plan.score != "gate":
            return x, None
        handle = self.report[0]
        keys = self._keys(x, layer, plan, state)
        scores = self._scores(x, layer, plan, state, keys)
        if plan.score == "gate":
            gate = scores[:, p:]
            handle.gates.append(gate)
            x = torch.cat((x[:, :p], x[:, p:] * gate.unsqueeze(-1).to(x.dtype)), 1)
        if handle.counting:
            self._count(layer, entries / state.tokens**2)
        if plan.entropy_budget is not None:
            keep = entropy_budget(scores, plan.entropy_budget, num_prefix=p)
        budgets = keep if isinstance(keep, Tensor) else None
        keep = keep if budgets is not None else min(keep, patches)
        if plan.reduction == "drop":
            reduced, reduction = drop_tokens(
                x, scores, keep, num_prefix=p, sizes=state.sizes, straight_through=plan.straight_through
            )
        elif plan.reduction == "merge":
            reduced, reduction = merge_tokens(
                x,
                scores,
                keep,
                num_prefix=p,
                features=keys.transpose(1, 2).flatten(2),
                sizes=state.sizes,
                straight_through=plan.straight_through,
            )
        elif plan.reduction == "partition":
            reduced, reduction = partition_tokens(
                x,
                scores,
                keep,
                num_prefix=p,
                features=keys.mean(1),
                sharpness=plan.sharpness,
                anchors=plan.anchors,
            )
        else:
            reduced, reduction = fuse_tokens(x, scores, keep, num_prefix=p)
        weighted = plan.reduction in ("merge", "partition") and plan.proportional_attention
        self._adopt(reduction, layer, state, biased=weighted)
        return reduced, budgets

    def _adopt(self, reduction: TokenReduction, layer: int, state: _State, *, biased: bool) -> None:
        """Carry the state over to the reduced tokens, and report."""
        state.sizes, state.biased, state.valid = reduction.sizes, biased or state.biased, reduction.valid
        handle = self.report[0]
        if not handle.record:
            return
        kept = state.positions.gather(1, reduction.kept.clamp_min(0)).masked_fill(reduction.kept < 0, -1)
        scores = None
        if reduction.scores is not None:
            empty = reduction.scores.new_zeros(len(kept), state.tokens)
            scores = empty.scatter(1, state.positions.clamp_min(0), reduction.scores)
        handle.selections.append(Selection(layer, kept=kept, scores=scores, assignment=reduction.assignment))
        state.positions = kept

    def _keys(self, x: Tensor, layer: int, plan: TokenSparsity, state: _State) -> Tensor | None:
        """(batch, heads, n, d) keys of the layer that scores and features come from."""
        if plan.score_source == "previous":
            return state.keys
        if plan.score in ("magnitude", "random", "gate") and plan.reduction in ("drop", "fuse"):
            return None
        return _projected(self[layer], self[layer].norm1(x), 1)

    def _scores(self, x: Tensor, layer: int, plan: TokenSparsity, state: _State, keys: Tensor | None) -> Tensor:
        """(batch, n) score of every token, mean over the heads."""
        n, p = x.shape[1], self.num_prefix
        if plan.score == "gate":
            gate = torch.sigmoid(self.report[0].gate[str(layer)](x[:, p:]).squeeze(-1).float())
            return torch.cat((gate.new_ones(len(x), p), gate), 1)
        if plan.score == "magnitude":
            return torch.linalg.vector_norm(x.float(), dim=-1)
        if plan.score == "random":
            draws = torch.rand(len(x), n, generator=self.generator)
            return draws.to(x.device)
        scale = self[layer].attn.scale
        sampled = plan.num_sampled_queries
        if plan.score_source == "previous" or plan.score == "part":
            own = plan.score_source == "own"
            scores = selection_scores(
                _projected(self[layer], self[layer].norm1(x), 0) if own else state.queries,
                keys,
                plan.score,
                num_prefix=p,
                num_sampled_queries=sampled,
                scale=scale,
                features=x,
                generator=self.generator,
            )
            return scores.mean(1)
        # Queries are projected for the rows that are looked at, and for no others.
        rows = torch.arange(n) if sampled is None or sampled >= n else sampled_positions(n, sampled, self.generator)
        if plan.score == "prefix":
            rows = rows[:0]
        rows = torch.cat((torch.arange(p), rows)).to(x.device)
        attended = self[layer].norm1(x[:, rows])
        queries = _projected(self[layer], attended, 0)
        received = None
        if plan.score != "prefix":
            received = selection_scores(queries[:, :, p:], keys, "received", num_sampled_queries=None, scale=scale)
        if plan.score == "received" or p == 0:
            return received.mean(1)
        prefix = selection_scores(queries[:, :, :p], keys, "prefix", num_prefix=p, scale=scale)
        if plan.score == "prefix":
            return prefix.mean(1)
        return 0.5 * (received + prefix).mean(1)

    def _count(self, layer: int, entries: float) -> None:
        """Adds computed score entries, in units of one dense layer."""
        self.report[0].computed_entries.append(entries)


def _projected(block: nn.Module, x: Tensor, index: int) -> Tensor:
    """(batch, heads, rows, d): queries (0) or keys (1) of normalised tokens, without the other projections."""
    attention: Any = block.attn
    width = attention.qkv.weight.shape[0] // 3
    part = slice(index * width, (index + 1) * width)
    bias = attention.qkv.bias
    y = F.linear(x, attention.qkv.weight[part], None if bias is None else bias[part])
    y = y.reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)
    return (attention.q_norm if index == 0 else attention.k_norm)(y)


def _attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype that queries will have, which a bias must share."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
