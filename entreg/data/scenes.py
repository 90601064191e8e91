"""Scenes of handwritten digits among clutter, for offline experiments on what a vision model attends to.

One digit per cell of a grid of cells, at a random place in its cell; under the digits lie fragments of other digits,
over everything one grating of random direction and wavelength and white noise. Where the digits' ink is, is known for
every pixel. Two tasks: :class:`DigitScenes`, four digits to be named, one in each quadrant, and
:class:`ClutteredDigits`, a single digit anywhere. Both are our choice; the paper uses no digits.

A scene is a function of (seed, split, index) alone, whatever the batch, the order or the process: all its random
numbers come from one counter-based generator keyed by the three. The training split is an endless stream: any index at
or above its length is a further scene that no epoch has shown before. Validation and test are of fixed size, and the
digits of the three splits are disjoint (:mod:`entreg.data.digits`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from entreg.data.digits import SPLITS, digit_pool
from entreg.data.scene_painting import SceneRecipe, num_uniform, paint
from entreg.errors import InputError

MEAN, STANDARD_DEVIATION = 0.2, 0.35
"""Images are returned as (pixel - MEAN) / STANDARD_DEVIATION, pixels in [0, 1]: about the statistics of the scenes."""

LENGTHS = {"train": 2**20, "validation": 1_000, "test": 2_000}
"""Scenes per split; for train merely what counts as one epoch of the endless stream."""

TRAINING_COPIES = 8
"""Variants of each training digit, see :func:`entreg.data.digits.digit_pool`."""


class Scenes(Dataset):
    """Map-style data set of digit scenes of any recipe.

    An item is ``{"images": float32 (channels, canvas, canvas), "labels": int64 (num_digits,), "masks": bool (canvas,
    canvas)}``, normalised by :data:`MEAN` and :data:`STANDARD_DEVIATION`; labels of a single digit have no dimension.
    Digits and labels go row by row through the cells.

    Args:
        recipe: what a scene is made of.
        split: ``train``, ``validation`` or ``test``.
        length: scenes, at least 1; None: as in :data:`LENGTHS`.
        seed: non-negative; decides every scene of the split, and the variants of the training digits.

    Raises:
        InputError: unknown split or a value out of range.
    """

    num_classes = 10

    def __init__(self, recipe: SceneRecipe, split: str, *, length: int | None = None, seed: int = 0) -> None:
        if split not in SPLITS:
            raise InputError(f"unknown split '{split}', known are {', '.join(SPLITS)}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.recipe = recipe
        self.split = split
        self.seed = seed
        self.length = LENGTHS[split] if length is None else length
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {length}")
        self._stream = np.random.SeedSequence((seed, tuple(SPLITS).index(split))).generate_state(1, np.uint64)[0]

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
        images = torch.from_numpy(pixels).sub_(MEAN).div_(STANDARD_DEVIATION)
        answers = torch.from_numpy(labels)
        if self.recipe.num_digits == 1:
            answers = answers[:, 0]
        return {"images": images, "labels": answers, "masks": torch.from_numpy(masks)}

    def pixels(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scenes before normalisation, for corruptions and figures.

        Args:
            indices: as in :meth:`batch`.

        Returns:
            Pixels (b, channels, canvas, canvas) float32 in [0, 1], labels (b, num_digits) int64 and masks (b, canvas,
            canvas) bool.

        Raises:
            IndexError: an index out of range.
        """
        keys = [self._checked(index) for index in indices]
        recipe = self.recipe
        uniform = np.empty((len(keys), num_uniform(recipe)))
        noise = np.empty((len(keys), recipe.channels, recipe.canvas, recipe.canvas), dtype=np.float32)
        for place, key in enumerate(keys):
            rng = np.random.Generator(np.random.Philox(key=np.array([self._stream, key], dtype=np.uint64)))
            rng.random(out=uniform[place])
            rng.standard_normal(out=noise[place], dtype=np.float32)
        copies = TRAINING_COPIES if self.split == "train" else 1
        return paint(recipe, *digit_pool(self.split, recipe.digit_size, copies, self.seed), uniform, noise)

    def raw(self, index: int) -> np.ndarray:
        """One scene before normalisation, (canvas, canvas, channels) uint8: what corruptions work on.

        Raises:
            IndexError: an index out of range.
        """
        pixels, _, _ = self.pixels([index])
        return np.rint(pixels[0].transpose(1, 2, 0) * 255.0).astype(np.uint8)

    def prepare(self, image: np.ndarray) -> Tensor:
        """The item's ``images`` for an image like those of :meth:`raw`, (channels, canvas, canvas) float32."""
        pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
        return torch.from_numpy(pixels).div_(255.0).sub_(MEAN).div_(STANDARD_DEVIATION)

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if index < 0 or (index >= self.length and self.split != "train"):
            raise IndexError(f"scene {index} of {self.length} in split {self.split}")
        return index


class DigitScenes(Scenes):
    """Four digits, one in each quadrant, all to be named: labels (4,), the upper two first, left before right.

    Args:
        split: ``train``, ``validation`` or ``test``.
        canvas: side of the image, even, at least 32.
        num_fragments: None: 12 on 48 x 48, in proportion to the area otherwise.
        max_offset: None: as far as the quadrants allow.
        channels: 1 or 3, see :class:`SceneRecipe`.
        length: see :class:`Scenes`.
        seed: see :class:`Scenes`.
        digit_size: side of the square that a digit's ink fills.

    Raises:
        InputError: unknown split or a value out of range.
    """

    def __init__(
        self,
        split: str,
        *,
        canvas: int = 48,
        num_fragments: int | None = None,
        max_offset: int | None = None,
        channels: int = 1,
        length: int | None = None,
        seed: int = 0,
        digit_size: int = 16,
    ) -> None:
        recipe = _recipe(canvas, 2, digit_size, max_offset, num_fragments, channels)
        super().__init__(recipe, split, length=length, seed=seed)


class ClutteredDigits(Scenes):
    """Cluttered MNIST: a single digit anywhere on the canvas; labels are scalars.

    Args:
        split: ``train``, ``validation`` or ``test``.
        canvas: side of the image, at least ``digit_size``; 32, 40, 48 and 56 are what the experiments use.
        num_fragments: None: 12 on 48 x 48, in proportion to the area otherwise.
        max_offset: None: anywhere.
        channels: 1 or 3, see :class:`SceneRecipe`.
        length: see :class:`Scenes`.
        seed: see :class:`Scenes`.
        digit_size: side of the square that the digit's ink fills; 20 is MNIST's own.

    Raises:
        InputError: unknown split or a value out of range.
    """

    def __init__(
        self,
        split: str,
        *,
        canvas: int = 48,
        num_fragments: int | None = None,
        max_offset: int | None = None,
        channels: int = 1,
        length: int | None = None,
        seed: int = 0,
        digit_size: int = 20,
    ) -> None:
        recipe = _recipe(canvas, 1, digit_size, max_offset, num_fragments, channels)
        super().__init__(recipe, split, length=length, seed=seed)


def _recipe(
    canvas: int, cells: int, digit_size: int, max_offset: int | None, num_fragments: int | None, channels: int
) -> SceneRecipe:
    if max_offset is None:
        max_offset = max(0, (canvas // cells - digit_size) // 2)
    if num_fragments is None:
        num_fragments = round(12 * (canvas / 48) ** 2)
    return SceneRecipe(canvas, cells, digit_size, max_offset, num_fragments, channels=channels)
