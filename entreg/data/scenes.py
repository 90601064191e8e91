"""Scenes of handwritten digits among clutter, for offline experiments on what a vision model attends to.

One digit per cell of a grid of cells, at a random place in its cell; under the digits lie fragments of other digits,
over everything one grating of random direction and wavelength and white noise. Where the digits' ink is, is known for
every pixel. Two tasks: :class:`DigitScenes`, four digits to be named, one in each quadrant, and
:class:`ClutteredDigits`, a single digit anywhere. Both are our choice; the paper uses no digits.

A scene is a function of (seed, split, index) alone, and the training split is an endless stream
(:mod:`entreg.data.indexed_scenes`); the digits of the three splits are disjoint (:mod:`entreg.data.digits`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entreg.data.digits import digit_pool
from entreg.data.indexed_scenes import IndexedScenes
from entreg.data.scene_painting import SceneRecipe, num_uniform, paint

MEAN, STANDARD_DEVIATION = 0.2, 0.35
"""Images are returned as (pixel - MEAN) / STANDARD_DEVIATION, pixels in [0, 1]: about the statistics of the scenes."""

TRAINING_COPIES = 8
"""Variants of each training digit, see :func:`entreg.data.digits.digit_pool`."""


class Scenes(IndexedScenes):
    """Digit scenes of any recipe.

    Digits and labels go row by row through the cells.

    Args:
        recipe: what a scene is made of.
        split: see :class:`~entreg.data.indexed_scenes.IndexedScenes`.
        length: as for the split.
        seed: as for the split; also decides the variants of the training digits.

    Raises:
        InputError: unknown split or a value out of range.
    """

    num_classes = 10
    mean = MEAN
    standard_deviation = STANDARD_DEVIATION

    def __init__(self, recipe: SceneRecipe, split: str, *, length: int | None = None, seed: int = 0) -> None:
        super().__init__(split, length=length, seed=seed)
        self.recipe = recipe

    def pixels(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        recipe = self.recipe
        uniform = np.empty((len(indices), num_uniform(recipe)))
        noise = np.empty((len(indices), recipe.channels, recipe.canvas, recipe.canvas), dtype=np.float32)
        for place, rng in enumerate(self.generators(indices)):
            rng.random(out=uniform[place])
            rng.standard_normal(out=noise[place], dtype=np.float32)
        copies = TRAINING_COPIES if self.split == "train" else 1
        return paint(recipe, *digit_pool(self.split, recipe.digit_size, copies, self.seed), uniform, noise)


class DigitScenes(Scenes):
    """Four digits, one in each quadrant, all to be named: labels (4,), the upper two first, left before right.

    Args:
        split: ``train``, ``validation`` or ``test``.
        canvas: side of the image, even, at least 32.
        num_fragments: None: 12 on 48 x 48, in proportion to the area otherwise.
        max_offset: None: as far as the quadrants allow.
        channels: 1 or 3, see :class:`SceneRecipe`.
        length: see :class:`~entreg.data.indexed_scenes.IndexedScenes`.
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
        length: see :class:`~entreg.data.indexed_scenes.IndexedScenes`.
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
