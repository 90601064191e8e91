"""The entropy regulariser: named entropies in, one penalty and the numbers for the logger out.

It knows no model and no entropy in particular: it takes tensors of entropies, from :mod:`entreg.entropy` or from
anywhere else, and adds up ``weight * mean(max(entropy - floor, 0))`` over its terms with weights that follow a
schedule. (The paper adds lambda times an entropy to the task loss and leaves schedule and floor open: all of that is
our choice.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.names import require_choice

SCHEDULES = ("constant", "linear", "cosine", "target")


@dataclass(frozen=True)
class Term:
    """How one entropy is penalised.

    Attributes:
        weight: lambda once the warm-up is over; at least 0. For ``"target"`` the value that the controller starts
            from, above 0.
        schedule: ``"constant"``; ``"linear"`` or ``"cosine"``, from ``weight`` at the end of the warm-up to
            ``final_weight`` at ``total_steps``; ``"target"``, a controller that adapts lambda until the entropy is
            ``target``: after the warm-up each step multiplies lambda by exp(gain * (entropy - target)), within
            [minimum_weight, maximum_weight], with the entropy averaged over steps by ``smoothing``.
        start_step: first step with a penalty, at least 0.
        warmup_steps: steps over which the weight grows linearly from 0, at least 0.
        total_steps: step at which ``"linear"`` and ``"cosine"`` arrive; after the warm-up.
        final_weight: where they arrive, at least 0.
        floor: hinge: entropy below it (nats) is not penalised. One number for all, or a sequence or tensor that
            broadcasts against the term's entropies, e.g. one floor per layer.
        target: wanted mean entropy in nats (before the hinge), for ``"target"``.
        gain: the controller's rate per nat and step, above 0.
        smoothing: the controller's weight of the past, in [0, 1).
        minimum_weight, maximum_weight: limits of the controller, 0 < minimum <= weight <= maximum.

    Raises:
        InputError: values out of range or missing for the schedule.
    """

    weight: float
    schedule: str = "constant"
    start_step: int = 0
    warmup_steps: int = 0
    total_steps: int | None = None
    final_weight: float = 0.0
    floor: float | Sequence[float] | Tensor | None = None
    target: float | None = None
    gain: float = 0.01
    smoothing: float = 0.9
    minimum_weight: float = 1e-6
    maximum_weight: float = 1e3

    def __post_init__(self) -> None:
        require_choice("schedule", self.schedule, SCHEDULES, InputError)
        for name in ("weight", "final_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be finite and at least 0, got {value}")
        if self.start_step < 0 or self.warmup_steps < 0:
            raise InputError(
                f"start_step and warmup_steps must be at least 0, got {self.start_step} and {self.warmup_steps}"
            )
        if self.schedule in ("linear", "cosine") and (
            self.total_steps is None or self.total_steps <= self.start_step + self.warmup_steps
        ):
            raise InputError(
                f"schedule {self.schedule!r} needs total_steps after the end of the warm-up at step "
                f"{self.start_step + self.warmup_steps}, got {self.total_steps}"
            )
        if self.schedule == "target":
            self._check_controller()
        if self.floor is not None and not torch.isfinite(torch.as_tensor(self.floor)).all():
            raise InputError("floor must be finite; leave it None for no floor")

    def _check_controller(self) -> None:
        if self.target is None or not math.isfinite(self.target):
            raise InputError(f"schedule 'target' needs a finite target entropy, got {self.target}")
        if not (math.isfinite(self.gain) and self.gain > 0 and 0 <= self.smoothing < 1):
            raise InputError(f"gain must be above 0 and smoothing in [0, 1), got {self.gain} and {self.smoothing}")
        if not 0 < self.minimum_weight <= self.weight <= self.maximum_weight < math.inf:
            raise InputError(
                "schedule 'target' needs 0 < minimum_weight <= weight <= maximum_weight, got "
                f"{self.minimum_weight}, {self.weight}, {self.maximum_weight}"
            )

    def scheduled_weight(self, step: int) -> float:
        """The weight at a step; for ``"target"`` without what the controller has learned."""
        since = step - self.start_step
        if since < 0:
            return 0.0
        if since < self.warmup_steps:
            return self.weight * (since + 1) / (self.warmup_steps + 1)
        if self.schedule in ("constant", "target"):
            return self.weight
        begin = self.start_step + self.warmup_steps
        progress = min((step - begin) / (self.total_steps - begin), 1.0)
        if self.schedule == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        return self.weight + (self.final_weight - self.weight) * progress


class EntropyRegularizer:
    """Penalty on named entropies; three lines in anybody's training loop.

    >>> regularizer = EntropyRegularizer({"keys": Term(weight=0.3, warmup_steps=100, floor=2.6)})
    >>> penalty, values = regularizer({"keys": attention_key_entropy(q, k)}, step)
    >>> (task_loss + penalty).backward()

    ``values`` is a flat dictionary of floats for the logger: ``"keys/entropy"`` (mean, nats), ``"keys/weight"`` and
    ``"keys/penalty"``. Reading them waits for a GPU once per call.

    Save ``state_dict()`` with a checkpoint: it holds what the controllers of ``"target"`` terms have learned. With
    several processes each controller sees its own process's entropies, unless it is called with ``adapt=False`` and
    :meth:`adapt` with the mean of all.

    Args:
        terms: name to :class:`Term`, or to a number, which stands for ``Term(weight=number)``. At least one.

    Raises:
        InputError: no terms, a name with a slash, or a term out of range.
    """

    def __init__(self, terms: Mapping[str, Term | float]) -> None:
        if not terms:
            raise InputError("EntropyRegularizer needs at least one term")
        self.terms: dict[str, Term] = {}
        for name, term in terms.items():
            if not isinstance(name, str) or not name or "/" in name:
                raise InputError(f"a term's name must be a non-empty string without '/', got {name!r}")
            self.terms[name] = term if isinstance(term, Term) else Term(weight=float(term))
        self._learned = {
            name: {"weight": term.weight, "entropy": None}
            for name, term in self.terms.items()
            if term.schedule == "target"
        }
        self._last_step = -1

    def weight(self, name: str, step: int) -> float:
        """The present weight of a term at a step.

        Raises:
            InputError: no such term.
        """
        if name not in self.terms:
            raise InputError(f"no term {name!r}; the terms are {sorted(self.terms)}")
        weight = self.terms[name].scheduled_weight(step)
        if name in self._learned and self.terms[name].weight > 0:
            weight *= self._learned[name]["weight"] / self.terms[name].weight
        return weight

    def __call__(
        self, entropies: Mapping[str, Tensor | Sequence[Tensor]], step: int, *, adapt: bool = True
    ) -> tuple[Tensor, dict[str, float]]:
        """Penalty of one training step.

        Args:
            entropies: for every term a tensor of entropies in nats, any shape (for example batch x heads), or a
                sequence of such tensors of equal shape (for example one per layer), which is stacked.
            step: number of the step, from 0. A controller adapts at most once per step number, so that gradient
                accumulation and repeated evaluation do not count twice.
            adapt: False to leave the controllers alone (validation).

        Returns:
            the penalty, a scalar tensor with gradient, and the floats for the logger.

        Raises:
            InputError: names differ from the terms', a negative step, a floor that does not broadcast, or an entropy
                that is empty or not finite; the sentence names the term.
        """
        if step < 0:
            raise InputError(f"step must be at least 0, got {step}")
        if set(entropies) != set(self.terms):
            raise InputError(f"entropies must be given for {sorted(self.terms)}, got {sorted(entropies)}")
        means, excesses, weights = [], [], []
        for name, term in self.terms.items():
            entropy = _as_tensor(name, entropies[name])
            means.append(entropy.detach().mean())
            excesses.append(_excess(name, entropy, term.floor).mean())
            weights.append(self.weight(name, step))
        penalty = sum(weight * excess.to(excesses[0].device) for weight, excess in zip(weights, excesses, strict=True))
        # One transfer for all numbers, because each one waits for the device.
        numbers = torch.stack([value.detach().to(excesses[0]) for value in (*means, *excesses)]).tolist()
        count = len(self.terms)
        values: dict[str, float] = {}
        for name, weight, mean, excess in zip(self.terms, weights, numbers[:count], numbers[count:], strict=True):
            if not math.isfinite(mean) or not math.isfinite(excess):
                raise InputError(f"the entropy of term {name!r} is not finite ({mean}) at step {step}")
            values |= {f"{name}/entropy": mean, f"{name}/weight": weight, f"{name}/penalty": weight * excess}
        if adapt:
            self.adapt(values, step)
        return penalty, values

    def adapt(self, values: Mapping[str, float], step: int) -> None:
        """Let the controllers of ``"target"`` terms adapt, at most once per step number.

        Args:
            values: ``<name>/entropy``, the mean entropy in nats, of every such term, as the call gives them.
            step: number of the step, from 0.
        """
        if step <= self._last_step:
            return
        self._last_step = step
        for name, learned in self._learned.items():
            term, entropy = self.terms[name], values[f"{name}/entropy"]
            past = learned["entropy"]
            smooth = entropy if past is None else term.smoothing * past + (1.0 - term.smoothing) * entropy
            learned["entropy"] = smooth
            if step < term.start_step + term.warmup_steps:
                continue
            # In logarithms, with the exponent limited, so that no gain can overflow before the limits apply.
            change = min(max(term.gain * (smooth - term.target), -50.0), 50.0)
            weight = learned["weight"] * math.exp(change)
            learned["weight"] = min(max(weight, term.minimum_weight), term.maximum_weight)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the last step seen and the controllers' weights and averages."""
        return {
            "last_step": self._last_step,
            "learned": {name: dict(learned) for name, learned in self._learned.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            InputError: the state is of other terms or has a value out of range; nothing is changed then.
        """
        learned = state.get("learned")
        if not isinstance(learned, Mapping) or set(learned) != set(self._learned) or "last_step" not in state:
            found = sorted(learned) if isinstance(learned, Mapping) else learned
            raise InputError(f"the state must hold the controllers of {sorted(self._learned)}, got {found}")
        for name, values in learned.items():
            term = self.terms[name]
            if not term.minimum_weight <= values["weight"] <= term.maximum_weight:
                raise InputError(f"the state's weight of term {name!r}, {values['weight']}, is outside its limits")
        self._learned = {name: dict(values) for name, values in learned.items()}
        self._last_step = int(state["last_step"])


def _as_tensor(name: str, entropy: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(entropy, Tensor):
        parts = list(entropy)
        if len({part.shape for part in parts}) != 1:
            raise InputError(f"the entropies of term {name!r} must be a tensor or a sequence of equal shapes")
        entropy = torch.stack(parts)
    if entropy.numel() == 0 or not entropy.is_floating_point():
        raise InputError(f"the entropies of term {name!r} must be a non-empty floating-point tensor")
    return entropy


def _excess(name: str, entropy: Tensor, floor: float | Sequence[float] | Tensor | None) -> Tensor:
    if floor is None:
        return entropy
    limit = torch.as_tensor(floor, dtype=entropy.dtype, device=entropy.device)
    try:
        fits = torch.broadcast_shapes(limit.shape, entropy.shape) == entropy.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"the floor of term {name!r}, of shape {tuple(limit.shape)}, must broadcast against its entropies, "
            f"{tuple(entropy.shape)}"
        )
    # relu, not clamp: no gradient where the entropy equals the floor.
    return torch.relu(entropy - limit)
