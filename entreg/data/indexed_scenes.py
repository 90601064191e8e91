"""Data sets of made scenes: every item a function of (seed, split, index), whatever the batch, order or process.

All random numbers of an item come from one counter-based generator keyed by the three. The training split is an endless
stream: any index at or above its length is a further scene that no epoch has shown before. Validation and test are of
fixed size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from entreg.errors import InputError

LENGTHS = {"train": 2**20, "validation": 1_000, "test": 2_000}
"""Scenes per split; for train merely what counts as one epoch of the endless stream."""


class IndexedScenes(Dataset):
    """Map-style data set of scenes with masks; subclasses say in :meth:`pixels` how they look.

    An item is ``{"images": float32 (c, h, w), "labels": int64 (answers,), "masks": bool (h, w)}``, images normalised by
    the class's mean and standard deviation; the label of a scene with a single answer has no dimension.

    Args:
        split: ``train``, ``validation`` or ``test``.
        length: scenes, at least 1; None: as in :data:`LENGTHS`.
        seed: non-negative; decides every scene of the split.

    Raises:
        InputError: unknown split or a value out of range.
    """

    num_classes: ClassVar[int]
    mean: ClassVar[float]
    standard_deviation: ClassVar[float]

    def __init__(self, split: str, *, length: int | None, seed: int) -> None:
        if split not in LENGTHS:
            raise InputError(f"unknown split '{split}', known are {', '.join(LENGTHS)}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.split = split
        self.seed = seed
        self.length = LENGTHS[split] if length is None else length
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {length}")
        self._stream = np.random.SeedSequence((seed, tuple(LENGTHS).index(split))).generate_state(1, np.uint64)[0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        batch = self.batch(indices)
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The scenes of ``indices`` as one batch, the fastest way to many.

        Args:
            indices: each at least 0; below the length, except in the endless training split.

        Raises:
            IndexError: an index out of range.
        """
        pixels, labels, masks = self.pixels(indices)
        images = torch.from_numpy(pixels).sub_(self.mean).div_(self.standard_deviation)
        answers = torch.from_numpy(labels)
        if answers.shape[1] == 1:
            answers = answers[:, 0]
        return {"images": images, "labels": answers, "masks": torch.from_numpy(masks)}

    def pixels(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scenes before normalisation, for corruptions and figures.

        Args:
            indices: as in :meth:`batch`.

        Returns:
            Pixels (b, c, h, w) float32 in [0, 1], labels (b, answers) int64 and masks (b, h, w) bool.

        Raises:
            IndexError: an index out of range.
        """
        raise NotImplementedError

    def raw(self, index: int) -> np.ndarray:
        """One scene before normalisation, (h, w, c) uint8: what corruptions work on.

        Raises:
            IndexError: an index out of range.
        """
        pixels, _, _ = self.pixels([index])
        return np.rint(pixels[0].transpose(1, 2, 0) * 255.0).astype(np.uint8)

    def prepare(self, image: np.ndarray) -> Tensor:
        """The item's ``images`` for an image like those of :meth:`raw`, (c, h, w) float32."""
        pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
        return torch.from_numpy(pixels).div_(255.0).sub_(self.mean).div_(self.standard_deviation)

    def generators(self, indices: Sequence[int]) -> Iterator[np.random.Generator]:
        """The random generator of each item.

        Raises:
            IndexError: an index out of range, before the first generator.
        """
        checked = [operator.index(index) for index in indices]
        for index in checked:
            if index < 0 or (index >= self.length and self.split != "train"):
                raise IndexError(f"scene {index} of {self.length} in split {self.split}")
        return (
            np.random.Generator(np.random.Philox(key=np.array([self._stream, index], dtype=np.uint64)))
            for index in checked
        )
