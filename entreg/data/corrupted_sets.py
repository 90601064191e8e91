"""Corrupted sets by configuration: CIFAR-C's published files, or any data set's images corrupted here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from entreg.data.corrupted_images import (
    CorruptedImages,
    CorruptedSet,
    GeneratedCorruptions,
    Preparation,
    clean_images,
    preparation_of,
)
from entreg.data.official_corruptions import DOWNLOAD, OfficialCorruptions
from entreg.data.vision_sets import vision_dataset
from entreg.errors import ConfigError
from entreg.names import require_known

_NUM_CLASSES = {"cifar100_c": 100, "cifar10_c": 10}
_KEYS = {
    **dict.fromkeys(_NUM_CLASSES, ("root", "images_per_severity")),
    "generated": ("limit", "seed", "constants", "num_threads"),
}


def corrupted_set(config: Mapping[str, Any], clean: Any = None) -> CorruptedSet:
    """The corrupted set that a configuration asks for.

    Args:
        config: content of ``configs/data/cifar100_c.yaml`` (``name`` cifar100_c or cifar10_c, ``root``, the folder of
            the published files, ``images_per_severity``) or of ``configs/data/corrupted_digits.yaml`` (``name``
            generated, ``limit``, the number of clean images, None for all, and ``seed``, ``constants`` and
            ``num_threads`` of :class:`~entreg.data.corrupted_images.GeneratedCorruptions`).
        clean: the data set to corrupt, see :func:`~entreg.data.corrupted_images.clean_images`; of ``generated`` only.

    Raises:
        ConfigError: an unknown name or key, or no root.
        InputError: a value out of range, or a clean data set that cannot be corrupted.
        AssetError: see :class:`~entreg.data.official_corruptions.OfficialCorruptions`.
    """
    values = dict(config)
    name = values.pop("name", None)
    require_known([name], _KEYS, "corrupted set")
    require_known(values, _KEYS[name], "key", name)
    if name == "generated":
        return GeneratedCorruptions(*clean_images(clean, values.pop("limit", None)), **values)
    root = values.pop("root", None)
    if not root:
        raise ConfigError(f"{name} needs its root, the folder with labels.npy and the corruptions' files; {DOWNLOAD}")
    return OfficialCorruptions(root, num_classes=_NUM_CLASSES[name], **values)


def corrupted_dataset(
    data: Mapping[str, Any],
    corruption: str,
    severity: int,
    *,
    split: str = "test",
    limit: int | None = None,
    corruptions: Mapping[str, Any] | None = None,
) -> CorruptedImages:
    """The images of a clean data set under one corruption, prepared for the model as the clean ones are.

    What has been read or generated is kept for the next call with the same configuration.

    Args:
        data: configuration of the clean data set, see :func:`entreg.data.vision_sets.vision_dataset`.
        corruption: one of :data:`entreg.data.corruptions.ALL_CORRUPTIONS`.
        severity: 1 to 5.
        split: of the clean data set; the published files have the test split only.
        limit: the first so many images; None for all.
        corruptions: configuration of the corrupted set, see :func:`corrupted_set`; None: for ``cifar100`` the published
            files in the folder ``CIFAR-100-C`` beside ``cifar-100-python``, generated for any other data set.

    Raises:
        ConfigError: an unknown name, key or split, or published files asked for of another split.
        InputError: a value out of range, or images that cannot be corrupted.
        AssetError: files are missing or not what they should be.
    """
    corrupted, prepare = open_corrupted(data, split=split, limit=limit, corruptions=corruptions)
    images = corrupted.images(corruption, severity)
    return CorruptedImages(images[:limit], corrupted.labels[:limit], prepare)


def open_corrupted(
    data: Mapping[str, Any],
    *,
    split: str = "test",
    limit: int | None = None,
    corruptions: Mapping[str, Any] | None = None,
) -> tuple[CorruptedSet, Preparation]:
    """The corrupted set of a clean data set, its files looked at, and how its images are prepared for the model.

    Args:
        data, split, limit, corruptions: as for :func:`corrupted_dataset`; ``limit`` bounds what is generated only.

    Raises:
        ConfigError, InputError, AssetError: as for :func:`corrupted_dataset`.
    """
    if corruptions is None:
        corruptions = {"name": "generated"}
        if data.get("name") == "cifar100":
            corruptions = {"name": "cifar100_c", "root": data.get("root") and str(Path(data["root"]) / "CIFAR-100-C")}
    if corruptions.get("name") == "generated":
        corruptions = {"limit": limit, **corruptions}
    elif split != "test":
        raise ConfigError(f"the published corrupted images are of the test split, not of '{split}'")
    return _read(json.dumps(dict(data)), split, json.dumps(dict(corruptions)))


@lru_cache(maxsize=2)
def _read(data: str, split: str, corruptions: str) -> tuple[CorruptedSet, Preparation]:
    """The corrupted set and how its images are prepared; configurations as JSON, which can be a key."""
    clean = vision_dataset(json.loads(data), split)
    return corrupted_set(json.loads(corruptions), clean), preparation_of(clean)
