"""The 19 corruptions of ImageNet-C and CIFAR-C (Hendrycks and Dietterich, 2019), on batches of images.

Each function takes uint8 images (n, h, w, c), one setting of its constants and one random generator per image, and
returns float64 values in [0, 255] of the same shape. An image's result depends on that image, the constants and its own
generator alone; random numbers are drawn in the order of the published scripts, so that with the same stream the
published images come out, and rounding follows those scripts as well. Any height and width of at least 16 pixels
will do; constants are in pixels, as published.

Where the published scripts need ImageMagick (motion blur, snow), its directional blur is computed here from its
documented definition: a one-sided Gaussian along a ray, sampled at whole pixels, edge pixels repeated.

Three channels are red, green, blue. One channel is corrupted as it is where a corruption treats channels alike; the
three that add colour (:data:`COLORED`) see grey as three equal channels and are turned back to grey by luma (our
choice; the published scripts know colour images only).
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from entreg.data.corruption_parts import (
    Generators,
    blurred_along,
    clipped,
    diamond_square,
    disk,
    displace_pixels,
    drawn,
    drop_shading,
    frost_textures,
    luma,
    mean_zoom,
    per_image,
    smoothed,
    through_pillow,
    zoom_matrix,
)

COLORED = frozenset({"frost", "spatter", "saturate"})
"""Corruptions that add colour to a grey image."""

_WATER = np.array([175.0, 238.0, 238.0]) / 255.0
_MUD = np.array([63.0, 42.0, 20.0]) / 255.0

# Noise


def gaussian_noise(images: np.ndarray, deviation: float, generators: Generators) -> np.ndarray:
    """Adds normal noise of the given standard deviation (of values in [0, 1])."""
    noise = drawn(generators, lambda rng: rng.normal(size=images.shape[1:], scale=deviation))
    return clipped(images / 255.0 + noise)


def shot_noise(images: np.ndarray, photons: float, generators: Generators) -> np.ndarray:
    """Replaces each value by a Poisson count whose mean at full brightness is ``photons``."""
    counts = np.stack([rng.poisson(rates) for rng, rates in zip(generators, images / 255.0 * photons, strict=True)])
    return clipped(counts / float(photons))


def impulse_noise(images: np.ndarray, fraction: float, generators: Generators) -> np.ndarray:
    """Sets a ``fraction`` of the values to black or white, with equal chances."""
    draws = drawn(generators, lambda rng: rng.random_sample((2, *images.shape[1:])))
    flipped, salt = draws[:, 0] <= fraction, draws[:, 1] <= 0.5
    return clipped(np.where(flipped, salt, images / 255.0))


def speckle_noise(images: np.ndarray, deviation: float, generators: Generators) -> np.ndarray:
    """Multiplies each value by 1 plus normal noise of the given standard deviation."""
    values = images / 255.0
    noise = drawn(generators, lambda rng: rng.normal(size=images.shape[1:], scale=deviation))
    return clipped(values + values * noise)


# Blur


def gaussian_blur(images: np.ndarray, sigma: float, generators: Generators) -> np.ndarray:
    """Gaussian blur of ``sigma`` pixels."""
    return clipped(smoothed(images / 255.0, sigma))


def defocus_blur(images: np.ndarray, constants: tuple[float, float], generators: Generators) -> np.ndarray:
    """Blur by a disk: ``constants`` are its radius and the sigma that softens its rim, in pixels."""
    kernel = disk(*constants)
    return clipped(per_image(lambda image: cv2.filter2D(image, -1, kernel), images / 255.0))


def glass_blur(images: np.ndarray, constants: tuple[float, int, int], generators: Generators) -> np.ndarray:
    """Pixels displaced at random between two Gaussian blurs: sigma, largest displacement, rounds."""
    sigma, reach, rounds = constants
    height, width = images.shape[1:3]
    shape = (rounds, height - 2 * reach, width - 2 * reach, 2)
    offsets = drawn(generators, lambda rng: rng.randint(-reach, reach, size=shape))
    pixels = (smoothed(images / 255.0, sigma) * 255).astype(np.uint8)
    displace_pixels(pixels, offsets, reach)
    return clipped(smoothed(pixels / 255.0, sigma))


def motion_blur(images: np.ndarray, constants: tuple[int, float], generators: Generators) -> np.ndarray:
    """Blur along a ray within 45 degrees of the rows: radius and sigma in pixels."""
    angles = drawn(generators, lambda rng: rng.uniform(-45, 45))
    # ImageMagick gives whole grey levels.
    return np.rint(blurred_along(images.astype(np.float64), *constants, angles))


def zoom_blur(images: np.ndarray, factors: tuple[float, ...], generators: Generators) -> np.ndarray:
    """Mean of the image and its enlargements about the centre by ``factors``."""
    count, height, width, channels = images.shape
    columns = (images / 255.0).transpose(1, 2, 0, 3).reshape(height * width, count * channels)
    mean = mean_zoom(height, width, tuple(factors)) @ columns
    return clipped(mean.reshape(height, width, count, channels).transpose(2, 0, 1, 3))


# Weather


def snow(images: np.ndarray, constants: tuple[float, ...], generators: Generators) -> np.ndarray:
    """Falling flakes over a whitened image.

    Args:
        images: (n, h, w, c) uint8.
        constants: mean and standard deviation of the flakes' noise, its enlargement, the threshold of a flake, radius
            and sigma of the flakes' motion in pixels, and the weight of the image that is not whitened.
        generators: one per image.
    """
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    height, width = images.shape[1:3]
    noise = drawn(generators, lambda rng: rng.normal(size=(height, width), loc=mean, scale=deviation))
    angles = drawn(generators, lambda rng: rng.uniform(-135, -45))
    flakes = zoom_matrix(height, zoom) @ noise @ zoom_matrix(width, zoom).T
    flakes[flakes < threshold] = 0.0
    levels = (np.clip(flakes, 0.0, 1.0) * 255).astype(np.uint8).astype(np.float64)[..., None]
    fallen = np.rint(blurred_along(levels, radius, sigma, angles)) / 255.0
    values = images / 255.0
    whitened = kept * values + (1 - kept) * np.maximum(values, luma(values) * 1.5 + 0.5)
    return clipped(whitened + fallen + np.rot90(fallen, k=2, axes=(1, 2)))


def frost(images: np.ndarray, constants: tuple[float, float, float], generators: Generators) -> np.ndarray:
    """A random crop of a photograph of frost over the image: weights of image and frost, scale of the photographs.

    Raises:
        AssetError: the photographs are not in the cache and cannot be fetched, or are damaged.
    """
    weight, frost_weight, scale = constants
    height, width = images.shape[1:3]
    textures = frost_textures(scale, height, width)
    crops = np.empty(images.shape)
    for crop, rng in zip(crops, generators, strict=True):
        texture = textures[rng.randint(len(textures))]
        top = rng.randint(0, max(1, texture.shape[0] - height))
        left = rng.randint(0, max(1, texture.shape[1] - width))
        crop[:] = texture[top : top + height, left : left + width]
    return np.clip(weight * images + frost_weight * crops, 0.0, 255.0)


def fog(images: np.ndarray, constants: tuple[float, float], generators: Generators) -> np.ndarray:
    """Adds a diamond-square height map and keeps the brightest value: thickness, decay of the map's roughness."""
    thickness, decay = constants
    height, width = images.shape[1:3]
    clouds = diamond_square(1 << (max(height, width) - 1).bit_length(), decay, generators)[:, :height, :width, None]
    values = images / 255.0
    brightest = values.max(axis=(1, 2, 3), keepdims=True)
    return clipped((values + thickness * clouds) * brightest / (brightest + thickness))


