"""Corrupted copies of a data set, generated and cached.

For each corruption and severity there are uint8 images (n, h, w, c) that belong to the same labels::

    corrupted = GeneratedCorruptions(*clean_images(dataset))
    corrupted.images("fog", 3)                                   # uint8, memory-mapped
    corrupted.dataset("fog", 3, preparation_of(dataset))         # torch data set of {"images", "labels"}

:class:`entreg.data.official_corruptions.OfficialCorruptions` gives the same from the published files of CIFAR-C.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from entreg.atomic import write_bytes_atomic, write_text_atomic
from entreg.data.assets import ASSETS, cache_directory
from entreg.data.corruptions import (
    ALL_CORRUPTIONS,
    CONSTANTS,
    CONSTANTS_VERSION,
    constants_for,
    corrupt,
    require_corruption,
    require_images,
    require_severity,
)
from entreg.errors import InputError

Preparation = Callable[[np.ndarray], Tensor]

# Images that are made at once before they become bytes.
_CHUNK_IMAGES = 256


class CorruptedImages(Dataset):
    """One corruption at one severity as a map-style data set.

    An item is ``{"images": float32 (c, h, w), "labels": int64 () or (answers,)}``.

    Args:
        images: (n, h, w, c) uint8, may be memory-mapped.
        labels: (n,) or (n, answers) integers.
        prepare: from images (b, h, w, c) uint8 to float32 (b, c, h, w), as the model wants them (see
            :func:`preparation_of`); None: divided by 255.

    Raises:
        InputError: shapes or dtypes that do not fit the above.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, prepare: Preparation | None = None) -> None:
        self.images = require_images(images)
        self.labels = require_labels(labels, len(images))
        self.prepare = _unit_range if prepare is None else prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        places = np.asarray(indices)
        images, labels = self.prepare(self.images[places]), torch.from_numpy(self.labels[places])
        return [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]


class CorruptedSet(ABC):
    """Images under every corruption and severity, and their labels.

    Attributes:
        labels: (n,) or (n, answers) int64, read-only.
        corruptions: names of those that there are, the 15 of the benchmark first.
    """

    labels: np.ndarray
    corruptions: tuple[str, ...]

    def __len__(self) -> int:
        """Images per corruption and severity."""
        return len(self.labels)

    @abstractmethod
    def images(self, corruption: str, severity: int) -> np.ndarray:
        """The images (n, h, w, c) uint8 under one corruption at severity 1 to 5; read-only.

        Raises:
            InputError: a corruption that the set lacks, or another severity.
            AssetError: a file is missing or damaged.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a run record says about the data set."""

    def dataset(self, corruption: str, severity: int, prepare: Preparation | None = None) -> CorruptedImages:
        """One corruption at one severity as a data set; see :class:`CorruptedImages`."""
        return CorruptedImages(self.images(corruption, severity), self.labels, prepare)

    def _require(self, corruption: str, severity: int) -> None:
        require_severity(severity)
        if require_corruption(corruption) not in self.corruptions:
            raise InputError(f"this corrupted set has no {corruption}, only {', '.join(self.corruptions)}")


