"""Which score entries attention computes: from a budget to a plan.

A plan is data, not code: the same plan can be run by every backend of
:func:`entreg.sparse.attention.sparse_attention`, drawn as a mask, and counted. Two kinds:

* **columns**: per key head one set of keys, shared by all queries of the head (and of the query heads that share the
  key head);
* **blocks**: pairs (query block, key block) of consecutive tokens, a constant number of them per query block. With a
  permutation the tokens are first sorted by the parts of a partition, so that a block holds tokens that are alike.

A mask may cut a batch into sequences of their own (padding, packed documents); a :class:`SegmentedPlan` holds a plan
for each.

The entropy of a distribution over keys or parts says how large a budget must be (exp(H) keys); the plan is where that
budget turns into work saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse.counting import block_entries, dense_entries, mask_entries, num_blocks, query_offset
from entreg.sparse.decoder.masks import Segment

KINDS = ("columns", "blocks")


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The key blocks of causal block plans as lists, for kernels that walk through them.

    Attributes:
        index: int32 of the mask's shape: first the numbers of the key blocks before the row's own, ascending; what
            comes after them means nothing.
        lengths: int32 (batch, key_heads or 1, query_blocks): twice how many they are, plus one where the row's own
            block is kept.
    """

    index: Tensor
    lengths: Tensor