def spatter(images: np.ndarray, constants: tuple[float, ...], generators: Generators) -> np.ndarray:
    """Drops of water or splashes of mud.

    Args:
        images: (n, h, w, 3) uint8.
        constants: mean and standard deviation of the liquid's noise, the sigma that smooths it, its threshold, the
            water's strength or the sigma of the mud's rim, and 0 for water or 1 for mud.
        generators: one per image.
    """
    mean, deviation, sigma, threshold, strength, is_mud = constants
    noise = drawn(generators, lambda rng: rng.normal(size=images.shape[1:3], loc=mean, scale=deviation))
    liquid = smoothed(noise[..., None], sigma)[..., 0]
    values = images / 255.0
    if is_mud:
        cover = smoothed((liquid > threshold).astype(np.float64)[..., None], strength)
        cover[cover < 0.8] = 0.0
        return clipped(values * (1.0 - cover) + _MUD * cover)
    liquid[liquid < threshold] = 0.0
    levels = (liquid * 255).astype(np.uint8)
    drops = np.stack([layer * drop_shading(layer) for layer in levels])
    highest = drops.max(axis=(1, 2), keepdims=True)
    # Without a drop there is nothing to scale (the published script divides zero by zero).
    cover = np.divide(drops, highest, out=np.zeros_like(drops), where=highest > 0)[..., None] * strength
    return clipped(values + _WATER * cover)


