"""The objective of vision training: task loss, penalties and distillation, for one loop and every experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entreg.errors import InputError
from entreg.training.curriculum import CellCurriculum
from entreg.training.penalties import Penalties


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits that answer, one row per label.

    Args:
        logits: (batch, classes), or (batch, tokens, classes) of a model that answers with its first tokens.
        labels: (batch,) or (batch, answers) class indices, or (batch, classes) probabilities from mixing.

    Returns:
        (batch, classes) or (batch, answers, classes).

    Raises:
        InputError: fewer tokens than answers, or another number of dimensions.
    """
    if logits.dim() == 2:
        return logits
    if logits.dim() != 3 or labels.dim() != 2 or logits.shape[1] < labels.shape[1]:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} cannot answer labels of shape {tuple(labels.shape)}; a model with "
            "several answers gives (batch, tokens, classes) with a token for each"
        )
    return logits[:, : labels.shape[1]]


class VisionObjective:
    """Cross-entropy, plus penalties, plus distillation from the dense model; called once per (micro-)batch.

    Args:
        penalties: see :class:`entreg.training.penalties.Penalties`; its probe must be attached to the model.
        captures: the :class:`~entreg.adapters.ProbeHandle`, or None when no penalty needs it.
        sparse: the :class:`~entreg.adapters.SparsifyHandle` that is active in training, or None.
        label_smoothing: in [0, 1).
        teacher: dense model whose answers are distilled, frozen; None for no distillation.
        distillation: weight of the distillation in [0, 1]; the task loss has the rest.
        temperature: of both distributions in the distillation, above 0.
        curriculum: see :class:`entreg.training.curriculum.CellCurriculum`; None for none.
    """

    def __init__(
        self,
        penalties: Penalties,
        *,
        captures: Any = None,
        sparse: Any = None,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distillation: float = 0.0,
        temperature: float = 1.0,
        curriculum: CellCurriculum | None = None,
    ) -> None:
        self.penalties = penalties
        self.captures = captures
        self.sparse = sparse
        self.label_smoothing = label_smoothing
        self.teacher = teacher
        self.distillation = distillation if teacher is not None else 0.0
        self.temperature = temperature
        self.curriculum = curriculum

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of one batch and its parts for the log; ``{"images", "labels"}`` is read from the batch."""
        images, labels = batch["images"], batch["labels"]
        mask = None if self.curriculum is None else self.curriculum.mask(images)
        logits = answer_logits(model(images) if mask is None else model(images, attn_mask=mask), labels)
        task = cross_entropy(logits, labels, self.label_smoothing)
        parts: dict[str, Any] = {"task": task.detach()}
        if self.curriculum is not None:
            self.curriculum.advance(parts["task"], step)
            parts["closeness"] = self.curriculum.closeness
        loss = task
        if self.distillation > 0:
            with torch.no_grad():
                wanted = answer_logits(self.teacher(images), labels)
            distance = distillation_loss(logits, wanted, self.temperature)
            parts["distillation"] = distance.detach()
            loss = (1.0 - self.distillation) * task + self.distillation * distance
        captures = () if self.captures is None else self.captures.captures
        gates = () if self.sparse is None else self.sparse.gates
        penalty, numbers = self.penalties(captures, gates, step)
        if penalty is not None:
            loss = loss + penalty
        return loss, {**parts, **numbers}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the controllers of the penalties and the curriculum."""
        parts = {"regularizer": self.penalties.regularizer, "curriculum": self.curriculum}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name, part in (("regularizer", self.penalties.regularizer), ("curriculum", self.curriculum)):
            if part is not None:
                part.load_state_dict(state[name])


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats over all answers; labels are indices, or probabilities of the logits' shape."""
    if labels.is_floating_point():
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL divergence in nats of the answers from the wanted ones, times temperature squared (Hinton et al., 2015)."""
    student = torch.log_softmax(logits.float().flatten(0, -2) / temperature, dim=-1)
    teacher = torch.log_softmax(wanted.float().flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
