"""The one training loop of all experiments.

It trains what it is given: a model, an objective and a data set; devices and processes are accelerate's business,
optimisers, schedules, mixing and weight averaging timm's. Every step is a function of the state before it, the seed
and its number (:mod:`entreg.training.batches`), so a killed run that is resumed from its newest checkpoint ends, on a
CPU, with the same weights to the bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from entreg.adapters.timm_path import SparseBlocks
from entreg.atomic import require_writable
from entreg.distributed import is_first
from entreg.errors import AssetError, ConfigError, InputError, TrainingError
from entreg.progress import Progress, progress_bar
from entreg.runs.lock import exclusive
from entreg.training.batches import (
    Mixing,
    PositionedDataset,
    Positions,
    batch_loader,
    kept_random_state,
    loading_errors,
    seed_forward,
)
from entreg.training.checkpoints import (
    Checkpoint,
    checkpoint_folder,
    latest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
)
from entreg.training.progress import LossMeter, MetricsLog
from entreg.training.settings import TrainingSettings, training_settings_from_mapping
from entreg.training.sharding import check_sharding, is_sharded, shard, sharding_wanted
from entreg.training.state import TrainingState

if TYPE_CHECKING:
    from entreg.tracking import Tracker

__all__ = ["TrainingResult", "TrainingSettings", "train", "training_settings_from_mapping"]

Objective = Callable[[nn.Module, Mapping[str, Any], int], tuple[Tensor, Mapping[str, Any]]]


class Watch(Protocol):
    """Looks at a model from time to time, for a tracker; nothing that it does reaches the training.

    Attributes:
        every: steps between two looks; there is one at the end, too. None: never.
    """

    every: int | None

    def __call__(self, model: nn.Module, step: int) -> None:
        """Look at a model in evaluation mode, without gradients, after so many steps."""
        ...


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        steps: finished steps, those of earlier sessions included.
        seconds: wall-clock seconds of these steps, evaluations and all checkpoints but the final one included.
        history: rows of the log, oldest first: ``step`` (finished steps); ``loss``, the objective's parts and
            ``gradient_norm`` before clipping (means since the row before); ``learning_rate``, ``seconds`` and, where
            the model was evaluated, ``evaluation/<name>``. Empty in all processes but the first.
        directory: of the run: ``metrics.jsonl`` and ``checkpoints/``.
        checkpoint: folder of the final checkpoint.
        sharded: whether each process's model holds a part of the weights only: all of them are in the checkpoint.
    """

    steps: int
    seconds: float
    history: list[dict[str, Any]]
    directory: Path
    checkpoint: Path
    sharded: bool = False


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
    tracker: Tracker | None = None,
    watch: Watch | None = None,
) -> TrainingResult:
    """Train a model in place.

    Under ``torchrun`` or ``accelerate launch`` every process calls it alike; the first one writes. The weights are
    then, up to rounding, those of one process with the same global batch, unless the model draws random numbers. Where
    the launcher asks for fully sharded training, see :mod:`entreg.training.sharding`, the model is left sharded.

    Args:
        model: moved to the device, left there in evaluation mode, with the averaged weights when there are any.
        objective: ``objective(model, batch, step)`` gives the mean loss of the (part of a) batch, a scalar, and named
            numbers for the log, floats or scalar tensors; those that make up the loss tell which of them broke it.
            Its ``state_dict`` and ``load_state_dict``, if it has them, are kept in checkpoints. ``step`` counts from 0.
        dataset: map-style, items are mappings of tensors as the objective reads them; ``__getitems__`` is used when
            there; see :class:`entreg.training.batches.PositionedDataset`.
        settings: everything else that decides the run.
        directory: of the run; made when missing. While another process trains in it, this one waits.
        resume: ``"auto"`` goes on from the newest undamaged checkpoint in the directory, if there is one; None starts
            again and removes what is there.
        extra_parameters: trained with the model's, without weight decay; for example gates and anchors. They are
            moved to the device in place.
        evaluate: ``evaluate(model, step)`` with the number of finished steps and the averaged model, if any, in
            evaluation mode; called by all processes.
        augment: see :class:`entreg.training.batches.PositionedDataset`.
        configuration: plain values, besides the settings, without which a run must not be resumed.
        device: ``auto`` (an accelerator if there is one), ``cpu`` or ``cuda``.
        tracker: told, by the first process, the rows of the log as they come; of a resumed run, the rows before.
        watch: called by all processes with the averaged model, if any.

    Returns:
        What was trained and where it lies.

    Raises:
        ConfigError: settings that do not fit the model, the data or the number of processes, or the checkpoint in the
            directory is of another configuration; the sentence says what differs.
        TrainingError: the loss or its gradient is not finite, or the objective refused its input; the last good
            checkpoint is kept.
        AssetError: data cannot be read any more; the last checkpoint is kept.
        OutputError: the directory cannot be written.
    """
    if resume not in ("auto", None):
        raise ConfigError(f"resume must be auto or null, got '{resume}'")
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"the device of training must be auto, cpu or, where torch sees one, cuda, got '{device}'")
    if settings.steps == 0:
        raise ConfigError("training needs at least one step, got steps: 0")
    with (
        # Two runs may share a model that is trained first, and be started at once.
        exclusive(directory) if is_first() else contextlib.nullcontext(),
        _gradient_checkpointing(model, settings.gradient_checkpointing),
        kept_random_state(cuda=True),
    ):
        data = PositionedDataset(dataset, settings.seed, augment)
        run = _Run(
            model, objective, data, settings, Path(directory), extra_parameters, evaluate, device, tracker, watch
        )
        identity = {
            "settings": settings.deciding(),
            "data": {"items": len(data)},
            "configuration": {} if configuration is None else dict(configuration),
        }
        run.start(resume, identity)
        return run.finish()


