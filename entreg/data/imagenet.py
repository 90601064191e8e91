"""ImageNet in the three layouts in which people have it: folders of images, parquet files and WebDataset shards.

Also for any other data set in these layouts, with its own number of classes. Every way in which a copy tends to be
wrong (unsorted validation images, missing classes, missing parquet files) is said in one sentence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from entreg.data.assets import cache_directory
from entreg.data.image_sources import FileImages, ImageSource, TableImages, say_unread
from entreg.data.streaming import grouped_images, require_all_parts
from entreg.data.webdataset import ShardImages, find_shards, shard_index
from entreg.errors import AssetError, ConfigError, first_line
from entreg.names import listed_files

IMAGENET_CLASSES = 1000

_GET_IMAGENET = (
    "get it from https://image-net.org or https://huggingface.co/datasets/ILSVRC/imagenet-1k, and name the folder with "
    "train/ and val/, or data/train-*.parquet and data/validation-*.parquet, or *train*.tar and *val*.tar, as "
    "IMAGENET= of make or data.root="
)


def imagenet(
    root: str | Path | None, part: str, *, num_classes: int, subset: bool, streaming: bool = False
) -> ImageSource:
    """ImageNet-1K, or a data set in its layout, as folders of images, parquet files or WebDataset shards.

    Folders: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``, classes numbered in the order of their sorted names,
    which for the 1,000 synsets is the official order. Parquet: ``data/train-*.parquet`` and
    ``data/validation-*.parquet`` with columns ``image`` and ``label``, as on the Hugging Face hub. Shards:
    ``*train*.tar`` and ``*val*.tar`` with ``<name>.jpg`` and ``<name>.cls``, see :mod:`entreg.data.webdataset`. How
    many files of a folder or shard are no images by their names is said in one line on standard error.

    Args:
        root: folder of the data set.
        part: ``train`` or ``val``.
        num_classes: how many classes there must be.
        subset: with True classes may be missing: 1,000 classes keep their official numbers by the synset's name, fewer
            are numbered as they come.
        streaming: read parquet files in place, also from a URL, see :mod:`entreg.data.streaming`.

    Raises:
        AssetError: the root is no such folder, or classes, images or parquet files are missing or too many.
        ConfigError: no root is given, or the layout is parquet and ``datasets`` is not installed.
    """
    if not root:
        raise ConfigError(f"data.root is not set: ImageNet is not fetched by itself; {_GET_IMAGENET}")
    word = {"train": "train", "val": "validation"}[part]
    if streaming:
        make, names, labels, where = grouped_images(str(root), word, _GET_IMAGENET)
        _require_labels(labels, where, num_classes, subset)
        return make(names=names, labels=labels, num_classes=num_classes, revision=_names_revision(names, labels))
    root = Path(root).expanduser()
    if not root.is_dir():
        raise AssetError(f"there is no folder {root} with ImageNet; {_GET_IMAGENET}")
    if (root / part).is_dir():
        return _folder_images(root, part, num_classes, subset)
    shards = find_shards(root, part)
    if shards:
        places, names, labels = shard_index(shards)
        _require_labels(labels, f"{root}/*{part}*.tar", num_classes, subset)
        revision = _names_revision(names, labels)
        return ShardImages(shards, places, names=names, labels=labels, num_classes=num_classes, revision=revision)
    tables = sorted(root.glob(f"{word}-*.parquet")) or sorted((root / "data").glob(f"{word}-*.parquet"))
    if not tables:
        raise AssetError(
            f"{root} holds neither {part}/ nor {word}-*.parquet nor *{part}*.tar ({listed_files(root)}); "
            f"{_GET_IMAGENET}"
        )
    return _table_images(tables, num_classes, subset)


def _folder_images(root: Path, part: str, num_classes: int, subset: bool) -> ImageSource:
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

    folder = root / part
    found = _class_folders(folder)
    classes = _class_numbers(found, folder, num_classes, subset)
    other = root / ("val" if part == "train" else "train")
    if other.is_dir() and not (subset and num_classes == IMAGENET_CLASSES):
        # Classes are numbered as they come, so both parts must have the same.
        different = sorted(set(found) ^ set(_class_folders(other)))
        if different:
            raise AssetError(f"{folder} and {other} hold different classes, for example {different[0]} is in one only")
    unread = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())

    def is_image(path: str) -> bool:
        if has_file_allowed_extension(path, IMG_EXTENSIONS):
            return True
        unread.append(os.path.relpath(path, folder))
        return False

    try:
        samples = make_dataset(str(folder), classes, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise AssetError(f"{folder} holds class folders without images: {first_line(error)}") from error
    say_unread(unread, str(folder), f"they are not <class>/<name> with {', '.join(IMG_EXTENSIONS)}")
    # Plain text: there are over a million of them.
    paths = [path for path, _ in samples]
    class_of = {number: name for name, number in classes.items()}
    names = [f"{class_of[label]}/{os.path.splitext(os.path.basename(path))[0]}" for path, label in samples]
    labels = np.array([label for _, label in samples], dtype=np.int64)
    return FileImages(
        paths, names=names, labels=labels, num_classes=num_classes, revision=_names_revision(names, labels)
    )


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _class_numbers(found: Sequence[str], folder: Path, num_classes: int, subset: bool) -> dict[str, int]:
    """Number of each class folder; see :func:`imagenet`."""
    if not found:
        raise AssetError(
            f"{folder} holds no class folders; sort its images into one folder per class (train/n01440764/*.JPEG, "
            "val/n01440764/*.JPEG)"
        )
    if num_classes != IMAGENET_CLASSES:
        if len(found) > num_classes or (len(found) < num_classes and not subset):
            raise AssetError(f"{folder} holds {len(found)} class folders where data.num_classes is {num_classes}")
        return {name: number for number, name in enumerate(found)}
    official = _synsets()
    unknown = sorted(set(found) - set(official))
    if unknown:
        raise AssetError(f"{folder} holds {unknown[0]}, which is none of ImageNet's 1,000 classes")
    missing = sorted(set(official) - set(found))
    if missing and not subset:
        raise AssetError(
            f"{folder} holds {len(found)} of ImageNet's 1,000 classes, {missing[0]} is missing; complete it, or set "
            "data.subset=true when a part is meant"
        )
    return {name: official[name] for name in found}


def _synsets() -> dict[str, int]:
    from timm.data import ImageNetInfo

    return {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _table_images(tables: Sequence[Path], num_classes: int, subset: bool) -> ImageSource:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"reading {tables[0].parent}/*.parquet needs the package datasets: pip install datasets"
        ) from error
    require_all_parts([path.name for path in tables], tables[0].parent)
    where = f"{tables[0].parent}/{tables[0].name.split('-')[0]}-*.parquet"
    try:
        # For random access the rows are copied once into a memory-mapped file in the cache.
        table = datasets.load_dataset(
            "parquet",
            data_files={"rows": [str(path) for path in tables]},
            split="rows",
            cache_dir=str(cache_directory() / "parquet"),
        )
        if not {"image", "label"} <= set(table.column_names):
            raise AssetError(f"{where} has the columns {', '.join(table.column_names)} where image, label are needed")
        table = table.cast_column("image", datasets.Image(decode=False))
        labels = np.array(table["label"][:], dtype=np.int64)
    except (KeyError, ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise AssetError(f"{where} cannot be read as a table of images and labels ({first_line(error)})") from error
    _require_labels(labels, where, num_classes, subset)
    # Only the paths are read here: the column of images is larger than memory.
    paths = [path for chunk in table.data.column("image").chunks for path in chunk.field("path").to_pylist()]
    names = [str(row) if path is None else Path(path).stem for row, path in enumerate(paths)]
    revision = _names_revision(names, labels)
    return TableImages(table["image"], where, names=names, labels=labels, num_classes=num_classes, revision=revision)


def _require_labels(labels: np.ndarray, where: str, num_classes: int, subset: bool) -> None:
    """Make sure that the labels are those of the classes that there are to be."""
    present = np.unique(labels)
    if len(labels) == 0 or present[0] < 0 or present[-1] >= num_classes:
        raise AssetError(f"{where} holds labels outside [0, {num_classes}), the range of data.num_classes")
    if len(present) < num_classes and not subset:
        missing = np.setdiff1d(np.arange(num_classes), present)
        raise AssetError(
            f"{where} holds {len(present)} of {num_classes} classes, {missing[0]} is missing; complete it, or set "
            "data.subset=true when a part is meant"
        )


def _names_revision(names: Sequence[str], labels: np.ndarray) -> str:
    """SHA-256 of names and labels: tells one selection of images from another, not one encoding from another."""
    lines = "".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
