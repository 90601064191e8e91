"""Accuracy and calibration of a classifier, with every image's own result kept.

What is kept per image allows paired statistics: two methods are compared image by image, which needs far fewer images
than comparing two means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from entreg import distributed
from entreg.errors import ConfigError, InputError
from entreg.names import require_choice
from entreg.progress import progress_bar
from entreg.training.batches import loading_errors
from entreg.training.vision import answer_logits

PRECISIONS = ("float32", "bfloat16")
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Classification:
    """Answers of a classifier to a set of images; all tensors are (images, answers) and on the CPU.

    Attributes:
        correct: whether the most probable class is the label.
        in_top5: whether the label is among the five most probable classes (always, with five classes or fewer).
        confidence: probability of the most probable class, float32.
        loss: cross-entropy in nats, float32.
    """

    correct: Tensor
    in_top5: Tensor
    confidence: Tensor
    loss: Tensor

    @property
    def top1(self) -> float:
        """Fraction of answers that are right."""
        return self.correct.double().mean().item()

    @property
    def top5(self) -> float:
        """Fraction of answers with the label among the five most probable classes."""
        return self.in_top5.double().mean().item()

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.loss.double().mean().item()

    @property
    def calibration_error(self) -> float:
        """Expected calibration error with :data:`CALIBRATION_BINS` bins of equal width."""
        return expected_calibration_error(self.confidence, self.correct)

    @property
    def per_image(self) -> Tensor:
        """Fraction of right answers of each image, (images,) float64: the values to pair between two methods."""
        return self.correct.double().mean(1)

    def metrics(self) -> dict[str, float]:
        """The numbers for a record."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.mean_loss,
            "calibration_error": self.calibration_error,
            "images": len(self.correct),
        }

    @staticmethod
    def concatenate(parts: list[Classification]) -> Classification:
        """The results of several batches as one.

        Raises:
            InputError: no parts.
        """
        if not parts:
            raise InputError("there are no images to classify")
        return Classification(
            **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Classification)}
        )


def classify(logits: Tensor, labels: Tensor) -> Classification:
    """Judge the logits of one batch.

    Args:
        logits: (batch, classes), or (batch, tokens, classes) of a model that answers with its first tokens.
        labels: class indices, (batch,) or (batch, answers).

    Returns:
        The results; a single label per image is one answer.

    Raises:
        InputError: shapes that do not fit together, labels that are no class index, or logits that are NaN.
    """
    if labels.is_floating_point() or labels.dim() not in (1, 2):
        raise InputError(f"labels must be class indices of shape (batch,) or (batch, answers), got {labels.dtype}")
    if labels.dim() == 1:
        labels = labels[:, None]
    answers = answer_logits(logits, labels)
    if answers.dim() == 2:
        answers = answers[:, None]
    answers, labels = answers.detach().float(), labels.to(answers.device)
    if answers.shape[:2] != labels.shape:
        raise InputError(f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}")
    num_classes = answers.shape[-1]
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise InputError(f"labels must lie in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
    if answers.isnan().any():
        raise InputError("the logits hold NaN")
    logarithms = torch.log_softmax(answers, dim=-1)
    top, classes = logarithms.topk(min(5, num_classes), dim=-1)
    hits = classes == labels[..., None]
    return Classification(
        correct=hits[..., 0].cpu(),
        in_top5=hits.any(-1).cpu(),
        confidence=top[..., 0].exp().cpu(),
        loss=-logarithms.gather(-1, labels[..., None])[..., 0].cpu(),
    )


def expected_calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al., 2017, equation 5): bins of equal width, weighted by their answers.

    Args:
        confidence: probabilities of the given answers, any shape, in [0, 1].
        correct: bool of the same shape.
        num_bins: bins of [0, 1], each open below and closed above (15 as in that paper).

    Returns:
        The weighted mean over bins of |accuracy - mean confidence|, in [0, 1].

    Raises:
        InputError: no answers, other shapes, or confidences out of range.
    """
    if confidence.shape != correct.shape or confidence.numel() == 0:
        raise InputError(
            f"confidence and correct must have one shape and be non-empty, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    values, hits = confidence.flatten().double(), correct.flatten().double()
    # A softmax in float32 can exceed 1 by rounding.
    if not (values.min() >= 0 and values.max() <= 1 + 1e-5):
        raise InputError("confidences must lie in [0, 1]")
    bins = (values * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    surplus = torch.zeros(num_bins, dtype=torch.float64, device=values.device).index_add_(0, bins, hits - values)
    return (surplus.abs().sum() / values.numel()).item()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside the block; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 100,
    precision: str = "float32",
    limit: int | None = None,
    num_workers: int = 0,
    observe: Callable[[Mapping[str, Tensor]], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Classification:
    """Classify a data set, in order, in evaluation mode; the model's mode is restored afterwards.

    The processes of a launcher take turns at the batches, and every one gets the results of all. As the batches are
    those of one process, so are the results, to the bit.

    Args:
        model: images to logits, see :func:`classify`; it runs where its parameters are.
        dataset: map-style data set of ``{"images", "labels", ...}``.
        batch_size: images per forward pass, at least 1; the last batch may be smaller.
        precision: ``float32``, or ``bfloat16`` through autocast.
        limit: the first so many images only; None for all.
        num_workers: processes that load the data.
        observe: called with each batch after its forward pass, for what else is read there (a sparse path's
            selections, say), while the model is still in evaluation mode and without gradients. It sees this process's
            batches only: :func:`entreg.distributed.in_order` puts what all of them saw in order.
        generator: that the model draws from; seeded with each batch's number, so that a batch does not depend on those
            before it.

    Returns:
        The results in the order of the data set.

    Raises:
        ConfigError: an unknown precision, a batch size or limit below 1.
        InputError: an empty data set, or see :func:`classify`.
    """
    require_choice("precision", precision, PRECISIONS)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch_size and limit of an evaluation must be at least 1, got {batch_size} and {limit}")
    if limit is not None and limit < len(dataset):
        dataset = Subset(dataset, range(limit))
    device = next(model.parameters()).device
    turns = distributed.my_turns(-(-len(dataset) // batch_size))
    batches = [range(turn * batch_size, min((turn + 1) * batch_size, len(dataset))) for turn in turns]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers)
    parts = []
    with evaluation_mode(model), torch.no_grad(), loading_errors(), progress_bar(len(turns), "images") as bar:
        for turn, batch in zip(turns, loader, strict=True):
            if generator is not None:
                generator.manual_seed(turn)
            images = batch["images"].to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(images)
            parts.append(classify(logits, batch["labels"]))
            if observe is not None:
                observe(batch)
            bar.advance()
    return Classification.concatenate(distributed.in_order(parts))
