"""What the adapters give back: how to read what happened in the last forward pass, and how to undo the change."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from entreg.errors import InputError
from entreg.sparse import is_decoding, recorded_kernels

if TYPE_CHECKING:
    from entreg.sparse import DecoderSparsity, PageSummaries


@dataclass(frozen=True, eq=False)
class Selection:
    """What one layer's plan chose in the last forward pass, in the coordinates of the model's original tokens.

    Attributes:
        layer: index from 0 of the layer that the choice was made before (tokens) or in (columns, blocks, pages).
        kept: int64, (batch, m) tokens that stay, prefix first, -1 where padded; columns: (batch, heads or 1, keys).
        scores: tokens only: (batch, n) what decided, with its gradient; 0 for tokens that were gone before.
        assignment: tokens only: (batch, tokens before) which of the kept ones stands for each; -1 if dropped.
        plan: of attention only: the :class:`~entreg.sparse.SparsityPlan`; None where a decoder's layer ran dense.
    """

    layer: int
    kept: Tensor | None = None
    scores: Tensor | None = None
    assignment: Tensor | None = None
    plan: Any = None


@dataclass(eq=False)
class Capture:
    """What a probe saw of one layer of a ViT in the last forward pass; nothing is copied, gradients pass.

    Attributes:
        layer: index from 0.
        qkv: (batch, n, 3 x heads x d), output of the layer's projection.
        tokens: (batch, n, c), output of the block, fewer tokens where a sparse path merges in it; None until it ends.
        num_prefix: leading class and register tokens.
        scale: factor of the attention logits.
        causal: always False.
        query_mask, key_mask: always None: every token counts.
    """

    layer: int
    num_prefix: int
    scale: float
    _attention: nn.Module = field(repr=False)
    qkv: Tensor | None = None
    tokens: Tensor | None = None
    causal: bool = False
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None

    def _part(self, index: int) -> Tensor:
        return self.qkv.unflatten(-1, (3, self._attention.num_heads, -1))[:, :, index].transpose(1, 2)

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


@dataclass(frozen=True, eq=False)
class DecoderCapture:
    """What a probe saw of one layer of a decoder in the last forward pass; nothing is copied, gradients pass.

    Attributes:
        layer: index from 0.
        queries: (batch, heads, n, d), as they enter the product, i.e. after rotary positions.
        keys: (batch, key_heads, m, d), likewise; with those of the cache, but without its empty places.
        values: (batch, key_heads, m, d_v).
        scale: factor of the attention logits.
        mask: (batch or 1, 1 or heads, n, m) bool, True where a query may see a key, or a mask that is added to the
            logits; None for plain causal attention, aligned at the last query.
        causal: whether no query sees a key after its own; False under a mask of a prefix or an image, and in models
            that are used in both directions.
        num_prefix: always 0: no token is always kept by its kind.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = True
    num_prefix: int = 0

    @property
    def key_mask(self) -> Tensor | None:
        """(batch, m) bool, True for keys that some query sees, so not for padding; None without a mask."""
        visible = self._visible()
        return None if visible is None else visible.any(1)

    @property
    def query_mask(self) -> Tensor | None:
        """(batch, n) bool, True for queries that see their own key, so not for padding; None without a mask."""
        visible = self._visible()
        if visible is None:
            return None
        n, m = visible.shape[1:]
        return visible.diagonal(m - n, 1, 2)

    def _visible(self) -> Tensor | None:
        """(batch, n, m) bool: what some head sees."""
        if self.mask is None:
            return None
        mask = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min
        return mask.any(1).expand(len(self.queries), -1, -1)


