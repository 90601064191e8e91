"""Error on corrupted images and its mean, the mean corruption error (mCE) of CIFAR-C.

By the convention of CIFAR-10-C and CIFAR-100-C the mean corruption error is the plain mean of the error rate over 15
corruptions and 5 severities; it is not divided by AlexNet's errors, as ImageNet-C's is. The four extra corruptions are
reported beside it and never enter it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entreg.data.corrupted_images import CorruptedSet, Preparation
from entreg.data.corruptions import (
    CATEGORIES,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    require_corruption,
    require_severity,
)
from entreg.errors import InputError
from entreg.progress import progress

Predict = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class CorruptionErrors:
    """Error rates on corrupted images.

    Attributes:
        errors: corruption to severity to fraction of wrong answers, in [0, 1].
        num_images: per corruption and severity.
        clean_error: fraction of wrong answers on the clean images; None if not measured.
    """

    errors: Mapping[str, Mapping[int, float]]
    num_images: int
    clean_error: float | None = None

    def __post_init__(self) -> None:
        for corruption, by_severity in self.errors.items():
            require_corruption(corruption)
            for severity, error in by_severity.items():
                require_severity(severity)
                if not 0.0 <= error <= 1.0:
                    raise InputError(f"an error rate lies in [0, 1], got {error} for {corruption} {severity}")

    @property
    def is_complete(self) -> bool:
        """Whether all 15 corruptions were measured at all 5 severities."""
        return not self._missing()

    @property
    def mean_corruption_error(self) -> float:
        """Plain mean of the error over the 15 corruptions and 5 severities.

        Raises:
            InputError: not all of them were measured: the mean over some of them is another quantity (:meth:`mean`).
        """
        missing = self._missing()
        if missing:
            corruption, severity = missing[0]
            raise InputError(
                f"the mean corruption error needs 15 corruptions at 5 severities; {len(missing)} of 75 were not "
                f"measured, the first is {corruption} at severity {severity}"
            )
        return self.mean()

    @property
    def mean_extra_error(self) -> float | None:
        """Mean over whatever was measured of the four extra corruptions; None if nothing was."""
        measured = [corruption for corruption in EXTRA_CORRUPTIONS if self.errors.get(corruption)]
        return self.mean(measured) if measured else None

    @property
    def excess_error(self) -> float | None:
        """Mean corruption error minus clean error: what the corruptions cost; None without a clean error."""
        return None if self.clean_error is None else self.mean_corruption_error - self.clean_error

    def mean(self, corruptions: Collection[str] = CORRUPTIONS, severities: Collection[int] = SEVERITIES) -> float:
        """Mean error over those of the given corruptions and severities that were measured.

        Raises:
            InputError: none of them was.
        """
        values = [
            error
            for corruption in corruptions
            for severity, error in self.errors.get(corruption, {}).items()
            if severity in severities
        ]
        if not values:
            raise InputError("none of these corruptions and severities was measured")
        return float(np.mean(values))

    def by_corruption(self) -> dict[str, float]:
        """Corruption to its mean error over the measured severities."""
        return {corruption: self.mean([corruption]) for corruption, values in self.errors.items() if values}

    def by_severity(self) -> dict[int, float]:
        """Severity to the mean error over those of the 15 corruptions that were measured at it."""
        measured = {severity for corruption in CORRUPTIONS for severity in self.errors.get(corruption, {})}
        return {severity: self.mean(severities=[severity]) for severity in sorted(measured)}

    def by_category(self) -> dict[str, float]:
        """Category (noise, blur, weather, digital) to the mean error over what was measured of it."""
        measured = {name: [one for one in names if self.errors.get(one)] for name, names in CATEGORIES.items()}
        return {name: self.mean(names) for name, names in measured.items() if names}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for a run record; what is incomplete or was not measured is None."""
        return {
            "mean_corruption_error": self.mean_corruption_error if self.is_complete else None,
            "mean_extra_error": self.mean_extra_error,
            "clean_error": self.clean_error,
            "images": self.num_images,
            "errors": {
                corruption: {str(severity): error for severity, error in values.items()}
                for corruption, values in self.errors.items()
            },
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> CorruptionErrors:
        """The errors that :meth:`as_dict` gave."""
        errors = {
            corruption: {int(severity): error for severity, error in by_severity.items()}
            for corruption, by_severity in values["errors"].items()
        }
        return CorruptionErrors(errors, values["images"], values["clean_error"])

    def _missing(self) -> list[tuple[str, int]]:
        return [
            (corruption, severity)
            for corruption in CORRUPTIONS
            for severity in SEVERITIES
            if severity not in self.errors.get(corruption, {})
        ]


def corruption_errors(
    predict: Predict,
    corrupted: CorruptedSet,
    *,
    corruptions: Collection[str] | None = None,
    severities: Collection[int] = SEVERITIES,
    clean: np.ndarray | None = None,
    batch_size: int = 100,
    limit: int | None = None,
) -> CorruptionErrors:
    """Measure the error on every corruption and severity.

    Args:
        predict: from images (b, h, w, c) uint8 to predicted labels (b,) or (b, answers), a tensor or an array.
        corrupted: the images and their labels; with several answers per image each counts for itself.
        corruptions: those to measure; None: all that the set has, the extra ones included.
        severities: those to measure.
        clean: (n, h, w, c) uint8 clean images of the same labels, for the clean error; None: not measured.
        batch_size: images per call of ``predict``, at least 1.
        limit: the first so many images of each corruption and severity; None for all.

    Raises:
        InputError: an unknown corruption or severity, nothing to measure, a value out of range, or predictions of
            another shape.
        AssetError: a file of the corrupted set is missing or damaged.
    """
    wanted = corrupted.corruptions if corruptions is None else tuple(map(require_corruption, corruptions))
    levels = tuple(map(require_severity, severities))
    lacking = [corruption for corruption in wanted if corruption not in corrupted.corruptions]
    if lacking:
        raise InputError(f"this corrupted set has no {lacking[0]}, only {', '.join(corrupted.corruptions)}")
    if not wanted or not levels or batch_size < 1 or (limit is not None and limit < 1):
        raise InputError("corruptions and severities must not be empty, batch_size and limit at least 1")
    if clean is not None and len(clean) != len(corrupted):
        raise InputError(f"there are {len(clean)} clean and {len(corrupted)} corrupted images; they must be the same")
    labels = corrupted.labels[:limit]
    clean_error = None if clean is None else error_rate(predict, clean[:limit], labels, batch_size)
    errors: dict[str, dict[int, float]] = {corruption: {} for corruption in wanted}
    cells = [(corruption, severity) for corruption in wanted for severity in levels]
    for corruption, severity in progress(cells, "corruptions"):
        images = corrupted.images(corruption, severity)[:limit]
        errors[corruption][severity] = error_rate(predict, images, labels, batch_size)
    return CorruptionErrors(errors, len(labels), clean_error)


def error_rate(predict: Predict, images: np.ndarray, labels: np.ndarray, batch_size: int = 100) -> float:
    """Fraction of wrong answers; see :func:`corruption_errors`.

    Raises:
        InputError: no images, or predictions of another shape than the labels.
    """
    if not len(images):
        raise InputError("there are no images to classify")
    wrong = 0
    for start in range(0, len(images), batch_size):
        expected = labels[start : start + batch_size]
        predicted = np.asarray(torch.as_tensor(predict(images[start : start + batch_size])).cpu())
        if predicted.shape != expected.shape:
            raise InputError(f"predictions of shape {predicted.shape} do not fit labels of shape {expected.shape}")
        wrong += int((predicted != expected).sum())
    return wrong / labels[: len(images)].size


def predictor(model: nn.Module, prepare: Preparation, num_answers: int | None = None) -> Predict:
    """The function of a model that :func:`corruption_errors` wants.

    The model is used as it is, with whatever sparse path is active and in the mode it is in: put it in evaluation mode.

    Args:
        model: images to logits (b, classes), or (b, tokens, classes) of a model that answers with its first tokens; it
            runs where its parameters are.
        prepare: see :func:`entreg.data.corrupted_images.preparation_of`.
        num_answers: of a model that answers with its first tokens, as many labels as an image has; None: one answer.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def predict(images: np.ndarray) -> Tensor:
        logits = model(prepare(images).to(device))
        return (logits if num_answers is None else logits[:, :num_answers]).argmax(-1)

    return predict