class _Run:
    """One run in one process: the state and everything around it that stays the same."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: PositionedDataset,
        settings: TrainingSettings,
        directory: Path,
        extra_parameters: Iterable[nn.Parameter],
        evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None,
        device: str,
        tracker: Tracker | None,
        watch: Watch | None,
    ) -> None:
        self.objective, self.data, self.settings = objective, data, settings
        self.directory, self.evaluate = directory, evaluate
        self.tracker, self.watch = tracker, watch
        # Autocast is entered around the whole objective, so accelerate must not wrap the model for it.
        # Without a GPU, accelerate would let every process train by itself unless it is told.
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
        processes = self.accelerator.num_processes
        self.num_parts = settings.parts(processes)
        first = self.accelerator.process_index * settings.gradient_accumulation
        self.parts = range(first, first + settings.gradient_accumulation)
        alone_on_cpu = processes == 1 and self.accelerator.device.type == "cpu"
        self.meter = LossMeter(self.accelerator, 1 if alone_on_cpu else settings.log_every)
        self.sharded = sharding_wanted()
        if self.sharded:
            extra_parameters = list(extra_parameters)
            check_sharding(model, extra_parameters, settings, evaluate is not None)
            shard(model, self.accelerator.device)
        else:
            model.to(self.accelerator.device)
        self.state = TrainingState(model, extra_parameters, objective, settings, self.meter)
        self.mixing = None
        if settings.mixes:
            self.mixing = Mixing(
                settings.mixup, settings.cutmix, settings.mixing_probability, settings.num_classes, settings.seed
            )
        self.checkpoints = directory / "checkpoints"
        self.last_good: Path | None = None
        self.began = 0.0
        self.log: MetricsLog | None = None
        self.identity: Mapping[str, Any] = {}

    def start(self, resume: str | None, identity: Mapping[str, Any]) -> None:
        """Restore the newest checkpoint, or clear the directory."""
        self.identity = identity
        main = self.accelerator.is_main_process
        if main:
            require_writable(self.directory)
        found = self._newest_checkpoint() if resume == "auto" else None
        if found is not None:
            self.state.restore(found, identity)
            self.last_good = found.path
        if main:
            # What lies after the step that the run goes on from is damaged, or of a run that is to start again.
            remove_checkpoints(self.checkpoints, after=self.state.done if found is not None else -1)
            self.log = MetricsLog(self.directory / "metrics.jsonl", self.state.done)
            if self.tracker is not None:
                self.tracker.begin(self.log.rows)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainingResult:
        """Take the steps that are left."""
        if self.state.done < self.settings.steps:
            self._train()
        self.state.use_average()
        self.state.model.eval()
        rows = self.log.rows if self.log is not None else []
        return TrainingResult(self.state.done, self.state.seconds, rows, self.directory, self.last_good, self.sharded)

    def _train(self) -> None:
        state, settings, accelerator = self.state, self.settings, self.accelerator
        positions = Positions(
            len(self.data),
            settings.batch_size,
            settings.seed,
            range(state.done, settings.steps),
            parts=self.num_parts,
            mine=self.parts,
            blocks=self.data.blocks,
        )
        on_gpu = accelerator.device.type == "cuda"
        batches = batch_loader(self.data, positions, num_workers=settings.num_workers, pin=on_gpu)
        alone = accelerator.num_processes == 1 or self.sharded
        model = state.model if alone else accelerator.prepare_model(state.model)
        state.model.train()
        self.began = time.perf_counter() - state.seconds
        with progress_bar(settings.steps, f"training {self.directory.name[:40]}", done=state.done) as bar:
            try:
                with loading_errors():
                    self._take_steps(model, batches, bar)
            except (TrainingError, AssetError) as error:
                kept = f"the last good checkpoint is {self.last_good}" if self.last_good else "no checkpoint yet"
                raise type(error)(f"Training stopped: {str(error).rstrip('.')}; {kept}.") from error

    def _take_steps(self, model: nn.Module, loader: Iterable[Mapping[str, Any]], bar: Progress) -> None:
        state, settings = self.state, self.settings
        # Here, so that nobody else holds what ends the loader's processes.
        batches = iter(loader)
        for step in range(state.done, settings.steps):
            self._step(model, batches, step)
            self._report(bar)
            if self.watch is not None and self.watch.every is not None and self._due(self.watch.every, state.done):
                with self._judged() as judged:
                    self.watch(judged, state.done)
            state.seconds = time.perf_counter() - self.began
            if self._due(settings.checkpoint_every, state.done):
                self._save()
            bar.advance()

    def _step(self, model: nn.Module, batches: Iterator[Mapping[str, Any]], step: int) -> None:
        state, settings = self.state, self.settings
        state.begin_step(step)
        losses, numbers = [], []
        for part in self.parts:
            with self._gradients_stay_here(model, part):
                loss, named = self._loss(model, next(batches), step, part)
                (loss / len(self.parts)).backward()
            losses.append(loss)
            numbers.append(named)
        if self.accelerator.num_processes > 1:
            for parameter in state.extra:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        norm = get_total_norm([parameter.grad for parameter in state.trained if parameter.grad is not None])
        norm = norm.full_tensor() if is_sharded(norm) else norm
        self.meter.add(step, losses, numbers, norm)
        # Whatever reports or saves this step must know that it was good.
        if any(
            self._due(one, step + 1) for one in (settings.log_every, self._evaluate_every, settings.checkpoint_every)
        ):
            self.meter.read()
        if settings.clip_norm is not None:
            clip_grads_with_norm_(state.trained, settings.clip_norm, norm)
        state.end_step()

    def _loss(
        self, model: nn.Module, batch: Mapping[str, Any], step: int, part: int
    ) -> tuple[Tensor, Mapping[str, Any]]:
        device = self.accelerator.device
        batch = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if self.mixing is not None:
            batch = self.mixing(batch, step)
        seed_forward(self.settings.seed, step, part)
        in_bfloat16 = self.settings.precision == "bfloat16"
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16):
                return self.objective(model, batch, step)
        except InputError as error:
            # What the objective is made of refuses values that are not finite with a sentence of its own.
            raise TrainingError(f"{str(error).rstrip('.')}, in step {step} (the first is 0)") from error

    def _gradients_stay_here(self, model: nn.Module, part: int) -> contextlib.AbstractContextManager[Any]:
        """Gradients of several processes are added up once per step, after the last part."""
        last = part == self.parts[-1]
        if self.sharded:
            model.set_requires_gradient_sync(last)
        if self.accelerator.num_processes == 1 or self.sharded or last:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    @property
    def _evaluate_every(self) -> int | None:
        # Without an evaluation, nothing but the end is due.
        return None if self.evaluate is None else self.settings.evaluate_every

    def _due(self, every: int | None, done: int) -> bool:
        return done == self.settings.steps or (every is not None and done % every == 0)

    def _report(self, bar: Progress) -> None:
        """After a step: the row of the log and the evaluation, where they are due."""
        state, settings = self.state, self.settings
        evaluated: dict[str, float] = {}
        if self.evaluate is not None and self._due(settings.evaluate_every, state.done):
            evaluated = self._evaluated()
        elif not self._due(settings.log_every, state.done):
            return
        row = {"step": state.done, **self.meter.means(), "learning_rate": state.learning_rate}
        if self.log is not None:
            row |= {"seconds": time.perf_counter() - self.began, **evaluated}
            self.log.append(row)
            if self.tracker is not None:
                self.tracker.log(row, state.done)
            bar.describe(f"step {state.done} of {settings.steps}, loss {row['loss']:.4f}")

    def _evaluated(self) -> dict[str, float]:
        with self._judged() as model:
            numbers = self.evaluate(model, self.state.done)
        return {f"evaluation/{name}": float(value) for name, value in numbers.items()}

    @contextlib.contextmanager
    def _judged(self) -> Iterator[nn.Module]:
        """The averaged model, if any, in evaluation mode and without gradients; then every module as it was."""
        model = self.state.best_model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad():
            yield model
        for module, mode in modes.items():
            module.training = mode

    def _save(self) -> None:
        self.state.save(self.checkpoints, self.identity, self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.last_good = checkpoint_folder(self.checkpoints, self.state.done)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, chosen by the first process for all."""
        found = latest_checkpoint(self.checkpoints) if self.accelerator.is_main_process else None
        if self.accelerator.num_processes == 1:
            return found
        path = broadcast_object_list([None if found is None else str(found.path)])[0]
        return read_checkpoint(Path(path)) if found is None and path is not None else found


@contextlib.contextmanager
def _gradient_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of timm's models, of the sparse path in them or of transformers', and off again after."""
    flags = ("grad_checkpointing", "gradient_checkpointing")
    if not wanted or any(getattr(module, flag, False) for module in model.modules() for flag in flags):
        yield
    elif isinstance(path := getattr(model, "blocks", None), SparseBlocks):
        # timm's own switch would run the blocks past the path.
        path.set_checkpointing(True)
        try:
            yield
        finally:
            path.set_checkpointing(False)
    elif hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        try:
            yield
        finally:
            model.set_grad_checkpointing(False)
    elif getattr(model, "supports_gradient_checkpointing", False):
        # transformers names it anew from 5.23 on.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        # Reentrant checkpoints would compute what probes capture without its gradient.
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        # A hook for reentrant checkpoints, which nothing else would remove.
        model.disable_input_require_grads()
        try:
            yield
        finally:
            getattr(model, f"{name}_checkpointing_disable")()
    else:
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing: false")
