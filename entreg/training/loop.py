"""The one training loop of all experiments.

It trains what it is given: a model, an objective and a data set; devices and processes are accelerate's business,
optimisers, schedules, mixing and weight averaging timm's. Every step is a function of the state before it, the seed
and its number (:mod:`entreg.training.batches`), so a killed run that is resumed from its newest checkpoint ends, on a
CPU, with the same weights to the bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from entreg.atomic import require_writable
from entreg.compat import ensure_torchvision
from entreg.errors import ConfigError, InputError, TrainingError
from entreg.training.batches import (
    Mixing,
    PositionedDataset,
    Positions,
    batch_loader,
    kept_random_state,
    seed_forward,
)
from entreg.training.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    weights_difference,
)
from entreg.training.progress import LossMeter, MetricsLog
from entreg.training.settings import TrainingSettings, training_settings_from_mapping

__all__ = ["TrainingResult", "TrainingSettings", "train", "training_settings_from_mapping"]

Objective = Callable[[nn.Module, Mapping[str, Any], int], tuple[Tensor, Mapping[str, Any]]]


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        steps: finished steps, those of earlier sessions included.
        seconds: wall-clock seconds of these steps, checkpoints and evaluations included.
        history: rows of the log, oldest first: ``step`` (finished steps), ``loss`` and the objective's parts (means
            since the row before), ``gradient_norm`` before clipping, ``learning_rate``, ``seconds`` and, where the
            model was evaluated, ``evaluation/<name>``.
        directory: of the run: ``metrics.jsonl`` and ``checkpoints/``.
        checkpoint: folder of the final checkpoint.
    """

    steps: int
    seconds: float
    history: list[dict[str, Any]]
    directory: Path
    checkpoint: Path


def train(
    model: nn.Module,
    objective: Objective,
    dataset: Any,
    settings: TrainingSettings,
    directory: str | Path,
    *,
    resume: str | None = "auto",
    extra_parameters: Iterable[nn.Parameter] = (),
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    configuration: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> TrainingResult:
    """Train a model in place.

    Under ``torchrun`` or ``accelerate launch`` every process calls it alike; the first one writes. The weights are
    then, up to rounding, those of one process with the same global batch, unless the model draws random numbers.

    Args:
        model: moved to the device, left there in evaluation mode, with the averaged weights when there are any.
        objective: ``objective(model, batch, step)`` gives the mean loss of the (part of a) batch, a scalar, and named
            numbers for the log, floats or scalar tensors; those that make up the loss tell which of them broke it.
            Its ``state_dict`` and ``load_state_dict``, if it has them, are kept in checkpoints. ``step`` counts from 0.
        dataset: map-style, items are mappings of tensors with at least ``images``; ``__getitems__`` is used when
            there; see :class:`entreg.training.batches.PositionedDataset`.
        settings: everything else that decides the run.
        directory: of the run; made when missing.
        resume: ``"auto"`` goes on from the newest undamaged checkpoint in the directory, if there is one; None starts
            again and removes what is there.
        extra_parameters: trained with the model's, without weight decay; for example gates and anchors. They are
            moved to the device in place.
        evaluate: ``evaluate(model, step)`` with the number of finished steps and the averaged model, if any, in
            evaluation mode; called by all processes.
        augment: see :class:`entreg.training.batches.PositionedDataset`.
        configuration: plain values, besides the settings, without which a run must not be resumed.
        device: ``auto`` (an accelerator if there is one) or ``cpu``.

    Returns:
        What was trained and where it lies.

    Raises:
        ConfigError: settings that do not fit the model, the data or the number of processes, or the checkpoint in the
            directory is of another configuration; the sentence says what differs.
        TrainingError: the loss or its gradient is not finite, or the objective refused its input; the last good
            checkpoint is kept.
        OutputError: the directory cannot be written.
    """
    if resume not in ("auto", None):
        raise ConfigError(f"resume must be auto or null, got '{resume}'")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"the device of training must be auto or cpu, got '{device}'")
    if settings.steps == 0:
        raise ConfigError("training needs at least one step, got steps: 0")
    with kept_random_state():
        run = _Run(model, objective, dataset, settings, Path(directory), extra_parameters, augment, device)
        run.evaluate = evaluate
        run.identity = run.describe(configuration)
        try:
            run.start(resume)
            return run.finish()
        finally:
            run.stop()


