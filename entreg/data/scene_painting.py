"""How a scene of digits among clutter is painted from given random numbers; :mod:`entreg.data.scenes` draws them.

Everything here works on a whole batch at a time and is a pure function of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entreg.errors import InputError

INK_THRESHOLD = 0.3
"""A pixel belongs to a digit's mask where the digit's ink exceeds this; 1 is the darkest ink."""

_WAVELENGTH = (5.0, 14.0)  # of the grating, in pixels
_GRATING_NUMBERS, _FRAGMENT_NUMBERS = 7, 8  # uniform random numbers that each needs


@dataclass(frozen=True)
class SceneRecipe:
    """What a scene is made of; lengths in pixels.

    Attributes:
        canvas: side of the square image, a multiple of ``cells``.
        cells: cells per side, one digit in each.
        digit_size: side of the square that a digit's ink fills, at most that of a cell.
        max_offset: largest distance of a digit from the middle of its cell along either axis; a digit never leaves its
            cell.
        num_fragments: fragments of other digits, at least 0.
        fragment_size: side of a fragment, at most ``digit_size - 4`` (fragments are cut where digits have ink).
        grating: range of the grating's amplitude, both in [0, 1].
        noise: standard deviation of the white noise, at least 0.
        channels: 1 (grey) or 3. In colour every digit and fragment has a random tint in [0.5, 1] per channel and the
            grating random amplitudes; places and shapes are those of the grey scene.

    Raises:
        InputError: a value out of range.
    """

    canvas: int
    cells: int
    digit_size: int
    max_offset: int
    num_fragments: int
    fragment_size: int = 6
    grating: tuple[float, float] = (0.05, 0.2)
    noise: float = 0.05
    channels: int = 1

    def __post_init__(self) -> None:
        if self.cells < 1 or self.canvas < self.cells or self.canvas % self.cells:
            raise InputError(f"a canvas of {self.canvas} pixels cannot be divided into {self.cells} cells per side")
        if not 4 <= self.digit_size <= self.cell:
            raise InputError(f"digit_size must be in [4, {self.cell}], the side of a cell, got {self.digit_size}")
        if not 0 <= self.max_offset <= (self.cell - self.digit_size) // 2:
            room = (self.cell - self.digit_size) // 2
            raise InputError(
                f"max_offset must be in [0, {room}] so that digits stay in their cells, got {self.max_offset}"
            )
        if self.num_fragments < 0:
            raise InputError(f"num_fragments must be at least 0, got {self.num_fragments}")
        if not 1 <= self.fragment_size <= self.digit_size - 4:
            raise InputError(f"fragment_size must be in [1, {self.digit_size - 4}], got {self.fragment_size}")
        if not 0 <= self.grating[0] <= self.grating[1] <= 1:
            raise InputError(f"grating must be two increasing amplitudes in [0, 1], got {self.grating}")
        if not self.noise >= 0:
            raise InputError(f"noise must be at least 0, got {self.noise}")
        if self.channels not in (1, 3):
            raise InputError(f"channels must be 1 or 3, got {self.channels}")

    @property
    def cell(self) -> int:
        """Side of a cell in pixels."""
        return self.canvas // self.cells

    @property
    def num_digits(self) -> int:
        """Digits per scene."""
        return self.cells**2


def num_uniform(recipe: SceneRecipe) -> int:
    """Uniform random numbers that one scene needs; the same in grey and in colour."""
    return 6 * recipe.num_digits + _GRATING_NUMBERS + _FRAGMENT_NUMBERS * recipe.num_fragments


def paint(
    recipe: SceneRecipe, pool: np.ndarray, pool_labels: np.ndarray, uniform: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paints a batch of scenes. Digits read the first random numbers: clutter changes neither them nor their places.

    Args:
        recipe: what a scene is made of.
        pool: digits (n, digit_size, digit_size) float32 in [0, 1].
        pool_labels: (n,) int64.
        uniform: random numbers (b, num_uniform(recipe)) float64 in [0, 1).
        noise: standard normal numbers (b, channels, canvas, canvas) float32; overwritten.

    Returns:
        Pixels (b, channels, canvas, canvas) float32 in [0, 1], labels (b, num_digits) int64 and masks (b, canvas,
        canvas) bool.
    """
    digits, tints, grating, fragments = np.split(
        uniform,
        np.cumsum([3 * recipe.num_digits, 3 * recipe.num_digits, _GRATING_NUMBERS]),
        axis=1,
    )
    digits = digits.reshape(len(uniform), -1, 3)
    chosen = _below(len(pool), digits[..., 0])
    canvas, mask = _digits(recipe, pool, chosen, digits[..., 1:], _tint(recipe, tints))
    clutter = _fragments(recipe, pool, fragments.reshape(len(uniform), -1, _FRAGMENT_NUMBERS))
    # The digits lie on top, with one pixel of paper around their ink.
    np.maximum(canvas, np.where(_grown(mask)[:, None], np.float32(0.0), clutter), out=canvas)
    canvas += _grating(recipe, grating)
    noise *= np.float32(recipe.noise)
    canvas += noise
    return np.clip(canvas, 0.0, 1.0, out=canvas), pool_labels[chosen], mask


