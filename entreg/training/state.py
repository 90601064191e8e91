"""Everything in a training run that changes from step to step, and its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entreg import distributed
from entreg.errors import ConfigError
from entreg.names import suggestion
from entreg.training.checkpoints import Checkpoint, frozen_record, save_checkpoint
from entreg.training.progress import LossMeter
from entreg.training.settings import TrainingSettings
from entreg.training.sharding import part_of, whole
from entreg.weights import frozen_weights

_SCHEDULES = {"cosine": "cosine", "linear": "poly", "constant": "step"}
"""timm's names: a polynomial of power 1, and steps that change nothing."""


class TrainingState:
    """Weights, their moving average, optimiser, objective, unfinished means of the log, and the step.

    Order of the data, augmentation, mixing and the model's random numbers are functions of seed and step
    (:mod:`entreg.training.batches`), as the learning rate is of the step; so none of them has a state of its own.

    Frozen parameters are what the run began with: a checkpoint holds a fingerprint of them, not them, so that one of
    a low-rank training is small. It can be restored, or loaded, only onto the same ones.

    Args:
        model: on its device.
        extra_parameters: trained besides the model's, without weight decay; those that are the model's are left out.
        objective: its ``state_dict`` is kept if it has one.
        settings: of optimiser, schedule and moving average.
        meter: whose sums are kept.

    Attributes:
        model, extra: what is trained; ``trained`` are all parameters that have gradients.
        averaged: timm's moving average of the weights, or None.
        done: number of finished steps.
        seconds: that they took.

    Raises:
        ConfigError: the optimiser does not exist, or nothing is to be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        extra_parameters: Iterable[nn.Parameter],
        objective: Any,
        settings: TrainingSettings,
        meter: LossMeter,
    ) -> None:
        own = {id(parameter) for parameter in model.parameters()}
        self.model, self.objective, self.meter = model, objective, meter
        self.extra = [parameter for parameter in extra_parameters if id(parameter) not in own]
        device = next(model.parameters()).device
        for parameter in self.extra:
            parameter.data = parameter.data.to(device)
        # One module for all weights, so that they are averaged together.
        self._weights = nn.ModuleDict({"model": model, "extra": nn.ParameterList(self.extra)})
        self.trained = [parameter for parameter in self._weights.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ConfigError("nothing is to be trained: no parameter of the model requires a gradient")
        self.optimizer, self._scheduler = _optimizer(model, self.extra, settings)
        self._frozen = frozen_weights(model)
        # Gradients that the caller or a run that stopped has left must not be added to.
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged = None
        if settings.ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.averaged = ModelEmaV3(self._weights, decay=settings.ema_decay, use_warmup=True)
        self.done, self.seconds = 0, 0.0

    @property
    def best_model(self) -> nn.Module:
        """The averaged model where there is one, else the model."""
        return self.model if self.averaged is None else self.averaged.module["model"]

    @property
    def learning_rate(self) -> float:
        """Of the last step; with layer decay, of the last layer."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def begin_step(self, step: int) -> None:
        """Set the learning rate of a step."""
        self._scheduler.step_update(step)

    def end_step(self) -> None:
        """Apply the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.averaged is not None:
            self.averaged.update(self._weights, step=self.done)

    def use_average(self) -> None:
        """Replace the weights by their moving average, where there is one; the end of training."""
        if self.averaged is not None:
            self._weights.load_state_dict(self.averaged.module.state_dict())

    def save(self, root: Path, identity: Mapping[str, Any], keep: int) -> None:
        """Write a checkpoint; every process calls it, the first one writes.

        Args:
            root: folder of the run's checkpoints.
            identity: what must be the same where it is restored, plain values.
            keep: number of checkpoints that stay.
        """
        averaged = None if self.averaged is None else self.averaged.module
        state = {
            "identity": identity,
            "optimizer": whole(self.optimizer.state_dict()),
            "extra": [parameter.detach() for parameter in self.extra],
            "averaged_extra": None if averaged is None else [value.detach() for value in averaged["extra"]],
            "meter": self.meter.state_dict(),
            "seconds": self.seconds,
            "objective": self.objective.state_dict() if hasattr(self.objective, "state_dict") else None,
            "frozen": frozen_record(self._frozen),
        }
        weights = whole(self._kept(self.model))
        if distributed.is_first():
            save_checkpoint(
                root,
                self.done,
                weights,
                state,
                averaged=None if averaged is None else self._kept(averaged["model"]),
                keep=keep,
            )

    def restore(self, found: Checkpoint, identity: Mapping[str, Any]) -> None:
        """Go back to a checkpoint.

        Raises:
            ConfigError: it is of another configuration or model; the sentence says what differs, nothing is changed.
        """
        reason = _difference(found.state["identity"], identity) or found.difference(self.model)
        if reason is None and [value.shape for value in found.state["extra"]] != [one.shape for one in self.extra]:
            reason = "the extra parameters have other shapes"
        if reason is not None:
            raise ConfigError(
                f"The checkpoint {found.path} is of another run: {reason}; choose another folder, or start again with "
                "resume=null."
            )
        own = self.model.state_dict()
        # Not strict: frozen parameters, which are not in it, are where they belong.
        self.model.load_state_dict(
            {name: part_of(value, own[name]) for name, value in found.model.items()}, strict=False
        )
        _copy(self.extra, found.state["extra"])
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        kept = {
            index: {name: part_of(value, parameters[index]) for name, value in values.items()}
            for index, values in found.state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**found.state["optimizer"], "state": kept})
        if self.averaged is not None:
            self.averaged.module["model"].load_state_dict(found.averaged, strict=False)
            _copy(self.averaged.module["extra"], found.state["averaged_extra"])
        if hasattr(self.objective, "load_state_dict") and found.state["objective"] is not None:
            self.objective.load_state_dict(found.state["objective"])
        self.meter.load_state_dict(found.state["meter"])
        self.done, self.seconds = found.step, found.state["seconds"]

    def _kept(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of a model, or of its average, that are trained."""
        return {name: value for name, value in model.state_dict().items() if name not in self._frozen}


