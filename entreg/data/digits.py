"""Handwritten digits for the offline vision experiments: 5,000 images of MNIST, split once and for all.

The digits come as an asset (see :mod:`entreg.data.assets`), sorted by class, 500 of each. Of every class the first 400
train, the next 50 validate and the last 50 test, so that all splits are balanced and no digit is in two of them. The
split is our choice; the paper uses no digits.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from torch.nn import functional as F

from entreg.data.assets import ASSETS, asset_path
from entreg.errors import InputError
from entreg.names import require_known

SPLITS = MappingProxyType({"train": range(0, 400), "validation": range(400, 450), "test": range(450, 500)})
"""Split to the places, within each class in the order of the file, of its digits."""

_CLASSES, _PER_CLASS, _SIZE = 10, 500, 28
_INK_SIZE = 20  # MNIST fits every digit's ink into a box of 20 pixels in the middle of the 28.
_ROTATION, _SHEAR, _SCALE = 0.2, 0.2, (0.85, 1.08)


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of one split, class by class.

    Args:
        split: ``train`` (4,000 digits), ``validation`` (500) or ``test`` (500).

    Returns:
        Images (n, 28, 28) uint8, 0 for paper and 255 for ink, and labels (n,) int64; both read-only.

    Raises:
        InputError: unknown split.
        AssetError: the digits are not in the cache and cannot be fetched, or are damaged.
    """
    require_known([split], SPLITS, "split", error=InputError)
    images, labels = _all_digits()
    chosen = (np.arange(_CLASSES)[:, None] * _PER_CLASS + np.array(SPLITS[split])).reshape(-1)
    return _read_only(images[chosen]), _read_only(labels[chosen])


@lru_cache(maxsize=16)
def digit_pool(split: str, size: int, copies: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Digits scaled so that their ink fills a square of ``size`` pixels, with random affine variants beside them.

    The first copy is the digit itself. Every further one is rotated by up to ±0.2 rad, sheared by up to ±0.2 and scaled
    by 0.85 to 1.08 in each direction, all uniformly at random; sampling is bilinear. Kept in memory for later calls.

    Args:
        split: as in :func:`load_digits`.
        size: side of the square, at least 4 pixels.
        copies: variants of each digit including itself, at least 1.
        seed: non-negative; decides the variants and nothing else.

    Returns:
        Images (copies * n, size, size) float32 in [0, 1] and labels (copies * n,) int64, copy by copy; both read-only.

    Raises:
        InputError: unknown split or a value out of range.
        AssetError: as :func:`load_digits`.
    """
    if size < 4 or copies < 1 or seed < 0:
        raise InputError(f"digits need size >= 4, copies >= 1 and seed >= 0, got {size}, {copies} and {seed}")
    images, labels = load_digits(split)
    source = torch.from_numpy(images.astype(np.float32))[:, None]
    scale = size / _INK_SIZE
    pools = [
        _warp(source, _affine(np.zeros(len(images)), np.zeros(len(images)), np.full((len(images), 2), scale)), size)
    ]
    rng = np.random.default_rng((seed, tuple(SPLITS).index(split)))
    for _ in range(copies - 1):
        angle = rng.uniform(-_ROTATION, _ROTATION, len(images))
        shear = rng.uniform(-_SHEAR, _SHEAR, len(images))
        scales = scale * rng.uniform(*_SCALE, (len(images), 2))
        pools.append(_warp(source, _affine(angle, shear, scales), size))
    return _read_only(np.concatenate(pools)), _read_only(np.tile(labels, copies))


def describe_digits() -> dict[str, str]:
    """Source and revision of the digits, for a run record."""
    asset = ASSETS["mnist_digits"]
    return {"source": asset.requirement, "revision": asset.member_sha256}


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 digits in the order of the file: 784 pixels and the label in each line."""
    with gzip.open(asset_path("mnist_digits"), "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, _SIZE, _SIZE), table[:, -1].astype(np.int64)


def _affine(angle: np.ndarray, shear: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(n, 2, 2) maps from (x, y) of the source to (x, y) of the result: scale, then shear along x, then rotate."""
    cosine, sine, one, zero = np.cos(angle), np.sin(angle), np.ones_like(angle), np.zeros_like(angle)
    rotate = np.stack([cosine, -sine, sine, cosine], axis=1).reshape(-1, 2, 2)
    slant = np.stack([one, shear, zero, one], axis=1).reshape(-1, 2, 2)
    return rotate @ slant * scales[:, None, :]


def _warp(source: torch.Tensor, forward: np.ndarray, size: int) -> np.ndarray:
    """(n, size, size) float32 in [0, 1]: ``source`` (n, 1, 28, 28) in [0, 255] under the maps about its centre."""
    # grid_sample wants the map from the result back to the source, in units of half an image on either side.
    backward = torch.from_numpy(np.linalg.inv(forward) * (size / _SIZE)).float()
    theta = torch.cat([backward, backward.new_zeros(len(source), 2, 1)], dim=2)
    grid = F.affine_grid(theta, [len(source), 1, size, size], align_corners=False)
    return (F.grid_sample(source, grid, align_corners=False)[:, 0] / 255.0).clamp_(0.0, 1.0).numpy()


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