def _digits(
    recipe: SceneRecipe, pool: np.ndarray, chosen: np.ndarray, places: np.ndarray, tint: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Canvas (b, c, h, w) with the digits of ``chosen`` (b, t) at ``places`` (b, t, 2) in [0, 1), and their mask."""
    ink = np.zeros((len(chosen), recipe.canvas, recipe.canvas), dtype=np.float32)
    canvas = ink[:, None] if recipe.channels == 1 else np.zeros(_shape(recipe, len(chosen)), dtype=np.float32)
    middle = (recipe.cell - recipe.digit_size) // 2
    offsets = middle - recipe.max_offset + _below(2 * recipe.max_offset + 1, places)
    for digit in range(recipe.num_digits):
        row, column = divmod(digit, recipe.cells)
        window = _window(
            offsets[:, digit, 0] + row * recipe.cell, offsets[:, digit, 1] + column * recipe.cell, recipe.digit_size
        )
        image = pool[chosen[:, digit]]
        ink[window] = image
        if recipe.channels > 1:
            for channel in range(recipe.channels):
                canvas[:, channel][window] = image * tint[:, digit, channel, None, None]
    return canvas, ink > INK_THRESHOLD


def _fragments(recipe: SceneRecipe, pool: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Canvas (b, c, h, w) of square pieces of digits, the darker ink where they overlap; ``numbers`` (b, f, 8)."""
    canvas = np.zeros(_shape(recipe, len(numbers)), dtype=np.float32)
    size = recipe.fragment_size
    which = _below(len(pool), numbers[..., 0])
    source = 2 + _below(recipe.digit_size - size - 3, numbers[..., 1:3])
    place = _below(recipe.canvas - size + 1, numbers[..., 3:5])
    tint = _tint(recipe, numbers[..., 5:])
    ink = pool[(which[..., None, None], *_window(source[..., 0], source[..., 1], size)[1:])]
    for fragment in range(recipe.num_fragments):
        window = _window(place[:, fragment, 0], place[:, fragment, 1], size)
        for channel in range(recipe.channels):
            layer = canvas[:, channel]
            piece = ink[:, fragment]
            if recipe.channels > 1:
                piece = piece * tint[:, fragment, channel, None, None]
            layer[window] = np.maximum(layer[window], piece)
    return canvas


def _grating(recipe: SceneRecipe, numbers: np.ndarray) -> np.ndarray:
    """(b, c, h, w): a plane wave between 0 and its amplitude; ``numbers`` (b, 7): direction, length, phase, colour."""
    direction = np.pi * numbers[:, 0]
    frequency = 2.0 * np.pi / (_WAVELENGTH[0] + (_WAVELENGTH[1] - _WAVELENGTH[0]) * numbers[:, 1])
    low, high = recipe.grating
    amplitude = (low + (high - low) * numbers[:, 3:]).astype(np.float32)
    # sin(x + y + phase) = sin(x) cos(y + phase) + cos(x) sin(y + phase): a sine per row and column, not per pixel.
    pixel = np.arange(recipe.canvas)
    across = (frequency * np.cos(direction))[:, None] * pixel
    down = (frequency * np.sin(direction))[:, None] * pixel + 2.0 * np.pi * numbers[:, 2:3]
    rows = np.stack([np.cos(down), np.sin(down)], axis=2).astype(np.float32)
    columns = np.stack([np.sin(across), np.cos(across)], axis=1).astype(np.float32)
    wave = 0.5 + 0.5 * (rows @ columns)
    return amplitude[:, : recipe.channels, None, None] * wave[:, None]


def _tint(recipe: SceneRecipe, numbers: np.ndarray) -> np.ndarray:
    """Colours in [0.5, 1], (b, things, 3) float32, from as many uniform numbers."""
    return (0.5 + 0.5 * numbers.reshape(len(numbers), -1, 3)).astype(np.float32)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask (b, h, w) and the four neighbours of each of its pixels."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    grown[:, :, 1:] |= mask[:, :, :-1]
    grown[:, :, :-1] |= mask[:, :, 1:]
    return grown


def _window(top: np.ndarray, left: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index arrays of one ``size`` x ``size`` window in each image of a batch, upper left corners (b, ...)."""
    side = np.arange(size)
    batch = np.arange(len(top)).reshape(-1, *(1,) * (top.ndim + 1))
    return batch, top[..., None, None] + side[:, None], left[..., None, None] + side


def _below(limit: int, uniform: np.ndarray) -> np.ndarray:
    """Integers in [0, limit) from uniform numbers in [0, 1)."""
    return (uniform * limit).astype(np.int64)


def _shape(recipe: SceneRecipe, batch: int) -> tuple[int, int, int, int]:
    return (batch, recipe.channels, recipe.canvas, recipe.canvas)
