"""What a model can be penalised for while it trains: entropies of its attention or tokens, and their rivals.

Every penalty reads what the probes of :func:`entreg.adapters.probe` captured in the last forward pass (and, for
gates, what :func:`entreg.adapters.sparsify` selected) and returns one tensor per layer for
:class:`entreg.regularizer.EntropyRegularizer`, which weighs them, ramps them and applies the hinge. Entropies are in
nats. Which attention or which points the paper regularises is not stated; all of this is our reading.

The captures may be a ViT's or a causal decoder's. Of a decoder only what a query may see counts, padding never, and
with ``normalize`` every row counts alike, however many keys it sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from entreg import distributed
from entreg.adapters import probe
from entreg.entropy.anchors import ANCHOR_METHODS, HALFSPACE_METHODS
from entreg.errors import ConfigError, InputError
from entreg.names import require_choice, require_known
from entreg.regularizer import EntropyRegularizer, Term
from entreg.sparse.registries import SCORES
from entreg.training.quantities import QUANTITIES
from entreg.training.quantities.partition import points_of


@dataclass(frozen=True)
class PenaltySettings:
    """One penalty of a training run.

    Attributes:
        quantity: a name in :data:`entreg.training.quantities.QUANTITIES`.
        term: weight, schedule and hinge, see :class:`entreg.regularizer.Term`.
        layers: indices of the blocks it acts on; None for all.
        budget: number of keys, tokens or (``block_entropy``) key blocks that the hinge leaves free: the floor is
            log(budget) nats. At least 1; not together with the term's own floor, nor with ``normalize``.
        num_sampled_queries: query rows that attention quantities look at; None for all.
        normalize: of ``row_entropy``, ``block_entropy`` and ``key_entropy``: entropies as fractions of their maximum,
            for rows each of its own, log(number of keys or blocks that it may see), so that a decoder's early rows,
            which see few keys, count like late ones. The term's floor and target are fractions then, too: a floor f
            leaves a row that sees L keys free to use L^f of them (0.5 of 1,024: 32). A number of keys has no such
            fraction that holds for all rows, hence no ``budget``.
        block_size: of ``block_entropy``: keys per block; the block-sparse path's own.
        points: what ``ball`` and ``halfspace`` partition: ``keys`` (heads side by side) or ``tokens`` (block outputs).
        num_cells: anchors of ``ball``; of ``halfspace`` the number of cells, a power of two.
        sharpness: of ``ball`` and ``halfspace``, in units of the data's own scale.
        initialization: of their anchors: ``random``, ``kmeans++`` or ``farthest`` (ball), ``random`` or ``principal``
            (halfspace), on the first batch.
        score: selection score of ``selection_entropy``, see :func:`entreg.sparse.selection_scores`.
        distortion: weight of the distortion in ``rate_distortion``, in nats per unit of relative distortion.
    """

    quantity: str
    term: Term
    layers: tuple[int, ...] | None = None
    budget: float | None = None
    num_sampled_queries: int | None = 32
    normalize: bool = False
    block_size: int = 64
    points: str = "keys"
    num_cells: int = 16
    sharpness: float = 10.0
    initialization: str = "kmeans++"
    score: str = "mixed"
    distortion: float = 4.0

    def __post_init__(self) -> None:
        require_known([self.quantity], QUANTITIES, "penalty")
        require_choice("points of a penalty", self.points, ("keys", "tokens"))
        require_choice("score of a penalty", self.score, [name for name, one in SCORES.items() if not one.learned])
        methods = dict.fromkeys((*ANCHOR_METHODS, *HALFSPACE_METHODS))
        require_choice("initialization of a penalty", self.initialization, methods)
        if self.budget is not None and (self.budget < 1 or self.term.floor is not None):
            raise ConfigError("a penalty's budget must be at least 1, and its term must have no floor of its own")
        if self.normalize and not QUANTITIES[self.quantity].normalizes:
            able = ", ".join(name for name, one in QUANTITIES.items() if one.normalizes)
            raise ConfigError(f"normalize is for {able}, not for the penalty '{self.quantity}'")
        if self.normalize and self.budget is not None:
            raise ConfigError(
                "a penalty with normalize has no budget: give its floor, the fraction of the largest entropy that is "
                "left free, in [0, 1)"
            )
        if self.normalize and not _fraction(self.term.floor):
            raise ConfigError(f"the floor of a penalty with normalize must be in [0, 1), got {self.term.floor}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"block_size of a penalty must be a whole number of at least 1, got {self.block_size}")


def penalty_from_mapping(values: Mapping[str, Any]) -> PenaltySettings:
    """Settings from plain values, the fields of the term beside the penalty's own.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    own = {field.name for field in fields(PenaltySettings)} - {"term"}
    of_term = {field.name for field in fields(Term)}
    require_known(values, sorted(own | of_term), "key", "a penalty")
    chosen = {name: value for name, value in values.items() if name in own}
    if chosen.get("layers") is not None:
        chosen["layers"] = tuple(chosen["layers"])
    try:
        term = Term(**{name: value for name, value in values.items() if name in of_term})
        return PenaltySettings(term=term, **chosen)
    except (InputError, TypeError) as error:
        raise ConfigError(f"penalty {values.get('quantity')}: {error}") from error


