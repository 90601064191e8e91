"""Which score entries attention computes: from a budget to a plan.

A plan is data, not code: the same plan can be run by every backend of
:func:`entreg.sparse.attention.sparse_attention`, drawn as a mask, and counted. Two kinds:

* **columns**: per key head one set of keys, shared by all queries of the head (and of the query heads that share the
  key head);
* **blocks**: pairs (query block, key block) of consecutive tokens, a constant number of them per query block. With a
  permutation the tokens are first sorted by the parts of a partition, so that a block holds tokens that are alike.

The entropy of a distribution over keys or parts says how large a budget must be (exp(H) keys); the plan is where that
budget turns into work saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse._counting import block_entries, dense_entries, num_blocks, query_offset

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
        selection_entries: score entries per head that were computed only to choose this plan.
        block_lists: causal blocks only: ``block_mask`` as lists, where the kernel that chose wrote them too; or None.

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
    selection_entries: int = 0
    block_lists: BlockLists | None = None

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
        mask, shape = self.block_mask, (self.query_blocks, self.key_blocks)
        if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != shape:
            raise InputError(f"block_mask must be bool of shape (batch, key_heads or 1, {shape[0]}, {shape[1]})")
        order = self.permutation
        if order is not None and (order.dtype != torch.int64 or order.shape != (len(mask), self.num_keys)):
            raise InputError(f"permutation must be int64 of shape (batch, {self.num_keys})")
        if order is not None and (self.causal or self.num_queries != self.num_keys):
            raise InputError("tokens can be permuted only where queries and keys are the same tokens and none is later")

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
        """Blocks only: number of key blocks."""
        return num_blocks(self.num_keys, self.block_size)

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
    def attended_density(self) -> float:
        """Fraction of the entries of dense attention that attention itself computes: the mean of the mask.

        Averaged over batch and heads; waits for the device.
        """
        total = dense_entries(self.num_queries, self.num_keys, self.causal)
        if self.kind == "blocks":
            entries = self._entries(self.block_mask.device)
            return float((self.block_mask * entries).sum((-1, -2)).mean()) / total
        # The last key is seen by one query, the one before by two, ...
        seen = self.num_queries
        if self.causal:
            seen = (self.num_keys - self.keys).clamp_max(self.num_queries).double()
        valid = torch.ones_like(self.keys) if self.key_valid is None else self.key_valid
        return float((valid * seen).sum(-1).double().mean()) / total

    @property
    def density(self) -> float:
        """Entries computed, for the selection and for attention, over the entries of dense attention.

        An entry that is computed for both counts twice; above 1 where choosing costs more than it saves.
        """
        return self.attended_density + self.selection_entries / dense_entries(
            self.num_queries, self.num_keys, self.causal
        )

    @property
    def sparsity(self) -> float:
        """1 - :attr:`density`: the realised fraction of score entries that are not computed."""
        return 1.0 - self.density

    def to_mask(self) -> Tensor:
        """The plan as a matrix, for drawing, counting and tests: O(num_queries x num_keys) memory.

        Returns:
            (batch, num_heads or 1, num_queries, num_keys) bool, True where the entry is computed; with the causal mask
            applied.
        """
        if self.kind == "columns":
            mask = self.kept_keys().unsqueeze(2).expand(-1, -1, self.num_queries, -1)
        else:
            mask = self._block_mask_of_tokens()
        if self.causal:
            offset = self.num_keys - self.num_queries
            mask = mask & mask.new_ones(self.num_queries, self.num_keys).tril(offset)
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
        if self.permutation is not None:
            rows = columns = self.permutation.argsort(-1)
        row_blocks = (rows // self.block_size).expand(self.batch, -1)[:, None, :, None]
        column_blocks = (columns // self.block_size).expand(self.batch, -1)[:, None, None]
        by_row = self.block_mask.gather(2, row_blocks.expand(-1, heads, -1, self.key_blocks))
        return by_row.gather(3, column_blocks.expand(-1, heads, self.num_queries, -1))

    def _entries(self, device: torch.device) -> Tensor:
        return block_entries(self.num_queries, self.num_keys, self.block_size, self.causal, device)