class GeneratedCorruptions(CorruptedSet):
    """Corruptions of given images, made when first asked for and kept on disk.

    The cache's key is made of the images' content, the seed, and family and version of the constants. Each corruption
    and severity is one ``.npy`` file with a JSON file of its checksum beside it; one that is damaged or half written is
    made anew.

    Args:
        images: (n, h, w, c) uint8, clean, at least one.
        labels: (n,) or (n, answers) integers.
        seed: at least 0.
        constants: as in :func:`entreg.data.corruptions.corrupt`.
        folder: of the cache; None: ``corrupted`` in :func:`entreg.data.assets.cache_directory`.
        num_threads: threads that make images, at least 1.

    Raises:
        InputError: shapes, dtypes or values that do not fit the above.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int = 0,
        constants: str = "auto",
        folder: str | Path | None = None,
        num_threads: int = 1,
    ) -> None:
        self.clean = require_images(images)
        if not len(self.clean):
            raise InputError("there are no images to corrupt")
        self.labels = require_labels(labels, len(images))
        self.corruptions = ALL_CORRUPTIONS
        self.seed = seed
        self.constants = constants_for(*self.clean.shape[1:3]) if constants == "auto" else constants
        if self.constants not in CONSTANTS:
            raise InputError(f"constants must be auto, {' or '.join(CONSTANTS)}, got '{constants}'")
        self.num_threads = num_threads
        self.revision = hashlib.sha256(np.ascontiguousarray(self.clean)).hexdigest()
        root = cache_directory() / "corrupted" if folder is None else Path(folder)
        self.folder = root / _digest(self.describe())[:16]
        self._open: dict[tuple[str, int], np.ndarray] = {}

    def images(self, corruption: str, severity: int) -> np.ndarray:
        self._require(corruption, severity)
        key = corruption, severity
        if key not in self._open:
            path = self.folder / f"{corruption}-{severity}.npy"
            array = _whole_array(path)
            if array is None:
                self._make(path, corruption, severity)
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            self._open[key] = array
        return self._open[key]

    def describe(self) -> dict[str, Any]:
        return {
            "source": "generated",
            "revision": self.revision,
            "images": len(self),
            "shape": list(self.clean.shape[1:]),
            "seed": self.seed,
            "constants": self.constants,
            "constants_version": CONSTANTS_VERSION,
            "frost_revision": ASSETS["frost_textures"].member_sha256,
        }

    def _make(self, path: Path, corruption: str, severity: int) -> None:
        corrupted = corrupt(
            self.clean,
            corruption,
            severity,
            seed=self.seed,
            constants=self.constants,
            num_threads=self.num_threads,
        )
        buffer = io.BytesIO()
        np.save(buffer, corrupted)
        content = buffer.getvalue()
        # The checksum goes last: a file without one counts as half written.
        write_bytes_atomic(path, content)
        description = {**self.describe(), "corruption": corruption, "severity": severity}
        checksum = {"sha256": hashlib.sha256(content).hexdigest()}
        write_text_atomic(path.with_suffix(".json"), json.dumps({**checksum, **description}, indent=2) + "\n")


def clean_images(dataset: Any, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a data set before normalisation, ready to be corrupted.

    Args:
        dataset: an :class:`~entreg.data.indexed_scenes.IndexedScenes` or
            :class:`~entreg.data.vision_sets.LabelledImages`, or alike.
        limit: the first so many, at least 1; None for all.

    Returns:
        Images (n, h, w, c) uint8 and labels (n,) or (n, answers) int64.

    Raises:
        InputError: another kind of data set, a limit below 1, or images of different sizes.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if hasattr(dataset, "pixels"):
        images, labels = [], []
        for start in range(0, count, _CHUNK_IMAGES):
            pixels, answers, *_ = dataset.pixels(range(start, min(start + _CHUNK_IMAGES, count)))
            images.append(np.rint(pixels.transpose(0, 2, 3, 1) * 255.0).astype(np.uint8))
            labels.append(answers[:, 0] if answers.shape[1] == 1 else answers)
        return np.concatenate(images), np.concatenate(labels)
    if hasattr(dataset, "raw"):
        raw = [dataset.raw(index) for index in range(count)]
        if len({image.shape for image in raw}) != 1:
            raise InputError("only images of one size can be corrupted; these have several")
        return np.stack(raw), dataset.source.labels[dataset.indices[:count]]
    raise InputError(f"{type(dataset).__name__} gives no images before normalisation to corrupt")


def preparation_of(dataset: Any) -> Preparation:
    """How a data set of :func:`clean_images` prepares its images for a model, for corrupted ones to be treated alike.

    Returns:
        Function of images (b, h, w, c) uint8, giving float32 (b, c, h', w').
    """
    return lambda images: torch.stack([dataset.prepare(image) for image in images])


def require_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """A read-only int64 copy of the labels.

    Raises:
        InputError: not ``count`` integers, or rows of integers.
    """
    labels = np.array(labels)
    if labels.ndim not in (1, 2) or len(labels) != count or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels must be integers of shape ({count},) or ({count}, answers), got {labels.dtype} {labels.shape}"
        )
    labels = labels.astype(np.int64)
    labels.flags.writeable = False
    return labels


def _unit_range(images: np.ndarray) -> Tensor:
    """(b, c, h, w) float32 in [0, 1] of (b, h, w, c) uint8."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255.0


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _whole_array(path: Path) -> np.ndarray | None:
    """The array in a file that has the checksum written beside it; None for any other file."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                return None
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