@torch.no_grad()
def _copy(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """The first place where two nested configurations differ, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        texts = (_difference(found.get(key), wanted.get(key), f"{name}.{key}") for key in keys)
        return next((text for text in texts if text is not None), None)
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        found, wanted = list(found), list(wanted)
    return None if found == wanted else f"{name.removeprefix('.')} was {found!r} and is now {wanted!r}"


def require_optimizer(name: str) -> None:
    """Make sure that timm has an optimiser.

    Raises:
        ConfigError: it has not.
    """
    from timm.optim import list_optimizers

    if name not in list_optimizers():
        raise ConfigError(
            f"there is no optimizer '{name}'; timm has adamw, sgd, lamb, muon and those that "
            f"timm.optim.list_optimizers() names{suggestion(name, list_optimizers())}"
        )


def _optimizer(model: nn.Module, extra: list[nn.Parameter], settings: TrainingSettings) -> tuple[Any, Any]:
    """timm's optimiser and schedule; extra parameters are a group without weight decay."""
    require_optimizer(settings.optimizer)
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    # One pass over the weights per step instead of a dozen; torch's own Adam has it on every device.
    fused = {"fused": True} if settings.optimizer in ("adam", "adamw") else {}
    optimizer = create_optimizer_v2(
        model,
        opt=settings.optimizer,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        **fused,
    )
    if extra:
        optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=_SCHEDULES[settings.schedule],
        num_epochs=settings.steps,
        decay_epochs=settings.steps + 1,
        # The power of a polynomial, the factor of a step.
        decay_rate=1.0,
        min_lr=settings.final_learning_rate,
        # timm starts a warm-up of w steps at this value; so no step has a rate of zero.
        warmup_lr=settings.learning_rate / (settings.warmup_steps + 1),
        warmup_epochs=settings.warmup_steps,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return optimizer, scheduler
