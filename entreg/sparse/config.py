"""Which sparse path a model takes: plain frozen values, checked when made, buildable from a configuration file.

*Sparsity* of every kind is the realised fraction of the score entries, over all layers and heads, that dense attention
would compute and the path does not; entries computed only for a selection score count as computed. A plan is given by
its sparsity or by an explicit budget (keys, kept tokens), never by both. What a model's sizes make impossible is found
by :mod:`entreg.sparse.budgets` when the plan meets the model.

The paper names a sparsity but no plan: kinds, scores and defaults are our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from entreg.errors import ConfigError
from entreg.names import require_choice, suggestion
from entreg.sparse.registries import REDUCTIONS, SCORES, SELECTIONS

BACKENDS = ("reference", "gather", "flex", "flash", "triton")
# Of plans that are not causal.
_VISION_BACKENDS = tuple(name for name in BACKENDS if name != "triton")
# Tokens per block that the kernels of the backend triton are made for: tensor cores take no smaller tiles.
KERNEL_SIZES = (16, 32, 64, 128)
ANCHORS = ("top", "residual")
BUDGETS = ("uniform", "entropy", "mass")
SCORE_SOURCES = ("own", "previous")


@dataclass(frozen=True)
class ColumnSparsity:
    """Every head attends to a chosen set of keys, the same for all its queries; prefix tokens are always among them.

    Attributes:
        sparsity: realised sparsity in [0, 1); None if ``keys`` is given.
        keys: keys per head, prefix tokens included, at least 1; None if ``sparsity`` is given.
        score: a name in :data:`entreg.sparse.registries.SCORES`.
        num_sampled_queries: query rows from which the score is computed, at least 1; None for all.
        layers: indices from 0 of the layers it acts on; None for all.
        share_heads: choose one set of keys for all heads of a layer.
        backend: one of :data:`BACKENDS` but ``triton``.

    Raises:
        ConfigError: a value out of range, or not exactly one of ``sparsity`` and ``keys``.
    """

    sparsity: float | None = None
    keys: int | None = None
    score: str = "mixed"
    num_sampled_queries: int | None = 16
    layers: tuple[int, ...] | None = None
    share_heads: bool = False
    backend: str = "gather"

    def __post_init__(self) -> None:
        _require_one_of(self, "sparsity", "keys")
        _require_fraction(self, "sparsity")
        _require_count(self, "keys", 1)
        _require_choice(self, "score", SCORES)
        _require_count(self, "num_sampled_queries", 1)
        _set_layers(self)
        _require_bool(self, "share_heads")
        _require_choice(self, "backend", _VISION_BACKENDS)


@dataclass(frozen=True)
class BlockSparsity:
    """Tokens are permuted so that parts of a ball partition of the keys are contiguous; then block pairs are chosen.

    Attributes:
        sparsity: realised sparsity in [0, 1); has to be given.
        block_size: queries and keys per block, at least 1.
        num_parts: parts of the partition, at least 1; with 1 the order of the tokens stays.
        layers: indices from 0 of the layers it acts on; None for all.
        backend: one of :data:`BACKENDS` but ``triton``.

    Raises:
        ConfigError: a value missing or out of range.
    """

    sparsity: float | None = None
    block_size: int = 16
    num_parts: int = 8
    layers: tuple[int, ...] | None = None
    backend: str = "gather"

    def __post_init__(self) -> None:
        _require_one_of(self, "sparsity")
        _require_fraction(self, "sparsity")
        _require_count(self, "block_size", 1)
        _require_count(self, "num_parts", 1)
        _set_layers(self)
        _require_choice(self, "backend", _VISION_BACKENDS)


@dataclass(frozen=True)
class EntropyBudget:
    """A budget that an image sets itself: round(multiplier x exp(H)), within [minimum, maximum].

    H, in nats, is the entropy of the distribution of the selection score over the patch tokens; exp(H) is the number
    of tokens that the image uses.

    Attributes:
        multiplier: above 0.
        minimum: fewest patch tokens, at least 0.
        maximum: most patch tokens, at least ``minimum``; None for all.

    Raises:
        ConfigError: a value out of range.
    """

    multiplier: float = 1.0
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.multiplier) or not 0 < self.multiplier < float("inf"):
            raise ConfigError(f"EntropyBudget's multiplier must be a number above 0, got {self.multiplier!r}")
        if self.minimum is None:
            raise ConfigError("EntropyBudget's minimum must be an integer of at least 0, got None")
        _require_count(self, "minimum", 0)
        _require_count(self, "maximum", self.minimum)


@dataclass(frozen=True)
class TokenSparsity:
    """Fewer tokens in the residual stream from one layer on: dropped, or merged into weighted representatives.

    Attributes:
        sparsity: realised sparsity in [0, 1), the mean over the model's layers; or
        keep: patch tokens that are kept (prefix tokens come on top), at least 0; or
        entropy_budget: how many each image keeps by itself. Exactly one of the three is given.
        before_layer: index from 0 of the first layer that runs on the reduced tokens; 0 reduces right after the stem.
        reduction: a name in :data:`entreg.sparse.registries.REDUCTIONS`: ``drop``;
            ``merge`` (each patch token joins its nearest kept one, mean weighted by sizes);
            ``partition`` (means of a soft partition weighted by the scores); ``fuse`` (the rest becomes one token).
        score: a name in :data:`entreg.sparse.registries.SCORES`.
        score_source: attention from which the score comes: ``own``, that of the layer ``before_layer`` on all tokens,
            or ``previous``, that of the layer before it, which exists if ``before_layer`` is at least 1.
        num_sampled_queries: query rows from which the score is computed, at least 1; None for all.
        sharpness: of ``partition``, above 0, see :func:`entreg.sparse.partition_tokens`.
        anchors: of ``partition``, one of :data:`ANCHORS`.
        proportional_attention: merged tokens attract attention in proportion to their size or mass; of no effect with
            ``drop`` and ``fuse``.
        straight_through: gradient of the kept tokens reaches the scores (training with the path active).

    Raises:
        ConfigError: a value out of range or a combination that is not possible.
    """

    sparsity: float | None = None
    keep: int | None = None
    before_layer: int = 1
    reduction: str = "drop"
    score: str = "mixed"
    score_source: str = "own"
    num_sampled_queries: int | None = 16
    entropy_budget: EntropyBudget | None = None
    sharpness: float = 10.0
    anchors: str = "residual"
    proportional_attention: bool = True
    straight_through: bool = False

    def __post_init__(self) -> None:
        _require_one_of(self, "sparsity", "keep", "entropy_budget")
        _require_fraction(self, "sparsity")
        _require_count(self, "keep", 0)
        if self.before_layer is None:
            raise ConfigError("TokenSparsity's before_layer must be an integer of at least 0, got None")
        _require_count(self, "before_layer", 0)
        _require_choice(self, "reduction", REDUCTIONS)
        _require_choice(self, "score", SCORES)
        _require_choice(self, "score_source", SCORE_SOURCES)
        _require_count(self, "num_sampled_queries", 1)
        if self.entropy_budget is not None and not isinstance(self.entropy_budget, EntropyBudget):
            raise ConfigError(f"TokenSparsity's entropy_budget must be an EntropyBudget, got {self.entropy_budget!r}")
        _require_choice(self, "anchors", ANCHORS)
        if not _is_number(self.sharpness) or not 0 < self.sharpness < float("inf"):
            raise ConfigError(f"TokenSparsity's sharpness must be a number above 0, got {self.sharpness!r}")
        if self.entropy_budget is not None and not REDUCTIONS[self.reduction].own_budgets:
            raise ConfigError(f"reduction '{self.reduction}' needs sparsity or keep: all images keep the same number")
        _require_bool(self, "proportional_attention")
        _require_bool(self, "straight_through")
        if self.score_source == "previous" and self.before_layer == 0:
            raise ConfigError("score_source 'previous' needs before_layer of at least 1: layer 0 has none before it")


@dataclass(frozen=True)
class TokenMerging:
    """The rival: token merging (Bolya et al., ICLR 2023, "Token Merging: Your ViT But Faster"), its published rule.

    In every layer, between attention and MLP, r patch tokens are merged away by bipartite soft matching.

    Attributes:
        r: tokens merged away per layer, at least 0; one number, or one per layer. A layer merges at most half of its
            patch tokens.
        proportional_attention: as published for supervised models; off for masked autoencoders used without training.

    Raises:
        ConfigError: a value out of range.
    """

    r: int | tuple[int, ...]
    proportional_attention: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.r, Sequence) and not isinstance(self.r, str):
            object.__setattr__(self, "r", tuple(self.r))
        values = self.r if isinstance(self.r, tuple) else (self.r,)
        if not values or not all(_is_integer(value) and value >= 0 for value in values):
            raise ConfigError(f"TokenMerging's r must be an integer of at least 0, or one per layer, got {self.r!r}")
        _require_bool(self, "proportional_attention")


@dataclass(frozen=True)
class DecoderSparsity:
    """Causal decoders: blocks of keys while the prompt is read, pages of keys while tokens are written.

    In both the first block (the attention sink) and the query's own are always among those chosen. Every sequence of a
    batch, and every packed document, has its own budget; one too short for those blocks within it runs dense. (The
    paper gives a sparsity of 70-75 % and no plan; this is our choice.)

    Attributes:
        sparsity: realised sparsity of reading in [0, 1): of the causal score entries, those of the selection counted
            as computed.
        selection: how the blocks are chosen, a name in :data:`entreg.sparse.registries.SELECTIONS`. ``pooled``:
            attention between the means of ``pool_size`` consecutive queries and keys, good for wide attention;
            ``sampled``: attention of ``num_sampled_queries`` queries per
            block to all keys, shared with neighbours, good for attention to single keys (copying); ``validated``:
            for every head and stretch of rows the one of the two that predicts the sampled rows better, each of
            these left out in turn; ``mixture``: of both, with the weights that make those samples most likely; best
            with small blocks; ``window``: the latest blocks (sink + local, as StreamingLLM); ``oracle``: full
            attention, for comparison, its cost is not counted; ``topk``: the same for single keys of single queries.
        block_size: queries and keys per block, at least 1.
        pool_size: consecutive tokens of which a selection sees the mean; divides ``block_size``.
        num_sampled_queries: of ``sampled``, per query block, at least 1 and at most ``block_size``.
        group_reduction: what counts of the attention, to sampled keys or to pages, of the heads that share a key
            head: its ``mean`` or ``max``.
        diagonal_radius: estimates of ``sampled`` are shared with as many neighbours along the diagonal, at least 0;
            weights fall linearly. Relative positions make attention alike along diagonals, so few queries say much
            about those beside them.
        column_radius: the same along columns of key blocks.
        validation_radius: of ``validated`` and ``mixture``: rows of blocks before and after that decide together, at
            least 0.
        validation_margin: of ``validated``, above 0: the samples' estimate is used where it predicts more than this
            times what the pooled one predicts; below 1 it is preferred, above 1 the pooled one.
        local_blocks: blocks before each row's own that are always kept, at least 0.
        dense_tail_blocks: rows of blocks at the end of the prompt that see everything, at least 0: what is written next
            is answered from there.
        budget: how many blocks each row of blocks has: ``uniform``: the same number; ``entropy``: numbers per key head
            in proportion to exp(H) of its estimated distribution over blocks; ``mass``: those blocks of all rows and
            heads of a layer that have the most estimated attention mass. All keep to the same sparsity; the last two
            come closer to it, because ``uniform`` is rounded to whole blocks for all at once.
        page_size: keys per page in decoding, at least 1.
        decode_sparsity: of writing, in [0, 1), of the keys in the cache; None: as ``sparsity``; 0: dense. Which passes
            write says :func:`entreg.sparse.is_decoding`.
        layers: indices from 0 of the layers it acts on; None for all.
        backend: one of :data:`BACKENDS` but ``flash``; ``triton`` takes blocks and pages of 16, 32, 64 or 128 keys.

    Raises:
        ConfigError: a value out of range or a combination that is not possible.
    """

    sparsity: float | None = None
    selection: str = "validated"
    block_size: int = 32
    pool_size: int = 16
    num_sampled_queries: int = 1
    group_reduction: str = "max"
    diagonal_radius: int = 2
    column_radius: int = 1
    validation_radius: int = 8
    validation_margin: float = 0.9
    local_blocks: int = 0
    dense_tail_blocks: int = 1
    budget: str = "uniform"
    page_size: int = 16
    decode_sparsity: float | None = None
    layers: tuple[int, ...] | None = None
    backend: str = "gather"

    def __post_init__(self) -> None:
        _require_one_of(self, "sparsity")
        _require_fraction(self, "sparsity")
        _require_fraction(self, "decode_sparsity")
        _require_choice(self, "selection", SELECTIONS)
        counts = {"block_size": 1, "pool_size": 1, "num_sampled_queries": 1, "page_size": 1}
        counts |= {
            "diagonal_radius": 0,
            "column_radius": 0,
            "validation_radius": 0,
            "local_blocks": 0,
            "dense_tail_blocks": 0,
        }
        for name, minimum in counts.items():
            if getattr(self, name) is None:
                raise ConfigError(f"DecoderSparsity's {name} must be an integer of at least {minimum}, got None")
            _require_count(self, name, minimum)
        _require_choice(self, "group_reduction", ("mean", "max"))
        if not _is_number(self.validation_margin) or not 0 < self.validation_margin < float("inf"):
            raise ConfigError(
                f"DecoderSparsity's validation_margin must be a number above 0, got {self.validation_margin!r}"
            )
        if self.block_size % self.pool_size or self.num_sampled_queries > self.block_size:
            raise ConfigError(
                f"DecoderSparsity's pool_size must divide block_size {self.block_size} and num_sampled_queries be at "
                f"most that, got {self.pool_size} and {self.num_sampled_queries}"
            )
        _require_choice(self, "budget", BUDGETS)
        selection = SELECTIONS[self.selection]
        if self.budget != "uniform" and not selection.estimates_mass:
            raise ConfigError(f"selection '{self.selection}' estimates no attention mass: its budget must be uniform")
        _set_layers(self)
        _require_choice(self, "backend", BACKENDS)
        if self.backend == "flash" or (selection.single_keys and self.backend != "reference"):
            needed = "the backend reference" if selection.single_keys else "one of reference, gather, flex, triton"
            raise ConfigError(f"DecoderSparsity with selection '{self.selection}' needs {needed}, got '{self.backend}'")
        if self.backend == "triton":
            for name in ("block_size", "page_size"):
                if getattr(self, name) not in KERNEL_SIZES:
                    raise ConfigError(
                        f"DecoderSparsity with backend 'triton' needs a {name} out of {KERNEL_SIZES}, "
                        f"got {getattr(self, name)}"
                    )


@dataclass(frozen=True)
class Combined:
    """Several plans at once, e.g. tokens then columns; each acts on what those before it left.

    Attributes:
        parts: at least one plan, in order of application. The sparsity of a part is relative to the entries that the
            parts before it leave.

    Raises:
        ConfigError: no parts, or one that is not a plan.
    """

    parts: tuple[Sparsity, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Sequence) or isinstance(self.parts, str) or not self.parts:
            raise ConfigError(f"Combined's parts must be a sequence of at least one plan, got {self.parts!r}")
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if isinstance(part, Combined | DecoderSparsity) or not isinstance(part, tuple(SPARSITIES.values())):
                raise ConfigError(f"each of Combined's parts must be a single plan, got {part!r}")


Sparsity: TypeAlias = ColumnSparsity | BlockSparsity | TokenSparsity | TokenMerging | DecoderSparsity | Combined

SPARSITIES: dict[str, type] = {
    "columns": ColumnSparsity,
    "blocks": BlockSparsity,
    "tokens": TokenSparsity,
    "token_merging": TokenMerging,
    "decoder": DecoderSparsity,
    "combined": Combined,
}
"""Class of each kind of plan that a configuration may name."""


def sparsity_from_mapping(mapping: Mapping[str, Any]) -> Sparsity | None:
    """Build a plan from plain values, e.g. of a configuration file.

    Args:
        mapping: ``kind``, one of :data:`SPARSITIES` or ``none``, and the attributes of its class; lists stand for
            tuples, mappings for an :class:`EntropyBudget` and for the parts of :class:`Combined`.

    Returns:
        The plan; None for kind ``none``.

    Raises:
        ConfigError: no or an unknown kind, an unknown or missing key, or a value that the class refuses.
    """
    if not isinstance(mapping, Mapping) or "kind" not in mapping:
        raise ConfigError(f"a sparsity must be a mapping with 'kind', one of {_kinds()}, got {mapping!r}")
    values = dict(mapping)
    kind = values.pop("kind")
    if kind == "none":
        _require_keys(values, (), "sparsity of kind 'none'")
        return None
    if kind not in SPARSITIES:
        kinds = f"the kinds are {_kinds()}{suggestion(kind, SPARSITIES)}"
        raise ConfigError(f"there is no sparsity of kind {kind!r}; {kinds}")
    if kind == "combined" and isinstance(values.get("parts"), Sequence) and not isinstance(values["parts"], str):
        values["parts"] = tuple(sparsity_from_mapping(part) for part in values["parts"])
    if isinstance(values.get("entropy_budget"), Mapping):
        values["entropy_budget"] = _build(EntropyBudget, values["entropy_budget"], "entropy_budget")
    return _build(SPARSITIES[kind], values, f"sparsity of kind {kind!r}")


def _kinds() -> str:
    return ", ".join((*SPARSITIES, "none"))


def _build(cls: type, values: Mapping[str, Any], what: str) -> Any:
    fields = dataclasses.fields(cls)
    _require_keys(values, [field.name for field in fields], what)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
    if missing:
        raise ConfigError(f"{what} needs {missing[0]!r}")
    return cls(**values)


def _require_keys(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in values:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{what} has no key {key!r}; {takes}{suggestion(key, known)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_one_of(plan: Any, *names: str) -> None:
    given = [name for name in names if getattr(plan, name) is not None]
    if len(given) != 1:
        wanted = f"exactly one of {', '.join(names)}" if len(names) > 1 else names[0]
        raise ConfigError(f"{type(plan).__name__} needs {wanted}, got {' and '.join(given) or 'none'}")


def _require_fraction(plan: Any, name: str) -> None:
    value = getattr(plan, name)
    if value is not None and not (_is_number(value) and 0 <= value < 1):
        raise ConfigError(f"{type(plan).__name__}'s {name} must be a number in [0, 1), got {value!r}")


def _require_count(plan: Any, name: str, minimum: int) -> None:
    value = getattr(plan, name)
    if value is not None and not (_is_integer(value) and value >= minimum):
        raise ConfigError(f"{type(plan).__name__}'s {name} must be an integer of at least {minimum}, got {value!r}")


def _require_choice(plan: Any, name: str, choices: Sequence[str]) -> None:
    require_choice(f"{type(plan).__name__}'s {name}", getattr(plan, name), choices)


def _require_bool(plan: Any, name: str) -> None:
    value = getattr(plan, name)
    if not isinstance(value, bool):
        raise ConfigError(f"{type(plan).__name__}'s {name} must be true or false, got {value!r}")


def _set_layers(plan: Any) -> None:
    layers = plan.layers
    if layers is None:
        return
    valid = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 0
    if not valid or not all(_is_integer(layer) and layer >= 0 for layer in layers):
        raise ConfigError(f"{type(plan).__name__}'s layers must be indices from 0, at least one, got {layers!r}")
    object.__setattr__(plan, "layers", tuple(sorted(set(layers))))
