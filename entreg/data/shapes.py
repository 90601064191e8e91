"""A hundred classes of textured shapes on a patchwork of textures, with masks, at any resolution: ImageNet's stand-in.

The class is the pair of one of ten silhouettes and one of ten textures: neither alone names it. Place, size, rotation,
wavelength and colours are random; the background is made of six cells, each with a texture of the same ten, so that
the texture has to be read inside the silhouette. For training a full ViT-Base/16 at 224 where there is no ImageNet.
Our choice; the paper has nothing like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from entreg.data.indexed_scenes import IndexedScenes
from entreg.errors import InputError

Field = np.ndarray

BACKGROUND_CELLS = 6
_RADIUS = (0.2, 0.38)  # of the silhouette, in units of the image's side
_WAVELENGTH = (0.09, 0.14)  # of the textures, in the same units
_NOISE = 0.04


def _polygon(corners: int) -> Callable[[Field, Field], Field]:
    """Inside of a regular polygon whose corners lie on the unit circle."""
    angles = 2.0 * np.pi * np.arange(corners) / corners

    def inside(u: Field, v: Field) -> Field:
        result = np.ones(u.shape, dtype=bool)
        for angle in angles:
            result &= u * np.cos(angle) + v * np.sin(angle) < np.cos(np.pi / corners)
        return result

    return inside


_TRIANGLE = _polygon(3)

SILHOUETTES: dict[str, Callable[[Field, Field], Field]] = {
    "disk": lambda u, v: u**2 + v**2 < 1.0,
    "ellipse": lambda u, v: u**2 + (v / 0.45) ** 2 < 1.0,
    "ring": lambda u, v: (u**2 + v**2 < 1.0) & (u**2 + v**2 > 0.55**2),
    "half_disk": lambda u, v: (u**2 + v**2 < 1.0) & (v > 0.0),
    "crescent": lambda u, v: (u**2 + v**2 < 1.0) & ((u - 0.5) ** 2 + v**2 > 0.75**2),
    "triangle": _TRIANGLE,
    "square": _polygon(4),
    "hexagon": _polygon(6),
    "hexagram": lambda u, v: _TRIANGLE(u, v) | _TRIANGLE(-u, v),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95),
}
"""Inside of each silhouette as a function of coordinates in which it fits the unit circle."""

TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "plain": lambda p, q: np.ones_like(p),
    "stripes": lambda p, q: np.sin(p) > 0.0,
    "checkers": lambda p, q: np.sin(p) * np.sin(q) > 0.0,
    "dots": lambda p, q: np.cos(p) + np.cos(q) > 0.8,
    "rings": lambda p, q: np.sin(np.hypot(p, q)) > 0.0,
    "waves": lambda p, q: np.sin(p + 2.0 * np.sin(0.5 * q)) > 0.0,
    "mesh": lambda p, q: np.maximum(np.cos(p), np.cos(q)) > 0.8,
    "spokes": lambda p, q: np.sin(10.0 * np.arctan2(q, p)) > 0.0,
    "bands": lambda p, q: 0.5 + 0.5 * np.sin(0.5 * p),
    "bricks": lambda p, q: (np.cos(q) > 0.8) | (np.cos(0.5 * p + np.pi * (np.floor(q / (2 * np.pi)) % 2)) > 0.9),
}
"""Share of the second of two colours, in [0, 1], as a function of coordinates times 2 pi over the wavelength."""

NUM_CLASSES = len(SILHOUETTES) * len(TEXTURES)


class TexturedShapes(IndexedScenes):
    """One textured silhouette per image; the label is ``10 * silhouette + texture``, and has no dimension.

    Args:
        split: see :class:`~entreg.data.indexed_scenes.IndexedScenes`.
        size: side of the square image in pixels, 32 to 1024; the textures need about 96 to be told apart.
        length: as for the split.
        seed: as for the split.

    Raises:
        InputError: unknown split or a value out of range.
    """

    num_classes = NUM_CLASSES
    mean = 0.5
    standard_deviation = 0.5

    def __init__(self, split: str, *, size: int = 224, length: int | None = None, seed: int = 0) -> None:
        super().__init__(split, length=length, seed=seed)
        if not 32 <= size <= 1024:
            raise InputError(f"size must lie in [32, 1024], got {size}")
        self.size = size

    def pixels(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images = np.empty((len(indices), 3, self.size, self.size), dtype=np.float32)
        labels = np.empty((len(indices), 1), dtype=np.int64)
        masks = np.empty((len(indices), self.size, self.size), dtype=bool)
        for place, rng in enumerate(self.generators(indices)):
            labels[place] = number = rng.integers(NUM_CLASSES)
            masks[place] = _paint(images[place], int(number), rng)
        return images, labels, masks


def _paint(image: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Paints one scene of class ``number`` into ``image`` (3, size, size) and returns its mask (size, size)."""
    size = image.shape[-1]
    side = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.broadcast_to(side, (size, size)), np.broadcast_to(side[:, None], (size, size))
    radius = rng.uniform(*_RADIUS)
    middle = rng.uniform(radius, 1.0 - radius, 2)
    u, v = _turned(x - middle[0], y - middle[1], rng)
    silhouette, texture = divmod(number, len(TEXTURES))
    inside = list(SILHOUETTES.values())[silhouette](u / radius, v / radius)
    seeds = rng.random((BACKGROUND_CELLS, 2))
    nearest = np.argmin([(x - sx) ** 2 + (y - sy) ** 2 for sx, sy in seeds], axis=0)
    nearest[inside] = BACKGROUND_CELLS
    textures = [*rng.integers(len(TEXTURES), size=BACKGROUND_CELLS), texture]
    centers = [*seeds, middle]
    for cell, (kind, center) in enumerate(zip(textures, centers, strict=True)):
        where = nearest == cell
        p, q = _turned(x[where] - center[0], y[where] - center[1], rng)
        phase = 2.0 * np.pi / rng.uniform(*_WAVELENGTH)
        share = list(TEXTURES.values())[kind](p * phase, q * phase).astype(np.float32)
        # The two colours differ by half the range in every channel, so that every texture can be seen.
        first = rng.random((3, 1), dtype=np.float32)
        image[:, where] = first + ((first + 0.5) % 1.0 - first) * share
    image += _NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    np.clip(image, 0.0, 1.0, out=image)
    return inside


def _turned(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    angle = rng.uniform(0.0, 2.0 * np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x
