"""The 15 + 4 common corruptions of ImageNet-C and CIFAR-C (Hendrycks and Dietterich, 2019) at five severities.

Two sets of severity constants exist: those of ImageNet-C, for images of about 224 pixels, and the milder ones of
CIFAR-C, for 32 pixels. Both are the published ones. A corrupted image is a function of (image, corruption, severity,
index, seed) alone: neither the batch, nor the order, nor the number of threads changes it. Its random numbers come from
numpy's frozen ``RandomState`` distributions over a counter-based generator, so that they are the same in every version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.random import Philox, RandomState, SeedSequence

from entreg.data import corruption_functions as functions
from entreg.data.corruption_parts import LUMA
from entreg.errors import InputError
from entreg.names import require_known

CATEGORIES = MappingProxyType(
    {
        "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
        "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        "weather": ("snow", "frost", "fog", "brightness"),
        "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    }
)
"""The 15 corruptions of the benchmark by category, in the published order."""

CORRUPTIONS: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)
"""The 15 corruptions over which the mean corruption error is taken."""

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four further ones, published for validation: never part of the mean corruption error."""

ALL_CORRUPTIONS = CORRUPTIONS + EXTRA_CORRUPTIONS

SEVERITIES = (1, 2, 3, 4, 5)

CONSTANTS_VERSION = 1
"""Raised whenever a corrupted image changes; part of every cache's key."""

# The largest side in pixels that gets CIFAR-C's constants by default (our choice).
_LARGEST_SMALL_IMAGE = 96
# Values that are worked on at once: 32 MiB in float64.
_CHUNK_VALUES = 2**22