def watched_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The layers that a probe watches, in order.

    Args:
        layers: indices from 0; None for all.
        depth: layers of the model.

    Raises:
        InputError: no layer, or one that the model does not have.
    """
    chosen = list(range(depth)) if layers is None else sorted(set(layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise InputError(f"layers must be indices of the model's {depth} blocks, got {list(layers)}")
    return chosen


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
    """Reads queries, keys, values and, of a ViT, block outputs of a model's layers.

    Attributes:
        changed: names of the modules that are watched.
        captures: of the last forward pass, one :class:`Capture` or :class:`DecoderCapture` per watched layer, in order.
    """

    def __init__(self, model: nn.Module, changed: list[str], undo: Callable[[nn.Module], None]) -> None:
        super().__init__(model, changed, undo)
        self.captures: list[Capture | DecoderCapture] = []


class SparsifyHandle(_Handle, ABC):
    """The sparse path in a model.

    A copy of the model (``copy.deepcopy``) has the path too, with a handle of its own: ``sparsify(copy, ...)`` replaces
    it, and the new handle takes it out. What the last forward pass left is not copied.

    Attributes:
        changed: names of the modules whose work is done sparsely.
        record: whether what is chosen is kept in ``selections``.
        selections: of the last forward pass, if recording; one :class:`Selection` per place where something is chosen.
    """

    def __init__(self, model: nn.Module, changed: list[str], undo: Callable[[nn.Module], None], record: bool) -> None:
        super().__init__(model, changed, undo)
        self.record = record
        self.selections: list[Selection] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsifyHandle:
        model = copy.deepcopy(self.model, memo)
        # The model leads back here: then its copy has its handle already.
        if id(self) not in memo:
            memo[id(self)] = self._twin(model, memo)
        return memo[id(self)]

    @abstractmethod
    def _twin(self, model: nn.Module, memo: dict[int, Any]) -> SparsifyHandle:
        """A handle like this one for a copy of the model."""

    def _run(self, *inputs: Tensor) -> None:
        """One forward pass."""
        self.model(*inputs)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """The model in evaluation mode, and afterwards every module in the mode it was in."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def kernels(self, *inputs: Tensor) -> list[str]:
        """Names of the attention kernels that run for these inputs, see :func:`entreg.sparse.recorded_kernels`.

        Args:
            inputs: images of a ViT; of a decoder as in :meth:`DecoderSparsifyHandle.realised_sparsity`.
        """
        with recorded_kernels() as names:
            self._run(*inputs)
        return names


class VisionSparsifyHandle(SparsifyHandle):
    """The sparse path in a ViT.

    Attributes:
        gate: modules of a learned gate by layer, or None; their parameters are the handle's, not the model's.
        gates: values in [0, 1] of every gate in the last forward pass, (batch, patches) each, with their gradient.
        budgets: of the last forward pass: number of keys, or density, of each layer with sparse attention.
        positions: (batch, m) original position of each token that the layer sees which is at work, while recording.
        path: the module that stands in for the model's blocks.
    """

    def __init__(self, model: nn.Module, gate: nn.ModuleDict | None, record: bool) -> None:
        super().__init__(model, [], self._restore, record)
        self.gate = gate
        self.gates: list[Tensor] = []
        self.computed_entries: list[float] = []
        self.counting = False
        self.budgets: Mapping[int, int | float] = {}
        self.positions: Tensor | None = None
        self.path: Any = None

    def begin(self, budgets: Mapping[int, int | float]) -> None:
        """Forget the forward pass before; called by the sparse path itself."""
        self.selections, self.gates = [], []
        self.computed_entries = []
        self.budgets, self.positions = budgets, None

    def _restore(self, model: nn.Module) -> None:
        self.path.restore(model)

    def _twin(self, model: nn.Module, memo: dict[int, Any]) -> VisionSparsifyHandle:
        # The path leads back here.
        memo[id(self)] = twin = VisionSparsifyHandle(model, copy.deepcopy(self.gate, memo), self.record)
        twin.path, twin.changed = copy.deepcopy(self.path, memo), list(self.changed)
        twin._undo = self._undo and twin._undo
        return twin

    @torch.no_grad()
    def realised_sparsity(self, images: Tensor) -> float:
        """Realised sparsity on these images, found by running the model on them once.

        Args:
            images: a batch as the model takes it, on its device.

        Returns:
            The fraction of score entries, among those that the dense model would compute, that are not computed; the
            entries computed for selection scores only count as computed.

        Raises:
            InputError: no image.
        """
        if len(images) == 0:
            raise InputError("realised sparsity is an average over images, so it takes at least one image")
        self.counting = True
        try:
            with self._evaluation():
                self._run(images)
            # One entry per layer, in units of the dense layer's entries.
            return 1.0 - sum(self.computed_entries) / len(self.model.blocks)
        finally:
            self.counting = False


