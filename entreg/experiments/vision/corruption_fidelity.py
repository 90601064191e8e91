"""How close the corruptions generated here come to the published images of CIFAR-C."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from entreg.data.corruptions import SEVERITIES, corrupt, require_images
from entreg.data.official_corruptions import OfficialCorruptions
from entreg.errors import InputError

DETERMINISTIC = frozenset(
    {
        *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"),
        *("gaussian_blur", "saturate"),
    }
)
"""Corruptions without random numbers: of these alone can every pixel agree with the published images."""

COMPARISON_COLUMNS = (
    "corruption",
    "severity",
    "random",
    "PSNR to official (dB)",
    "mean |ours - official|",
    "mean |official - clean|",
    "mean |ours - clean|",
    "mean official",
    "mean ours",
    "deviation official",
    "deviation ours",
)
"""Headings of :func:`compare_with_official`; all but the first four in grey levels."""


def compare_with_official(
    folder: str | Path,
    clean: np.ndarray,
    *,
    num_classes: int = 100,
    corruptions: Collection[str] | None = None,
    severities: Collection[int] = SEVERITIES,
    limit: int | None = 1000,
    seed: int = 0,
    num_threads: int = 1,
) -> list[list[str | int | float]]:
    """Corrupt the clean test images with CIFAR-C's constants and compare with the published files.

    A random corruption cannot agree pixel by pixel (the published draws are unknown): there the distance to the clean
    images, the mean and the deviation of the pixels should agree.

    Args:
        folder: of the published files, see :class:`~entreg.data.official_corruptions.OfficialCorruptions`.
        clean: (n, h, w, 3) uint8, the test images in the published order.
        num_classes: 100, or 10 for CIFAR-10-C.
        corruptions: those to compare; None for all there are.
        severities: those to compare.
        limit: the first so many images; None for all.
        seed: of our random numbers.
        num_threads: at least 1.

    Returns:
        One row per corruption and severity with the entries of :data:`COMPARISON_COLUMNS`. PSNR is over all pixels,
        infinite where all agree.

    Raises:
        InputError: images that do not fit the files, or another value out of range.
        AssetError: the files are missing or not what they should be.
    """
    clean = require_images(clean)
    official = OfficialCorruptions(folder, num_classes=num_classes, shape=clean.shape[1:])
    if len(clean) != len(official) or (limit is not None and limit < 1):
        raise InputError(
            f"there are {len(clean)} clean and {len(official)} corrupted images; they must be the same, and limit at "
            "least 1"
        )
    clean = clean[:limit]
    rows: list[list[str | int | float]] = []
    for corruption in official.corruptions if corruptions is None else corruptions:
        for severity in severities:
            theirs = official.images(corruption, severity)[:limit].astype(np.float64)
            ours = corrupt(clean, corruption, severity, seed=seed, constants="cifar_c", num_threads=num_threads)
            random = "no" if corruption in DETERMINISTIC else "yes"
            rows.append([corruption, severity, random, *_statistics(clean, theirs, ours.astype(np.float64))])
    return rows


def _statistics(clean: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    error = np.mean((ours - theirs) ** 2)
    psnr = float("inf") if error == 0 else 10 * np.log10(255.0**2 / error)
    values = (
        psnr,
        np.abs(ours - theirs).mean(),
        np.abs(theirs - clean).mean(),
        np.abs(ours - clean).mean(),
        *(theirs.mean(), ours.mean(), theirs.std(), ours.std()),
    )
    return [float(value) for value in values]