class Penalties(nn.Module):
    """The penalties of a run and the regulariser that weighs them.

    Anchors are parameters of this module, chosen on the first batch of training; pass ``parameters()`` to the
    optimiser after :meth:`prepare`.

    Args:
        settings: by the name under which the penalty is logged. May be empty: the penalty is then 0.

    Attributes:
        regularizer: the :class:`~entreg.regularizer.EntropyRegularizer`, or None without penalties.
    """

    def __init__(self, settings: Mapping[str, PenaltySettings]) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.anchors = nn.ModuleDict()
        terms = {name: _with_floor(one) for name, one in self.settings.items()}
        self.regularizer = EntropyRegularizer(terms) if terms else None

    @property
    def need_captures(self) -> bool:
        """Whether a probe must be attached."""
        return any(not QUANTITIES[one.quantity].of_gate for one in self.settings.values())

    @property
    def needs_gate(self) -> bool:
        """Whether the sparse path must have a gate."""
        return any(QUANTITIES[one.quantity].of_gate for one in self.settings.values())

    def require_decoder(self) -> None:
        """Refuse penalties that a causal decoder cannot have, before anything slow.

        Raises:
            ConfigError: the selection of tokens or their gates, which a decoder's sparse path has not, or block
                outputs, which its probe does not capture.
        """
        for name, one in self.settings.items():
            if not QUANTITIES[one.quantity].of_decoders:
                raise ConfigError(
                    f"penalty {name}: a decoder selects no tokens, so it has no {one.quantity}; take row_entropy, "
                    "block_entropy, key_entropy or l1_logits"
                )
            if QUANTITIES[one.quantity].with_anchors and one.points == "tokens":
                raise ConfigError(f"penalty {name}: {one.quantity} of a decoder partitions its keys; set points: keys")

    @torch.no_grad()
    def prepare(self, captures: Sequence[Any], seed: int) -> None:
        """Choose the anchors of partition penalties from one batch's captures.

        Args:
            captures: of every layer, from a probe.
            seed: of the choice.

        Raises:
            ConfigError: a penalty names a layer that the model has not.
        """
        for name, one in self.settings.items():
            quantity = QUANTITIES[one.quantity]
            if not quantity.with_anchors:
                continue
            for capture in self._of_layers(name, captures):
                points = points_of(one, capture)
                module = quantity.make_anchors(one, points.shape[-1]).to(points.device)
                module.initialize_from(points.flatten(0, 1), method=one.initialization, seed=seed)
                self.anchors[f"{name}_{capture.layer}"] = module

    def forward(
        self, captures: Sequence[Any], gates: Sequence[Tensor], step: int
    ) -> tuple[Tensor | None, dict[str, float]]:
        """The weighted penalty of one step and the numbers for the log.

        Args:
            captures: of the forward pass, one per layer.
            gates: values in [0, 1] of every gate of the sparse path, (batch, patches) each.
            step: number of the training step.

        Returns:
            the penalty (None without penalties) and its parts, as from the regulariser.

        Raises:
            ConfigError: a layer that the model has not, or ``l1_gate`` without a gate.
        """
        if self.regularizer is None:
            return None, {}
        alone = distributed.num_processes() == 1
        values = {name: self._values(name, captures, gates) for name in self.settings}
        penalty, numbers = self.regularizer(values, step, adapt=alone)
        targets = [f"{name}/entropy" for name, term in self.regularizer.terms.items() if term.schedule == "target"]
        if not alone and targets:
            # Weights must be the same for all parts of a batch.
            means = {name: distributed.mean_of_all(numbers[name]) for name in targets}
            self.regularizer.adapt(means, step)
        return penalty, numbers

    def _values(self, name: str, captures: Sequence[Any], gates: Sequence[Tensor]) -> list[Tensor]:
        one = self.settings[name]
        quantity = QUANTITIES[one.quantity]
        if quantity.of_gate:
            if not gates:
                raise ConfigError(f"the penalty {one.quantity} needs a sparse path with score: gate in training")
            return [quantity.values(one, gate, None) for gate in gates]
        if any(not capture.causal and getattr(capture, "mask", None) is not None for capture in captures):
            raise ConfigError(
                f"the penalty {name} takes a decoder's attention for causal, and its mask lets tokens see later ones"
            )
        anchors = dict(self.anchors.items())
        return [
            quantity.values(one, capture, anchors.get(f"{name}_{capture.layer}"))
            for capture in self._of_layers(name, captures)
        ]

    def _of_layers(self, name: str, captures: Sequence[Any]) -> list[Any]:
        layers = self.settings[name].layers
        if layers is None:
            return list(captures)
        by_layer = {capture.layer: capture for capture in captures}
        missing = [layer for layer in layers if layer not in by_layer]
        if missing:
            raise ConfigError(f"penalty {name} names layer {missing[0]}, the model has layers {sorted(by_layer)}")
        return [by_layer[layer] for layer in layers]


def _fraction(floor: Any) -> bool:
    limits = torch.as_tensor(0.0 if floor is None else floor)
    return bool(((limits >= 0) & (limits < 1)).all())


def _with_floor(settings: PenaltySettings) -> Term:
    if settings.budget is None:
        return settings.term
    values = {field.name: getattr(settings.term, field.name) for field in fields(Term)}
    return Term(**{**values, "floor": math.log(settings.budget)})


def prepare_penalties(model: nn.Module, penalties: Penalties, inputs: Tensor, seed: int) -> None:
    """Choose the anchors of partition penalties from one batch, of images or tokens, of the dense model."""
    handle = probe(model)
    try:
        with torch.no_grad():
            model(inputs)
            penalties.prepare(handle.captures, seed)
    finally:
        handle.remove()