class _Run:
    """One run in one process: what its steps share."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dataset: Any,
        settings: TrainingSettings,
        directory: Path,
        extra_parameters: Iterable[nn.Parameter],
        augment: Callable[[Tensor], Tensor] | None,
        device: str,
    ) -> None:
        self.settings, self.directory, self.objective, self.model = settings, directory, objective, model
        self.data = PositionedDataset(dataset, settings.seed, augment)
        # Autocast is entered around the whole objective, so accelerate must not wrap the model for it.
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        processes = self.accelerator.num_processes
        self.parts = processes * settings.gradient_accumulation
        if settings.batch_size % self.parts:
            raise ConfigError(
                f"batch_size {settings.batch_size} must be a multiple of processes x gradient_accumulation, "
                f"{processes} x {settings.gradient_accumulation}"
            )
        if settings.mixes and settings.batch_size // self.parts % 2:
            raise ConfigError(
                f"mixup and cutmix need an even number of images in every part of a batch, got {settings.batch_size} "
                f"in {self.parts} parts"
            )
        model.to(self.accelerator.device)
        own = {id(parameter) for parameter in model.parameters()}
        extra = [parameter for parameter in extra_parameters if id(parameter) not in own]
        for parameter in extra:
            parameter.data = parameter.data.to(self.accelerator.device)
        # One module for all weights: for averaging, and for checkpoints.
        self.weights = nn.ModuleDict({"model": model, "extra": nn.ParameterList(extra)})
        self.extra = extra
        self.trained = [parameter for parameter in self.weights.parameters() if parameter.requires_grad]
        self.checkpointing = _gradient_checkpointing(model, settings.gradient_checkpointing)
        self.optimizer, self.scheduler = _optimizer(model, extra, settings)
        self.averaged = _averaged(self.weights, settings)
        self.mixing = None
        if settings.mixes:
            self.mixing = Mixing(
                settings.mixup, settings.cutmix, settings.mixing_probability, settings.num_classes, settings.seed
            )
        alone_on_cpu = processes == 1 and self.accelerator.device.type == "cpu"
        self.meter = LossMeter(self.accelerator, 1 if alone_on_cpu else settings.log_every)
        self.done, self.seconds = 0, 0.0
        self.last_good: Path | None = None
        self.log: MetricsLog | None = None
        self.evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
        self.identity: dict[str, Any] = {}

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def describe(self, configuration: Mapping[str, Any] | None) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {
            "settings": self.settings.deciding(),
            "data": {"items": len(self.data)},
            "configuration": {} if configuration is None else dict(configuration),
        }

    def start(self, resume: str | None) -> None:
        """Restore the newest checkpoint, or clear the directory."""
        main = self.accelerator.is_main_process
        if main:
            require_writable(self.directory)
        found = self._agreed_checkpoint() if resume == "auto" else None
        if found is not None:
            self._restore(found)
        if main:
            if found is None:
                remove_checkpoints(self.checkpoints)
            self.log = MetricsLog(self.directory / "metrics.jsonl", self.done)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainingResult:
        """Take the steps that are left."""
        settings = self.settings
        if self.done < settings.steps:
            self._train()
        if self.averaged is not None:
            self.weights.load_state_dict(self.averaged.module.state_dict())
        self.model.eval()
        history = self.log.rows if self.log is not None else []
        return TrainingResult(self.done, self.seconds, history, self.directory, self.last_good)

    def stop(self) -> None:
        """Leave the model as it was, but for its weights."""
        if self.checkpointing is not None:
            self.model.set_grad_checkpointing(self.checkpointing)

    def _train(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        accumulation, first = settings.gradient_accumulation, accelerator.process_index * settings.gradient_accumulation
        mine = range(first, first + accumulation)
        positions = Positions(
            len(self.data),
            settings.batch_size,
            settings.seed,
            range(self.done, settings.steps),
            self.parts,
            mine,
        )
        on_gpu = accelerator.device.type == "cuda"
        batches = iter(batch_loader(self.data, positions, num_workers=settings.num_workers, pin=on_gpu))
        model = accelerator.prepare_model(self.model) if accelerator.num_processes > 1 else self.model
        self.model.train()
        bar = tqdm(
            total=settings.steps,
            initial=self.done,
            desc=self.directory.name[:40],
            unit="step",
            mininterval=1.0,
            # The bar is always there; only one process draws it.
            disable=not accelerator.is_main_process,
        )
        with bar:
            began = time.perf_counter() - self.seconds
            for step in range(self.done, settings.steps):
                self._step(model, batches, step, mine)
                self.done = step + 1
                self.seconds = time.perf_counter() - began
                self._write(bar)
                self.seconds = time.perf_counter() - began
                bar.update()

    def _step(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], step: int, mine: range) -> None:
        self.scheduler.step_update(step)
        losses, parts = [], []
        for part in mine:
            batch = _moved(next(batches), self.accelerator.device)
            if self.mixing is not None:
                batch = self.mixing(batch, step)
            seed_forward(self.settings.seed, step, part)
            last = part == mine[-1]
            # Gradients of several processes are added up once, after the last part.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                try:
                    with self._autocast():
                        loss, numbers = self.objective(model, batch, step)
                except InputError as error:
                    raise self._stopped(f"{error}, in step {step} (the first is 0)") from error
                (loss / len(mine)).backward()
            losses.append(loss)
            parts.append(numbers)
        if self.accelerator.num_processes > 1:
            for parameter in self.extra:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        norm = get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        try:
            self.meter.add(step, losses, parts, norm)
            if self._due(step + 1):
                self.meter.read()
        except TrainingError as error:
            raise self._stopped(str(error)) from error
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(self.trained, self.settings.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update(self.weights, step=step + 1)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def _stopped(self, reason: str) -> TrainingError:
        kept = "there is no checkpoint yet"
        if self.last_good is not None:
            kept = f"the last good checkpoint is {self.last_good}"
        return TrainingError(f"Training stopped: {reason}; {kept}.")

    def _due(self, done: int, every: int | None = 1) -> bool:
        """Whether anything that needs checked numbers, or what comes ``every`` so many steps, is due now."""
        settings = self.settings
        if every == 1:
            return any(self._due(done, one or 0) for one in (settings.checkpoint_every, settings.log_every))
        return done == settings.steps or (bool(every) and done % every == 0)

    def _write(self, bar: Any) -> None:
        """After a step: the log, the evaluation and the checkpoint that are due."""
        settings = self.settings
        evaluated = {}
        if self.evaluate is not None and self._due(self.done, settings.evaluate_every):
            evaluated = self._evaluated()
        if evaluated or self._due(self.done, settings.log_every):
            row = {"step": self.done, **self.meter.means(), "learning_rate": self.optimizer.param_groups[0]["lr"]}
            row |= {"seconds": self.seconds, **evaluated}
            if self.log is not None:
                self.log.append(row)
                bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
        if self._due(self.done, settings.checkpoint_every):
            self._save()

    def _evaluated(self) -> dict[str, float]:
        model = self.model if self.averaged is None else self.averaged.module["model"]
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with kept_random_state(), torch.no_grad():
                numbers = self.evaluate(model, self.done)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return {f"evaluation/{name}": float(value) for name, value in numbers.items()}

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            weights = self.weights.state_dict()
            state = {
                "identity": self.identity,
                "optimizer": self.optimizer.state_dict(),
                "extra": [parameter.detach() for parameter in self.extra],
                "meter": self.meter.state_dict(),
                "seconds": self.seconds,
                "objective": self.objective.state_dict() if hasattr(self.objective, "state_dict") else None,
                "averaged": None if self.averaged is None else self.averaged.module.state_dict(),
            }
            averaged = None if self.averaged is None else _of_model(state["averaged"])
            self.last_good = save_checkpoint(
                self.checkpoints,
                self.done,
                _of_model(weights),
                state,
                averaged=averaged,
                keep=self.settings.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _agreed_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the first process would go on from, read by all."""
        found = latest_checkpoint(self.checkpoints) if self.accelerator.is_main_process else None
        if self.accelerator.num_processes == 1:
            return found
        path = broadcast_object_list([None if found is None else str(found.path)])[0]
        if path is None or found is not None:
            return found
        return read_checkpoint(Path(path))

    def _restore(self, found: Checkpoint) -> None:
        differences = _differences(found.state["identity"], self.identity)
        if differences:
            raise ConfigError(
                f"the checkpoint {found.path} is of another run ({differences[0]}); choose another folder, or start "
                "again with resume=null"
            )
        reason = weights_difference(self.model, found.model)
        if reason:
            raise ConfigError(f"the checkpoint {found.path} is of another model: {reason}")
        self.model.load_state_dict(found.model)
        with torch.no_grad():
            for parameter, value in zip(self.extra, found.state["extra"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(found.state["optimizer"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(found.state["averaged"])
        if hasattr(self.objective, "load_state_dict") and found.state["objective"] is not None:
            self.objective.load_state_dict(found.state["objective"])
        self.meter.load_state_dict(found.state["meter"])
        self.done, self.seconds, self.last_good = found.step, found.state["seconds"], found.path


def _of_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Where two nested configurations differ, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        return [text for key in keys for text in _differences(found.get(key), wanted.get(key), f"{name}.{key}")]
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        found, wanted = list(found), list(wanted)
    return [] if found == wanted else [f"{name.removeprefix('.')} was {found!r} and is now {wanted!r}"]


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _gradient_checkpointing(model: nn.Module, wanted: bool) -> Any:
    """Switches it on where it is wanted; what :meth:`set_grad_checkpointing` must be given to undo that, or None."""
    if not wanted:
        return None
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing: false")
    model.set_grad_checkpointing(True)
    return False


def _optimizer(model: nn.Module, extra: list[nn.Parameter], settings: TrainingSettings) -> tuple[Any, Any]:
    """timm's optimiser and schedule; extra parameters are a group without weight decay."""
    ensure_torchvision()
    from timm.optim import create_optimizer_v2, list_optimizers
    from timm.scheduler import create_scheduler_v2

    if settings.optimizer not in list_optimizers():
        raise ConfigError(
            f"there is no optimizer '{settings.optimizer}'; timm has adamw, sgd, lamb, muon and those that "
            "timm.optim.list_optimizers() names"
        )
    optimizer = create_optimizer_v2(
        model,
        opt=settings.optimizer,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    if extra:
        optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
    constant = settings.schedule == "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # A step schedule that never steps: timm's name for a warm-up and then nothing.
        sched="step" if constant else {"cosine": "cosine", "linear": "poly"}[settings.schedule],
        num_epochs=settings.steps,
        decay_epochs=settings.steps + 1,
        warmup_epochs=settings.warmup_steps,
        warmup_lr=settings.learning_rate / (settings.warmup_steps + 1),
        warmup_prefix=False,
        min_lr=settings.final_learning_rate,
        cooldown_epochs=0,
        decay_rate=1.0,
        k_decay=1.0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    if settings.schedule == "linear":
        scheduler.power = 1.0
    return optimizer, scheduler


def _averaged(weights: nn.Module, settings: TrainingSettings) -> Any:
    if settings.ema_decay is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(weights, decay=settings.ema_decay, use_warmup=True)
