"""Data sets of the vision experiments by configuration: one call for offline scenes and for the paper's data.

Items are ``{"images": float32 (c, h, w), "labels": int64 () or (answers,), "masks": bool (h, w) where known}``. The
paper's data sets are preprocessed as the model's own data configuration says, by timm's transforms. ``test`` is what
each data set publishes results on (ImageNet: its validation images); ``validation``, on which every choice is made, is
held out from the training images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from entreg.data.digits import SPLITS, describe_digits
from entreg.data.image_sources import ImageSource, cifar100, svhn
from entreg.data.imagenet import imagenet
from entreg.data.masks import MaskFolder
from entreg.data.scenes import ClutteredDigits, DigitScenes
from entreg.data.shapes import TexturedShapes
from entreg.errors import AssetError, ConfigError
from entreg.names import require_known

_SCENES = {"digit_scenes": DigitScenes, "cluttered_mnist": ClutteredDigits, "textured_shapes": TexturedShapes}
_IMAGES = {"imagenet": ("train", "val"), "cifar100": ("train", "test"), "svhn": ("train", "test")}
_IMAGE_KEYS = frozenset({"name", "root", "validation_fraction", "preprocessing", "augmentation", "masks"})
_SOURCE_KEYS = {
    "imagenet": frozenset({"num_classes", "subset", "streaming"}),
    "cifar100": frozenset({"download"}),
    "svhn": frozenset({"download"}),
}
_PREPROCESSING = frozenset({"model", "input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"})

VISION_SETS = (*_SCENES, *_IMAGES)


def vision_dataset(config: Mapping[str, Any], split: str) -> Dataset:
    """The data set that a configuration names.

    Args:
        config: content of one of ``configs/data/*.yaml``.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        A map-style data set: :class:`LabelledImages`, or one of :mod:`entreg.data.scenes` or
        :mod:`entreg.data.shapes`.

    Raises:
        ConfigError: unknown name, key, split or model, or no root where one is needed.
        InputError: a value out of range.
        AssetError: files are missing or not what they should be; the sentence says how to get them.
    """
    name = check_vision_dataset(config)
    require_known([split], SPLITS, "split")
    if name in _SCENES:
        return _SCENES[name](split, **{key: value for key, value in config.items() if key != "name"})
    source = _source(config, split)
    settings = preprocessing(config["preprocessing"])
    masks = None
    if split != "train" and config.get("masks") is not None:
        masks = MaskFolder(config["masks"], mask_transform(settings), settings["input_size"][-2:])
    augmentation = config.get("augmentation") or {} if split == "train" else None
    dataset = LabelledImages(source, _indices(config, source, split), image_transform(settings, augmentation), masks)
    if masks is not None and not any(masks.path(source.names[index]) for index in dataset.indices):
        raise AssetError(f"{config['masks']} holds no mask of any image of split '{split}'")
    return dataset


def check_vision_dataset(config: Mapping[str, Any]) -> str:
    """The name of the data set that a configuration names; none of its files is looked at.

    Raises:
        ConfigError: unknown name or key.
    """
    name = _checked_name(config)
    if name in _SCENES:
        _check_keys(set(config) - {"name"}, _scene_keys(name), f"data '{name}'")
    else:
        _check_keys(config, _IMAGE_KEYS | _SOURCE_KEYS[name], f"data '{name}'")
    return name


def describe_dataset(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``dataset`` entry of a run record: name, where the data come from, and which exactly they are.

    Raises:
        ConfigError: unknown name.
        AssetError: as :func:`vision_dataset`.
    """
    name = _checked_name(config)
    if name in _SCENES:
        made = {"source": "entreg.data.shapes", "revision": f"numpy {np.__version__}"}
        origin = made if _SCENES[name] is TexturedShapes else describe_digits()
        return {"name": name, **origin, "seed": config.get("seed", 0)}
    sources = {split: _source(config, split) for split in SPLITS}
    return {
        "name": name,
        "revision": {split: source.revision for split, source in sources.items() if split != "validation"},
        "images": {split: len(_indices(config, source, split)) for split, source in sources.items()},
        "preprocessing": preprocessing(config["preprocessing"]),
    }


class LabelledImages(Dataset):
    """Images of a source under a transform; see the module's description for the items.

    Args:
        source: images and labels.
        indices: (n,) which of the source's images, in which order.
        transform: from an RGB image to float32 (3, h, w).
        masks: where the images' masks are; items then have ``masks``.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        masks: MaskFolder | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.masks = masks

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        return self.source.num_classes

    @property
    def blocks(self) -> np.ndarray | None:
        """How many of the images, in order, are read together; None where each is read by itself."""
        blocks = getattr(self.source, "blocks", None)
        if blocks is None:
            return None
        owners = np.searchsorted(np.cumsum(blocks), self.indices, side="right")
        return np.bincount(owners, minlength=len(blocks))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = int(self.indices[index])
        item = {
            "images": self.transform(self.source.image(place)),
            "labels": torch.tensor(self.source.labels[place]),
        }
        if self.masks is not None:
            item["masks"] = self.masks.mask(self.source.names[place])
        return item

    def raw(self, index: int) -> np.ndarray:
        """The image before any transform, (h, w, 3) uint8."""
        return np.asarray(self.source.image(int(self.indices[index])))

    def prepare(self, image: np.ndarray) -> Tensor:
        """The transform of an image like those of :meth:`raw`, (3, h, w) float32."""
        return self.transform(Image.fromarray(image))


def preprocessing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Size, interpolation, crop and normalisation of a model's images, as timm states them.

    Args:
        values: ``model``, a timm name whose pretrained configuration holds (None: timm's defaults), and whatever is to
            differ from it: ``input_size`` (3, h, w), ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``.

    Raises:
        ConfigError: unknown key or model.
    """
    import timm
    from timm.data import resolve_data_config

    _check_keys(values, _PREPROCESSING, "data.preprocessing")
    model = values.get("model")
    pretrained = None if model is None else timm.get_pretrained_cfg(model)
    if model is not None and pretrained is None:
        raise ConfigError(f"timm knows no model '{model}'; set data.preprocessing.model to one it knows, or to null")
    given = {key: value for key, value in values.items() if key != "model" and value is not None}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return resolve_data_config(
        {"input_size": (3, 224, 224), **given} if pretrained is None else given,
        pretrained_cfg=None if pretrained is None else pretrained.to_dict(),
    )


def image_transform(
    settings: Mapping[str, Any], augmentation: Mapping[str, Any] | None = None
) -> Callable[[Image.Image], Tensor]:
    """timm's transform of images for evaluation, or for training.

    Args:
        settings: from :func:`preprocessing`.
        augmentation: None for evaluation; for training the arguments of ``timm.data.create_transform`` that say how.

    Raises:
        ConfigError: an unknown argument.
    """
    from timm.data import create_transform

    if augmentation is None:
        return create_transform(**settings, is_training=False)
    known = frozenset(inspect.signature(create_transform).parameters) - settings.keys() - {"is_training"}
    _check_keys(augmentation, known, "data.augmentation")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in augmentation.items()}
    return create_transform(**settings, **given, is_training=True)


def mask_transform(settings: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform's resizing and crop alone, by nearest neighbour: pixel values come out unmixed.

    Args:
        settings: from :func:`preprocessing`.
    """
    from timm.data import create_transform

    # Where the crop goes beyond the image, it is filled with the mean: 0 is outside the object.
    changed = {**settings, "interpolation": "nearest", "mean": (0.0, 0.0, 0.0)}
    return create_transform(**changed, is_training=False, normalize=False)


def _source(config: Mapping[str, Any], split: str) -> ImageSource:
    train, test = _IMAGES[config["name"]]
    values = {key: config[key] for key in _SOURCE_KEYS[config["name"]] if key in config}
    return _read(config["name"], config.get("root"), test if split == "test" else train, **values)


@lru_cache(maxsize=4)
def _read(name: str, root: str | None, part: str, **values: Any) -> ImageSource:
    """Sources are kept: listing ImageNet's files takes long, and train and validation share one."""
    if name == "imagenet":
        return imagenet(root, part, **{"num_classes": 1000, "subset": False, **values})
    return {"cifar100": cifar100, "svhn": svhn}[name](root, part, **{"download": False, **values})


def _indices(config: Mapping[str, Any], source: ImageSource, split: str) -> np.ndarray:
    """Places of a split's images in its source: of each class a random share of the training images validates."""
    if split == "test":
        return np.arange(len(source))
    fraction = config.get("validation_fraction", 0.0)
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.validation_fraction must lie in [0, 1), got {fraction}")
    validates = np.zeros(len(source), dtype=bool)
    if fraction > 0:
        order = np.random.default_rng(0).permutation(len(source))
        order = order[np.argsort(source.labels[order], kind="stable")]
        for places in np.split(order, np.flatnonzero(np.diff(source.labels[order])) + 1):
            # At least one of each class, but never a class's only image.
            validates[places[: min(max(1, round(fraction * len(places))), len(places) - 1)]] = True
    chosen = np.flatnonzero(validates if split == "validation" else ~validates)
    if len(chosen) == 0:
        raise AssetError(
            f"no images are left for split '{split}' of {config['name']}: data.validation_fraction is {fraction}, and "
            f"there are {len(source)} training images"
        )
    return chosen


def _checked_name(config: Mapping[str, Any]) -> str:
    name = config.get("name")
    require_known([name], VISION_SETS, "data set")
    return name


def _scene_keys(name: str) -> frozenset[str]:
    return frozenset(inspect.signature(_SCENES[name]).parameters) - {"split"}


def _check_keys(values: Iterable[str], known: frozenset[str], what: str) -> None:
    require_known(values, sorted(known), "key", what)
