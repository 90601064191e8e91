"""What decides a training run besides model, objective and data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entreg.errors import ConfigError
from entreg.names import require_choice, require_known

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of :func:`entreg.training.loop.train`. (The paper states none of them; the defaults are our choice.)

    Attributes:
        steps: optimiser steps of the whole run; 0 stands for no training and is for callers of the loop.
        batch_size: items, such as images or windows of text, per optimiser step, over all processes and accumulated
            parts; a multiple of their product.
        learning_rate: after the warm-up, above 0.
        final_learning_rate: where ``cosine`` and ``linear`` arrive after the last step, at least 0.
        weight_decay: at least 0; biases, norms, position embeddings and extra parameters have none.
        warmup_steps: steps over which the learning rate grows linearly, fewer than ``steps``.
        schedule: ``cosine``, ``linear`` or ``constant``, by timm.
        optimizer: a name that ``timm.optim.list_optimizers`` knows.
        layer_decay: factor in (0, 1] by which each earlier layer's learning rate is smaller; None for none.
        gradient_accumulation: parts that each process computes its share of a batch in, at least 1.
        gradient_checkpointing: recompute activations in the backward pass; for models of timm and transformers.
        precision: ``float32``, or ``bfloat16`` for autocast; weights and optimiser stay in float32.
        clip_norm: limit of the norm of the whole gradient, above 0; None for none.
        ema_decay: of the moving average of the weights, in (0, 1), with timm's warm-up 1 - (1 + step)^(-2/3) before
            that; None for none.
        mixup, cutmix: alpha of each, at least 0; see :class:`entreg.training.batches.Mixing`.
        mixing_probability: of mixing a batch at all, in [0, 1].
        num_classes: of the labels; needed for mixing only.
        checkpoint_every: steps between checkpoints, at least 1; None for one at the end only.
        keep_checkpoints: how many of the newest stay, at least 1.
        log_every: steps between rows of the log, at least 1.
        evaluate_every: steps between evaluations; None for one at the end only.
        num_workers: processes that load data ahead; 0 loads in the training process.
        seed: of order, augmentation, mixing and the model's randomness, at least 0. Not of the weights.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: str = "cosine"
    optimizer: str = "adamw"
    layer_decay: float | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "float32"
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_probability: float = 1.0
    num_classes: int | None = None
    checkpoint_every: int | None = 200
    keep_checkpoints: int = 2
    log_every: int = 20
    evaluate_every: int | None = None
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._whole("steps", "warmup_steps", "num_workers", "seed", minimum=0)
        self._whole("batch_size", "gradient_accumulation", "keep_checkpoints", "log_every", minimum=1)
        for name in ("checkpoint_every", "evaluate_every"):
            if getattr(self, name) is not None:
                self._whole(name, minimum=1)
        self._require("learning_rate", lambda value: value > 0, "above 0")
        for name in ("final_learning_rate", "weight_decay", "mixup", "cutmix"):
            self._require(name, lambda value: value >= 0, "at least 0")
        self._require("layer_decay", lambda value: 0 < value <= 1, "in (0, 1]", optional=True)
        self._require("clip_norm", lambda value: value > 0, "above 0", optional=True)
        self._require("ema_decay", lambda value: 0 < value < 1, "in (0, 1)", optional=True)
        self._require("mixing_probability", lambda value: 0 <= value <= 1, "in [0, 1]")
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("precision", self.precision, PRECISIONS)
        if self.steps and self.warmup_steps >= self.steps:
            raise ConfigError(f"warmup_steps must be fewer than steps, got {self.warmup_steps} and {self.steps}")
        if self.mixes and (self.num_classes is None or self.num_classes < 2):
            raise ConfigError(f"mixup and cutmix need num_classes of at least 2, got {self.num_classes}")
        self.parts(processes=1)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixing_probability > 0

    def parts(self, processes: int) -> int:
        """Into how many parts the processes split a batch.

        Raises:
            ConfigError: it cannot be split so, or mixing would not find pairs in every part.
        """
        parts = processes * self.gradient_accumulation
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size {self.batch_size} must be a multiple of processes x gradient_accumulation, {processes} x "
                f"{self.gradient_accumulation}"
            )
        if self.mixes and self.batch_size // parts % 2:
            raise ConfigError(
                "mixup and cutmix need an even number of images in every part of a batch, got "
                f"{self.batch_size} in {parts} parts"
            )
        return parts

    def deciding(self) -> dict[str, Any]:
        """The settings that the trained weights depend on: a run is resumed only with these unchanged."""
        values = dataclasses.asdict(self)
        for name in _NOT_DECIDING:
            del values[name]
        return values

    def _whole(self, *names: str, minimum: int) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ConfigError(f"{name} must be a whole number of at least {minimum}, got {value}")

    def _require(self, name: str, holds: Any, words: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        # YAML reads 1e-3 as text, so a number given as text is a likely mistake.
        if not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
            raise ConfigError(f"{name} must be a finite number {words}, got {value!r}")


_NOT_DECIDING = ("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_every", "num_workers")


def training_settings_from_mapping(values: Mapping[str, Any]) -> TrainingSettings:
    """Settings from plain values, for example from Hydra.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    require_known(values, [field.name for field in dataclasses.fields(TrainingSettings)], "training setting")
    return TrainingSettings(**values)