CONSTANTS = MappingProxyType(
    {
        "cifar_c": MappingProxyType(
            {
                "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
                "shot_noise": (500, 250, 100, 75, 50),
                "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
                "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
                "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
                "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
                "zoom_blur": tuple(tuple(np.arange(1, stop, 0.01)) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),
                "snow": (
                    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
                ),
                "frost": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
                "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
                "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
                "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
                "elastic_transform": (
                    (0.0, 0.0, 32 * 0.08),
                    (32 * 0.05, 32 * 0.2, 32 * 0.07),
                    (32 * 0.08, 32 * 0.06, 32 * 0.06),
                    (32 * 0.1, 32 * 0.04, 32 * 0.05),
                    (32 * 0.1, 32 * 0.03, 32 * 0.03),
                ),
                "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
                "jpeg_compression": (80, 65, 58, 50, 40),
                "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
                "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
                "spatter": (
                    (0.62, 0.1, 0.7, 0.7, 0.5, 0),
                    (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                    (0.65, 0.3, 1, 0.69, 0.5, 0),
                    (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                    (0.65, 0.1, 0.5, 0.68, 0.6, 1),
                ),
                "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
            }
        ),
        "imagenet_c": MappingProxyType(
            {
                "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
                "shot_noise": (60, 25, 12, 5, 3),
                "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
                "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
                "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                "zoom_blur": tuple(
                    tuple(np.arange(1, stop, step))
                    for stop, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
                ),
                "snow": (
                    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
                ),
                "frost": ((1, 0.4, 1.0), (0.8, 0.6, 1.0), (0.7, 0.7, 1.0), (0.65, 0.7, 1.0), (0.6, 0.75, 1.0)),
                "fog": ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
                "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
                "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
                # 244 is the published script's number; 224 was meant.
                "elastic_transform": (
                    (244 * 2, 244 * 0.7, 244 * 0.1),
                    (244 * 2, 244 * 0.08, 244 * 0.2),
                    (244 * 0.05, 244 * 0.01, 244 * 0.02),
                    (244 * 0.07, 244 * 0.01, 244 * 0.02),
                    (244 * 0.12, 244 * 0.01, 244 * 0.02),
                ),
                "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
                "jpeg_compression": (25, 18, 15, 10, 7),
                "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
                "gaussian_blur": (1, 2, 3, 4, 6),
                "spatter": (
                    (0.65, 0.3, 4, 0.69, 0.6, 0),
                    (0.65, 0.3, 3, 0.68, 0.6, 0),
                    (0.65, 0.3, 2, 0.68, 0.5, 0),
                    (0.65, 0.3, 1, 0.65, 1.5, 1),
                    (0.67, 0.4, 1, 0.65, 1.5, 1),
                ),
                "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
            }
        ),
    }
)
"""Published constants: family, then corruption, to one setting per severity (see ``corruption_functions``)."""


def constants_for(height: int, width: int) -> str:
    """The family of constants that images of this size get by default: ``cifar_c`` up to 96 pixels (our choice)."""
    return "cifar_c" if max(height, width) <= _LARGEST_SMALL_IMAGE else "imagenet_c"


def corrupt(
    images: np.ndarray,
    corruption: str,
    severity: int,
    *,
    indices: Iterable[int] | None = None,
    seed: int = 0,
    constants: str = "auto",
    num_threads: int = 1,
) -> np.ndarray:
    """Corrupt a batch of images.

    Args:
        images: (n, h, w, c) uint8 with c = 1 (grey) or 3 (red, green, blue); h and w at least 16.
        corruption: one of :data:`ALL_CORRUPTIONS`.
        severity: 1 to 5.
        indices: the images' places in their data set, at least 0, which together with the seed decide their random
            numbers; None: 0 to n - 1.
        seed: at least 0.
        constants: ``cifar_c``, ``imagenet_c``, or ``auto`` (:func:`constants_for`).
        num_threads: at least 1; the result does not depend on it.

    Returns:
        (n, h, w, c) uint8.

    Raises:
        InputError: an unknown name, or shapes, dtypes or values that do not fit the above.
        AssetError: of ``frost`` only: its photographs are not in the cache and cannot be fetched, or are damaged.
    """
    images = require_images(images)
    setting = _setting(corruption, severity, constants, images.shape)
    places = np.arange(len(images)) if indices is None else np.asarray(list(indices))
    if places.shape != (len(images),) or (len(places) and (places.dtype.kind not in "iu" or places.min() < 0)):
        raise InputError(f"indices must be {len(images)} integers that are at least 0, one for each image")
    if seed < 0 or num_threads < 1:
        raise InputError(f"seed must be at least 0 and num_threads at least 1, got {seed} and {num_threads}")
    result = np.empty_like(images)
    if not len(images):
        return result
    stream = SeedSequence((seed, ALL_CORRUPTIONS.index(corruption), severity)).generate_state(1, np.uint64)[0]
    function: Callable[..., np.ndarray] = getattr(functions, corruption)
    per_thread = -(-len(images) // num_threads)
    size = max(1, min(per_thread, _CHUNK_VALUES // images[0].size))

    def fill(start: int) -> None:
        chunk = slice(start, start + size)
        generators = [RandomState(Philox(key=np.array([stream, place], np.uint64))) for place in places[chunk]]
        # The published scripts cut the decimals off.
        result[chunk] = _applied(function, corruption, images[chunk], setting, generators).astype(np.uint8)

    starts = range(0, len(images), size)
    if num_threads == 1:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(fill, starts))
    return result


def require_images(images: np.ndarray) -> np.ndarray:
    """The images as an array, checked.

    Raises:
        InputError: not (n, h, w, 1 or 3) uint8 with sides of at least 16 pixels.
    """
    images = np.asanyarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or min(images.shape[1:3]) < 16:
        raise InputError(
            "images must be uint8 of shape (n, h, w, 1 or 3) with sides of at least 16 pixels, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    return images


def require_corruption(corruption: str) -> str:
    """The name, checked.

    Raises:
        InputError: not one of :data:`ALL_CORRUPTIONS`.
    """
    require_known([corruption], ALL_CORRUPTIONS, "corruption", error=InputError)
    return corruption


def require_severity(severity: int) -> int:
    """The severity, checked.

    Raises:
        InputError: not 1 to 5.
    """
    if severity not in SEVERITIES:
        raise InputError(f"severity must be 1 to 5, got {severity!r}")
    return severity


def _setting(corruption: str, severity: int, constants: str, shape: tuple[int, ...]) -> Any:
    """The corruption's constants at this severity."""
    family = constants_for(*shape[1:3]) if constants == "auto" else constants
    if family not in CONSTANTS:
        raise InputError(f"constants must be auto, {' or '.join(CONSTANTS)}, got '{constants}'")
    return CONSTANTS[family][require_corruption(corruption)][require_severity(severity) - 1]


def _applied(
    function: Callable[..., np.ndarray],
    corruption: str,
    images: np.ndarray,
    setting: Any,
    generators: list[RandomState],
) -> np.ndarray:
    """Corrupted values; grey images take the way over three channels where colour is added."""
    if images.shape[3] == 1 and corruption in functions.COLORED:
        return function(np.repeat(images, 3, axis=3), setting, generators) @ LUMA[:, None]
    return function(images, setting, generators)