class DecoderSparsifyHandle(SparsifyHandle):
    """The sparse path in a decoder.

    Attributes:
        settings: the :class:`~entreg.sparse.DecoderSparsity`.
        depth: layers of the model, sparse or not.
        pages: of every cache that is in use, by layer, what is remembered of its pages of keys from step to step.
    """

    def __init__(
        self,
        model: nn.Module,
        changed: list[str],
        undo: Callable[[nn.Module], None],
        settings: DecoderSparsity,
        body: nn.Module,
        depth: int,
        record: bool,
    ) -> None:
        super().__init__(model, changed, undo, record)
        self.settings, self.depth = settings, depth
        self.pages: WeakKeyDictionary[Any, dict[int, PageSummaries]] = WeakKeyDictionary()
        self._body = body

    def __getstate__(self) -> dict[str, Any]:
        # What forward passes left belongs to caches that are not stored with the model.
        return {**self.__dict__, "selections": [], "pages": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, pages=WeakKeyDictionary())

    def acts_on(self, layer: int) -> bool:
        """Whether the plan is for this layer."""
        return self.settings.layers is None or layer in self.settings.layers

    @property
    def leaves_out(self) -> bool:
        """Whether the plan leaves anything out in any pass."""
        return bool(self.settings.sparsity or self.settings.decode_sparsity)

    def is_sparse(self, num_queries: int, num_keys: int, num_guessed: int = 0) -> bool:
        """Whether the plan leaves anything out in a pass.

        Args:
            num_queries: n. Which passes are decoding says :func:`entreg.sparse.is_decoding`.
            num_keys: m, the queries' own among them.
            num_guessed: last queries of a prompt that are written, see :func:`entreg.sparse.decoder_attention`.
        """
        written = is_decoding(num_queries, num_keys)
        if num_guessed > 0 and not written:
            return self.leaves_out
        decode = self.settings.decode_sparsity
        return (decode if written and decode is not None else self.settings.sparsity) != 0

    def _twin(self, model: nn.Module, memo: dict[int, Any]) -> DecoderSparsifyHandle:
        body = copy.deepcopy(self._body, memo)
        return DecoderSparsifyHandle(
            model, list(self.changed), self._undo, self.settings, body, self.depth, self.record
        )

    def _run(self, *inputs: Tensor) -> None:
        # Without the head, whose logits of a long text would not fit; without a cache, which nobody would read.
        self._body(**dict(zip(("input_ids", "attention_mask"), inputs, strict=False)), use_cache=False)

    @torch.no_grad()
    def realised_sparsity(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> float:
        """Realised sparsity of the prefill of these tokens, found by running the model's body on them once.

        Args:
            input_ids: (batch, n) int64, on the model's device.
            attention_mask: (batch, n), 0 for padding; None if there is none.

        Returns:
            The fraction of score entries under the causal mask that are not computed, entries computed for the
            selection counting as computed: the mean over all layers, 0 where a layer is or ran dense.
        """
        record, self.record = self.record, True
        try:
            with self._evaluation():
                self._run(input_ids, attention_mask)
            plans = [selection.plan for selection in self.selections]
        finally:
            self.record = record
            self.selections = self.selections if record else []
        return sum(plan.sparsity for plan in plans if plan is not None) / self.depth
