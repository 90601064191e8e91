"""What the adapters give back: how to read what happened in the last forward pass, and how to undo the change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from entreg.sparse import recorded_kernels


@dataclass(frozen=True, eq=False)
class Selection:
    """What one layer's plan chose in the last forward pass, in the coordinates of the model's original tokens.

    Attributes:
        layer: index from 0 of the layer that the choice was made before (tokens) or in (columns, blocks).
        kept: int64, (batch, m) tokens that stay, prefix first, -1 where padded; columns: (batch, heads or 1, keys).
        scores: tokens only: (batch, n) what decided, with its gradient; 0 for tokens that were gone before.
        assignment: tokens only: (batch, tokens before) which of the kept ones stands for each; -1 if dropped.
        plan: columns and blocks only: the :class:`~entreg.sparse.SparsityPlan`.
    """

    layer: int
    kept: Tensor | None = None
    scores: Tensor | None = None
    assignment: Tensor | None = None
    plan: Any = None


@dataclass(eq=False)
class Capture:
    """What a probe saw of one layer in the last forward pass; nothing is copied, gradients pass.

    Attributes:
        layer: index from 0.
        qkv: (batch, n, 3 x heads x d), output of the layer's projection.
        tokens: (batch, n, c), output of the block, fewer tokens where a sparse path merges in it; None until it ends.
        num_prefix: leading class and register tokens.
        scale: factor of the attention logits.
    """

    layer: int
    num_prefix: int
    scale: float
    _attention: nn.Module = field(repr=False)
    qkv: Tensor | None = None
    tokens: Tensor | None = None

    def _part(self, index: int) -> Tensor:
        batch, n, _ = self.qkv.shape
        heads = self._attention.num_heads
        return self.qkv.reshape(batch, n, 3, heads, -1)[:, :, index].transpose(1, 2)

    @property
    def queries(self) -> Tensor:
        """(batch, heads, n, d), as they enter the product."""
        return self._attention.q_norm(self._part(0))

    @property
    def keys(self) -> Tensor:
        """(batch, heads, n, d), as they enter the product."""
        return self._attention.k_norm(self._part(1))

    @property
    def values(self) -> Tensor:
        """(batch, heads, n, d)."""
        return self._part(2)


class _Handle:
    """A change of a model that can be undone once."""

    def __init__(self, model: nn.Module, changed: list[str], undo: Callable[[nn.Module], None]) -> None:
        self.model = model
        self.changed = changed
        self._undo: Callable[[nn.Module], None] | None = undo

    @property
    def active(self) -> bool:
        """Whether the change is still in the model."""
        return self._undo is not None

    def remove(self) -> None:
        """Restore the model; a second call does nothing."""
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo(self.model)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class ProbeHandle(_Handle):
    """Reads queries, keys, values and block outputs of a model's layers.

    Attributes:
        changed: names of the modules that are watched.
        captures: of the last forward pass, one :class:`Capture` per watched layer, in order.
    """

    def __init__(self, model: nn.Module, changed: list[str], undo: Callable[[nn.Module], None]) -> None:
        super().__init__(model, changed, undo)
        self.captures: list[Capture] = []


class SparsifyHandle(_Handle):
    """The sparse path in a model.

    A copy of the model (``copy.deepcopy``) has the path too, with a handle of its own: ``sparsify(copy, ...)`` replaces
    it, and the new handle takes it out. What the last forward pass left is not copied.

    Attributes:
        changed: names of the modules that were swapped.
        gate: modules of a learned gate by layer, or None; their parameters are the handle's, not the model's.
        selections: of the last forward pass, if recording; one :class:`Selection` per place where something is chosen.
        gates: values in [0, 1] of every gate in the last forward pass, (batch, patches) each, with their gradient.
        budgets: of the last forward pass: number of keys, or density, of each layer with sparse attention.
    """

    def __init__(
        self,
        model: nn.Module,
        changed: list[str],
        undo: Callable[[nn.Module], None],
        gate: nn.ModuleDict | None,
        record: bool,
    ) -> None:
        super().__init__(model, changed, undo)
        self.gate = gate
        self.record = record
        self.selections: list[Selection] = []
        self.gates: list[Tensor] = []
        self.computed_entries: list[float] = []
        self.counting = False
        self.budgets: Mapping[int, int | float] = {}

    def begin(self, budgets: Mapping[int, int | float]) -> None:
        """Forget the forward pass before; called by the sparse path itself."""
        self.selections, self.gates = [], []
        self.computed_entries = []
        self.budgets = budgets

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsifyHandle:
        model = copy.deepcopy(self.model, memo)
        # The model leads back here: then its copy has its handle already.
        if id(self) not in memo:
            gate = copy.deepcopy(self.gate, memo)
            memo[id(self)] = SparsifyHandle(model, list(self.changed), self._undo, gate, self.record)
        return memo[id(self)]

    @torch.no_grad()
    def realised_sparsity(self, images: Tensor) -> float:
        """Realised sparsity on these images, found by running the model on them once.

        Args:
            images: a batch as the model takes it, on its device.

        Returns:
            The fraction of score entries, among those that the dense model would compute, that are not computed; the
            entries computed for selection scores only count as computed.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self.counting = True
        try:
            self.model(images)
            # One entry per layer, in units of the dense layer's entries.
            return 1.0 - sum(self.computed_entries) / len(self.model.blocks)
        finally:
            self.counting = False
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def kernels(self, images: Tensor) -> list[str]:
        """Names of the attention kernels that run for these images, see :func:`entreg.sparse.recorded_kernels`."""
        with recorded_kernels() as names:
            self.model(images)
        return names