@dataclass(frozen=True, eq=False)
class SparsityPlan:
    """The score entries that sparse attention computes; everything else is left out.

    Attributes:
        kind: ``"columns"`` or ``"blocks"``.
        num_queries: queries per head, at least 1.
        num_keys: keys per head, at least 1.
        num_heads: query heads. Plans have one set of choices for all heads, or one per key head, each shared by the
            num_heads / key_heads query heads that read it.
        causal: whether query i sees only the keys 0 ... i + num_keys - num_queries (aligned at the last query).
        keys: columns only: (batch, key_heads or 1, budget) int64 positions, ascending and distinct where valid.
        key_valid: columns only: bool of the same shape, False for the padding of smaller budgets; None if all count.
        block_mask: blocks only: (batch, key_heads or 1, query_blocks, key_blocks) bool, True where the pair is
            computed.
        block_size: blocks only: tokens per block; the last block may be shorter. Causal query blocks are those of the
            keys at the same positions, so that with more keys than queries the *first* one may be shorter.
        permutation: blocks only: (batch, n) int64, the token at each place of the order in which blocks are cut; None
            for the tokens' own order. Needs as many queries as keys, and no causal mask.
        selection_entries: score entries per head that were computed only to choose this plan; the mean over the batch.
        block_lists: causal blocks only: ``block_mask`` as lists, where the kernel that chose wrote them too; or None.
        first_keys: causal blocks of one query only: the first key that it sees in each sequence, from which on its
            blocks are cut; None for 0. ``block_mask`` has as many key blocks as the longest sequence.
        mask: causal blocks only: (batch or 1, 1, num_queries, num_keys) bool, the entries that dense attention would
            compute; None for all that is causal.

    Raises:
        InputError: shapes or dtypes that do not fit the above, or tensors of the other kind.
    """

    kind: str
    num_queries: int
    num_keys: int
    num_heads: int
    causal: bool = False
    keys: Tensor | None = None
    key_valid: Tensor | None = None
    block_mask: Tensor | None = None
    block_size: int | None = None
    permutation: Tensor | None = None
    selection_entries: float = 0
    block_lists: BlockLists | None = None
    first_keys: tuple[int, ...] | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.num_queries < 1 or self.num_keys < 1 or self.num_heads < 1:
            raise InputError("a plan needs at least one query, one key and one head")
        if self.causal and self.num_keys < self.num_queries:
            raise InputError(
                f"causal attention needs at least as many keys as queries, got {self.num_keys} < {self.num_queries}"
            )
        if self.kind == "columns":
            self._check_columns()
        else:
            self._check_blocks()
        if self.num_heads % self.plan_heads:
            raise InputError(f"{self.plan_heads} sets of choices cannot be shared by {self.num_heads} query heads")

    def _check_columns(self) -> None:
        if self.block_mask is not None or self.block_size is not None or self.permutation is not None:
            raise InputError("a column plan has keys, and neither block_mask, block_size nor permutation")
        if self.first_keys is not None or self.mask is not None:
            raise InputError("a column plan has neither first_keys nor mask")
        keys, valid = self.keys, self.key_valid
        if keys is None or keys.dtype != torch.int64 or keys.dim() != 3 or not 1 <= keys.shape[2] <= self.num_keys:
            raise InputError("keys must be int64 of shape (batch, key_heads or 1, budget), budget 1 to num_keys")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != keys.shape):
            raise InputError("key_valid must be bool of the shape of keys")

    def _check_blocks(self) -> None:
        if self.keys is not None or self.key_valid is not None:
            raise InputError("a block plan has block_mask and block_size, and neither keys nor key_valid")
        if self.block_size is None or self.block_size < 1:
            raise InputError(f"block_size must be at least 1, got {self.block_size}")
        self._check_allowed()
        mask, shape = self.block_mask, (self.query_blocks, self.key_blocks)
        if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != shape:
            raise InputError(f"block_mask must be bool of shape (batch, key_heads or 1, {shape[0]}, {shape[1]})")
        order = self.permutation
        if self.first_keys is not None and mask is not None and len(self.first_keys) != len(mask):
            raise InputError(f"first_keys must be {len(mask)} numbers, one for each sequence")
        if order is not None and (order.dtype != torch.int64 or order.shape != (len(mask), self.num_keys)):
            raise InputError(f"permutation must be int64 of shape (batch, {self.num_keys})")
        if order is not None and (self.causal or self.num_queries != self.num_keys):
            raise InputError("tokens can be permuted only where queries and keys are the same tokens and none is later")

    def _check_allowed(self) -> None:
        first, mask = self.first_keys, self.mask
        if (first is not None or mask is not None) and not self.causal:
            raise InputError("first_keys and mask are for causal plans")
        if first is not None:
            if self.num_queries > 1 or mask is not None:
                raise InputError("first_keys are for plans of one query without a mask")
            if not first or not all(0 <= one < self.num_keys for one in first):
                raise InputError(f"first_keys must lie between 0 and {self.num_keys - 1}, got {first}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, self.num_queries, self.num_keys)):
            raise InputError(f"mask must be bool of shape (batch or 1, 1, {self.num_queries}, {self.num_keys})")

    @property
    def batch(self) -> int:
        """Batch elements that the plan was made for."""
        return len(self.keys if self.kind == "columns" else self.block_mask)

    @property
    def plan_heads(self) -> int:
        """Sets of choices per batch element: 1, or one per key head."""
        return (self.keys if self.kind == "columns" else self.block_mask).shape[1]

    @property
    def query_offset(self) -> int:
        """Blocks only: empty places before the first query in its block."""
        return query_offset(self.num_queries, self.num_keys, self.block_size, self.causal)

    @property
    def query_blocks(self) -> int:
        """Blocks only: number of query blocks."""
        return num_blocks(self.num_queries + self.query_offset, self.block_size)

    @property
    def key_blocks(self) -> int:
        """Blocks only: number of key blocks, of the longest sequence."""
        return num_blocks(self.num_keys - min(self.first_keys or (0,)), self.block_size)

    @property
    def dense(self) -> bool:
        """Whether nothing is left out, so that attention is plain dense attention."""
        if self.kind == "columns":
            return self.keys.shape[2] == self.num_keys and self.key_valid is None
        if self.num_queries == 1:
            # It sees every block.
            return bool(self.block_mask.all())
        return bool((self.block_mask | (self._entries(self.block_mask.device) == 0)).all())

    @property
    def allowed_entries(self) -> float:
        """Entries of dense attention: the sum over the batch, the mean over heads; waits for the device with a mask."""
        if self.first_keys is not None:
            return float(sum(self.num_keys - first for first in self.first_keys))
        if self.mask is not None:
            return float(self.mask.sum()) * self.batch / len(self.mask)
        return float(dense_entries(self.num_queries, self.num_keys, self.causal) * self.batch)

    @property
    def attended_entries(self) -> float:
        """Entries that attention itself computes: the sum over the batch, the mean over heads; waits for the device."""
        if self.kind == "blocks":
            entries = self._entries(self.block_mask.device)
            return float((self.block_mask * entries).sum((-1, -2)).mean(1).sum())
        # The last key is seen by one query, the one before by two, ...
        seen = self.num_queries
        if self.causal:
            seen = (self.num_keys - self.keys).clamp_max(self.num_queries).double()
        valid = torch.ones_like(self.keys) if self.key_valid is None else self.key_valid
        return float((valid * seen).sum(-1).double().mean(1).sum())

    @property
    def attended_density(self) -> float:
        """Fraction of the entries of dense attention that attention itself computes; waits for the device."""
        return self.attended_entries / self.allowed_entries

    @property
    def density(self) -> float:
        """Entries computed, for the selection and for attention, over the entries of dense attention.

        An entry that is computed for both counts twice; above 1 where choosing costs more than it saves.
        """
        return _density(self)

    @property
    def sparsity(self) -> float:
        """1 - :attr:`density`: the realised fraction of score entries that are not computed."""
        return 1.0 - self.density

    def to_mask(self) -> Tensor:
        """The plan as a matrix, for drawing, counting and tests: O(num_queries x num_keys) memory.

        Returns:
            (batch, num_heads or 1, num_queries, num_keys) bool, True where the entry is computed; with the causal mask,
            and the plan's own, applied.
        """
        if self.kind == "columns":
            mask = self.kept_keys().unsqueeze(2).expand(-1, -1, self.num_queries, -1)
        else:
            mask = self._block_mask_of_tokens()
        if self.causal:
            offset = self.num_keys - self.num_queries
            mask = mask & mask.new_ones(self.num_queries, self.num_keys).tril(offset)
        if self.mask is not None:
            mask = mask & self.mask
        if self.plan_heads > 1:
            mask = mask.repeat_interleave(self.num_heads // self.plan_heads, dim=1)
        return mask

    def kept_keys(self) -> Tensor:
        """Columns only: (batch, key_heads or 1, num_keys) bool, True for the keys that are kept."""
        keys = self.keys if self.key_valid is None else torch.where(self.key_valid, self.keys, self.num_keys)
        kept = torch.zeros(*keys.shape[:2], self.num_keys + 1, dtype=torch.bool, device=keys.device)
        return kept.scatter_(-1, keys, True)[..., : self.num_keys]

    def _block_mask_of_tokens(self) -> Tensor:
        device, heads = self.block_mask.device, self.plan_heads
        rows = torch.arange(self.num_queries, device=device) + self.query_offset
        columns = torch.arange(self.num_keys, device=device)
        if self.first_keys is not None:
            columns = columns - torch.tensor(self.first_keys, device=device)[:, None]
        if self.permutation is not None:
            rows = columns = self.permutation.argsort(-1)
        row_blocks = (rows // self.block_size).expand(self.batch, -1)[:, None, :, None]
        column_blocks = (columns.clamp_min(0) // self.block_size).expand(self.batch, -1)[:, None, None]
        by_row = self.block_mask.gather(2, row_blocks.expand(-1, heads, -1, self.key_blocks))
        mask = by_row.gather(3, column_blocks.expand(-1, heads, self.num_queries, -1))
        return mask if self.first_keys is None else mask & (columns >= 0)[:, None, None]

    def _entries(self, device: torch.device) -> Tensor:
        """Entries of dense attention in every pair of blocks, broadcastable to the mask of blocks."""
        if self.first_keys is not None:
            lengths = torch.tensor([self.num_keys - first for first in self.first_keys], device=device)
            starts = torch.arange(0, self.key_blocks * self.block_size, self.block_size, device=device)
            return (lengths[:, None, None, None] - starts).clamp(0, self.block_size).double()
        if self.mask is not None:
            return mask_entries(self.mask, self.block_size)
        return block_entries(self.num_queries, self.num_keys, self.block_size, self.causal, device)


@dataclass(frozen=True, eq=False)
class SegmentedPlan:
    """Plans of the segments that a mask consists of, each a sequence alone; see :mod:`entreg.sparse.decoder.masks`.

    What is in no segment is not computed; its queries get zeros. Counts are over the entries that the mask allows
    within segments.

    Attributes:
        batch: batch elements.
        num_queries: queries per head.
        num_keys: keys per head.
        num_heads: query heads.
        parts: segments, and the plan of each, in its own coordinates; None where attention in it is dense.
    """

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    parts: tuple[tuple[Segment, SparsityPlan | SegmentedPlan | None], ...]
    causal = True

    @property
    def selection_entries(self) -> float:
        """Score entries per head that were computed only to choose; the mean over the batch."""
        return sum(plan.selection_entries * plan.batch for _, plan in self.parts if plan is not None) / self.batch

    @property
    def allowed_entries(self) -> float:
        """Entries of dense attention: the sum over the batch, the mean over heads."""
        return sum(self._dense_entries(one) if plan is None else plan.allowed_entries for one, plan in self.parts)

    @property
    def attended_entries(self) -> float:
        """Entries that attention itself computes: the sum over the batch, the mean over heads; waits for the device."""
        return sum(self._dense_entries(one) if plan is None else plan.attended_entries for one, plan in self.parts)

    @property
    def attended_density(self) -> float:
        """Fraction of the entries of dense attention that attention itself computes; waits for the device."""
        return self.attended_entries / self.allowed_entries

    @property
    def density(self) -> float:
        """As of :class:`SparsityPlan`."""
        return _density(self)

    @property
    def sparsity(self) -> float:
        """1 - :attr:`density`: the realised fraction of score entries that are not computed."""
        return 1.0 - self.density

    @property
    def dense(self) -> bool:
        """Whether nothing is left out."""
        return all(plan is None or plan.dense for _, plan in self.parts)

    def to_mask(self) -> Tensor:
        """(batch, num_heads, num_queries, num_keys) bool, as of :class:`SparsityPlan`."""
        masks = [self._dense_mask(one) if plan is None else plan.to_mask() for one, plan in self.parts]
        device = next(mask.device for (_, plan), mask in zip(self.parts, masks, strict=True) if plan is not None)
        whole = torch.zeros(
            self.batch, self.num_heads, self.num_queries, self.num_keys, dtype=torch.bool, device=device
        )
        for (segment, _), mask in zip(self.parts, masks, strict=True):
            whole[segment.entries(self.num_heads, device)] = mask.to(device)
        return whole

    @staticmethod
    def _dense_entries(segment: Segment) -> float:
        if not segment.owned:
            return 0.0
        if segment.mask is not None:
            return float(segment.mask.sum()) * len(segment.sequences) / len(segment.mask)
        return float(dense_entries(*segment.sizes, True) * len(segment.sequences))

    @staticmethod
    def _dense_mask(segment: Segment) -> Tensor:
        if segment.mask is not None:
            return segment.mask
        n, m = segment.sizes
        return torch.ones(1, 1, n, m, dtype=torch.bool).tril(m - n)


def _density(plan: SparsityPlan | SegmentedPlan) -> float:
    return (plan.attended_entries + plan.selection_entries * plan.batch) / plan.allowed_entries
