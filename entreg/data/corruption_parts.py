"""The parts that the corruptions are made of: blurs, zooms, clouds, drops, frost (see ``corruption_functions``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np
from numba import njit
from numpy.random import RandomState
from PIL import Image
from scipy import ndimage, sparse

from entreg.data.assets import asset_path
from entreg.errors import AssetError

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey (ITU-R BT.601)."""

Generators = Sequence[RandomState]
"""One random generator per image."""

_FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


def clipped(values: np.ndarray) -> np.ndarray:
    """Values cut to [0, 1], as grey levels in [0, 255]."""
    return np.clip(values, 0.0, 1.0) * 255


def drawn(generators: Generators, draw: Callable[[RandomState], np.ndarray | float]) -> np.ndarray:
    """One draw of every generator, stacked."""
    return np.stack([draw(rng) for rng in generators])


def luma(values: np.ndarray) -> np.ndarray:
    """Grey (n, h, w, 1) of values of one or three channels."""
    return values if values.shape[3] == 1 else values @ LUMA[:, None]


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of rows and columns, cut at four sigma, edges repeated."""
    return ndimage.gaussian_filter(values, (0, sigma, sigma, 0), mode="nearest", truncate=4.0)


def per_image(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """``function`` of every image; OpenCV drops a single channel, which is put back."""
    return np.stack([function(image).reshape(image.shape) for image in values])


def through_pillow(function: Callable[[Image.Image], Image.Image], images: np.ndarray) -> np.ndarray:
    """``function`` of every image as a Pillow image."""
    squeezed = images[..., 0] if images.shape[3] == 1 else images
    results = [np.asarray(function(Image.fromarray(np.ascontiguousarray(image)))) for image in squeezed]
    return np.stack(results).reshape(images.shape).astype(np.float64)


def disk(radius: float, softness: float) -> np.ndarray:
    """A disk of unit mass on a square of pixels, its rim smoothed; rows and columns of zeros are cut off."""
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), ksize=(size, size), sigmaX=softness)
    margin = min(reach, int(np.argmax(kernel.any(axis=1))))
    return kernel[margin : len(kernel) - margin, margin : len(kernel) - margin]


def blurred_along(values: np.ndarray, radius: int, sigma: float, angles: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur of (n, h, w, c), image i along ``angles[i]`` in degrees."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2.0 * sigma**2))
    directions = np.deg2rad(angles)[:, None]
    rows = np.ceil(steps * np.sin(directions) - 0.5).astype(np.int64)
    columns = np.ceil(steps * np.cos(directions) - 0.5).astype(np.int64)
    return _weighted_shifts(values, weights / weights.sum(), rows, columns)


@njit(cache=True, nogil=True)
def _weighted_shifts(values, weights, rows, columns):
    """Sum over k of weights[k] · the image shifted by (rows[i, k], columns[i, k]), edges repeated."""
    count, height, width, channels = values.shape
    result = np.zeros_like(values)
    for i in range(count):
        for k in range(len(weights)):
            for y in range(height):
                source_y = min(max(y + rows[i, k], 0), height - 1)
                for x in range(width):
                    source_x = min(max(x + columns[i, k], 0), width - 1)
                    for channel in range(channels):
                        result[i, y, x, channel] += weights[k] * values[i, source_y, source_x, channel]
    return result


@njit(cache=True, nogil=True)
def displace_pixels(pixels, offsets, reach):
    """Glass: each pixel takes the colour of a random neighbour, in place, from the last row and column to the first.

    The published loop is written as a swap, but on array views it copies, and the published images show that.
    """
    count, height, width, channels = pixels.shape
    for i in range(count):
        for step in range(offsets.shape[1]):
            for row in range(height - 2 * reach):
                y = height - reach - row
                for column in range(width - 2 * reach):
                    x = width - reach - column
                    source_x = x + offsets[i, step, row, column, 0]
                    source_y = y + offsets[i, step, row, column, 1]
                    for channel in range(channels):
                        pixels[i, y, x, channel] = pixels[i, source_y, source_x, channel]


@lru_cache(maxsize=128)
def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """(size, size) matrix that enlarges a line of pixels about its middle by ``factor``, linearly, and crops it."""
    crop = int(np.ceil(size / factor))
    start = (size - crop) // 2
    enlarged = ndimage.zoom(np.eye(crop), (factor, 1), order=1)
    trim = (len(enlarged) - size) // 2
    matrix = np.zeros((size, size))
    matrix[:, start : start + crop] = enlarged[trim : trim + size]
    return matrix


@lru_cache(maxsize=8)
def mean_zoom(height: int, width: int, factors: tuple[float, ...]) -> sparse.csr_array:
    """(h · w, h · w) matrix: mean of the image and its enlargements."""
    total = sparse.eye_array(height * width, format="csr")
    for factor in factors:
        pair = sparse.csr_array(zoom_matrix(height, factor)), sparse.csr_array(zoom_matrix(width, factor))
        total = total + sparse.kron(*pair, format="csr")
    return total / (len(factors) + 1)


def diamond_square(size: int, decay: float, generators: Generators) -> np.ndarray:
    """(n, size, size) height maps in [0, 1] that wrap around; ``size`` is a power of two."""
    heights = np.zeros((len(generators), size, size))
    step, roughness = size, 100.0

    def jolted(sums: np.ndarray) -> np.ndarray:
        shape, reach = sums.shape[1:], roughness
        return sums / 4 + reach * drawn(generators, lambda rng: rng.uniform(-reach, reach, shape))

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = jolted(pairs + np.roll(pairs, -1, axis=2))
        middles = heights[:, half::step, half::step]
        above, beside = middles + np.roll(middles, 1, axis=1), corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = jolted(above + beside)
        left, below = middles + np.roll(middles, 1, axis=2), corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, ::step] = jolted(left + below)
        step, roughness = half, roughness / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def drop_shading(levels: np.ndarray) -> np.ndarray:
    """(h, w) float32: light and shadow of drops, from the distance to their rims; ``levels`` is (h, w) uint8."""
    distance = cv2.distanceTransform(255 - cv2.Canny(levels, 50, 150), cv2.DIST_L2, 5)
    shaded = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20.0), (3, 3)).astype(np.uint8))
    light = cv2.filter2D(shaded, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    return cv2.blur(light, (3, 3)).astype(np.float32)


@lru_cache(maxsize=8)
def frost_textures(scale: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    """The five photographs of frost that the published scripts use, as red, green, blue, scaled by ``scale``.

    One that would be smaller than the image is enlarged to cover it.
    """
    folder = asset_path("frost_textures")
    textures = []
    for name in _FROST_FILES:
        photograph = cv2.imread(str(folder / name))
        if photograph is None:
            raise AssetError(f"{folder / name} is not a readable image; delete {folder} and run again")
        factor = max(scale, (height + 1) / photograph.shape[0], (width + 1) / photograph.shape[1])
        if factor != 1.0:
            photograph = cv2.resize(photograph, (0, 0), fx=factor, fy=factor)
        textures.append(photograph[..., ::-1].astype(np.float64))
    return tuple(textures)