# Digital


def brightness(images: np.ndarray, amount: float, generators: Generators) -> np.ndarray:
    """Adds ``amount`` to the value V of hue, saturation and value: the colour is scaled until its maximum is V."""
    values = images / 255.0
    value = values.max(axis=3, keepdims=True)
    raised = np.clip(value + amount, 0.0, 1.0)
    return clipped(np.where(value > 0, values * raised / np.where(value > 0, value, 1.0), raised))


def contrast(images: np.ndarray, factor: float, generators: Generators) -> np.ndarray:
    """Scales the distances from each channel's mean by ``factor``."""
    values = images / 255.0
    means = values.mean(axis=(1, 2), keepdims=True)
    return clipped((values - means) * factor + means)


def saturate(images: np.ndarray, constants: tuple[float, float], generators: Generators) -> np.ndarray:
    """Maps the saturation S to factor · S + offset, at most 1, with hue and value kept; a grey pixel turns reddish."""
    factor, offset = constants
    values = images / 255.0
    value = values.max(axis=3, keepdims=True)
    spread = value - values.min(axis=3, keepdims=True)
    # How far each channel lies below the value, relative to the lowest one; hue 0 of a grey pixel is red.
    depth = np.where(spread > 0, (value - values) / np.where(spread > 0, spread, 1.0), np.array([0.0, 1.0, 1.0]))
    saturation = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    return clipped(value * (1.0 - depth * np.clip(saturation * factor + offset, 0.0, 1.0)))


def jpeg_compression(images: np.ndarray, quality: int, generators: Generators) -> np.ndarray:
    """JPEG of the given quality, encoded and decoded."""

    def decoded(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return through_pillow(decoded, images)


def pixelate(images: np.ndarray, factor: float, generators: Generators) -> np.ndarray:
    """Shrinks the image to ``factor`` of its size and enlarges it again, both by averaging boxes."""
    height, width = images.shape[1:3]
    small = (int(width * factor), int(height * factor))
    return through_pillow(
        lambda image: image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX), images
    )


def elastic_transform(images: np.ndarray, constants: tuple[float, float, float], generators: Generators) -> np.ndarray:
    """A random affine map, then smooth random displacements: their strength, their sigma, the affine map's reach."""
    strength, sigma, reach = constants
    height, width = images.shape[1:3]
    centre, arm = np.float32((height, width)) // 2, min(height, width) // 3
    corners = np.float32([centre + arm, [centre[0] + arm, centre[1] - arm], centre - arm])
    moved = corners + drawn(generators, lambda rng: rng.uniform(-reach, reach, size=corners.shape)).astype(np.float32)
    draws = drawn(generators, lambda rng: rng.uniform(-1, 1, size=(2, height, width)))
    smooth = ndimage.gaussian_filter(draws, (0, 0, sigma, sigma), mode="reflect", truncate=3)
    shifts = (smooth * strength).astype(np.float32)
    rows, columns = np.mgrid[:height, :width]
    result = np.empty(images.shape)
    values = (images / 255.0).astype(np.float32)
    for image, target, (right, down), out in zip(values, moved, shifts, result, strict=True):
        warped = cv2.warpAffine(
            image, cv2.getAffineTransform(corners, target), (width, height), borderMode=cv2.BORDER_REFLECT_101
        ).reshape(image.shape)
        for channel in range(image.shape[2]):
            places = (rows + down, columns + right)
            out[..., channel] = ndimage.map_coordinates(warped[..., channel], places, order=1, mode="reflect")
    return clipped(result)
