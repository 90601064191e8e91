"""Labelled images on disk: what a source of them is, and CIFAR-100 and SVHN in their official layouts.

A source gives RGB images and labels by index, in the order of the files, and says in one sentence what is wrong with a
root that is not what it should be. Nothing is downloaded unless asked for, and no file is executed: the pickled
batches of CIFAR-100 are read by an unpickler that admits arrays and nothing else (torchvision's own reader would run
whatever a file says once the check of its MD5 is lifted, and with it reads the official files only). ImageNet is in
:mod:`entreg.data.imagenet`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from entreg import distributed
from entreg.errors import AssetError, ConfigError, first_line


class ImageSource:
    """Images and labels by index.

    Attributes:
        names: of the images, unique: ``class/file`` without its ending, or a number.
        labels: (n,) int64 in [0, num_classes).
        num_classes: of the task; not all need to occur.
        revision: says which files these are, for run records.
    """

    def __init__(self, names: Sequence[str], labels: np.ndarray, num_classes: int, revision: str) -> None:
        self.names = names
        self.labels = labels
        self.num_classes = num_classes
        self.revision = revision

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            AssetError: its file is truncated or no image.
        """
        raise NotImplementedError


class FileImages(ImageSource):
    """Images in files of their own; arguments as in :class:`ImageSource`, and the files' paths."""

    def __init__(self, paths: Sequence[str], **source: Any) -> None:
        super().__init__(**source)
        self._paths = paths

    def image(self, index: int) -> Image.Image:
        path = self._paths[index]
        return decode(lambda: Image.open(path), path)


class TableImages(ImageSource):
    """Encoded images in the column of a table; arguments as in :class:`ImageSource`, the column, the table's name."""

    def __init__(self, column: Any, table: str, **source: Any) -> None:
        super().__init__(**source)
        self._column = column
        self._table = table

    def image(self, index: int) -> Image.Image:
        content = self._column[index]["bytes"]
        return decode(lambda: Image.open(io.BytesIO(content)), f"row {index} ({self.names[index]}) of {self._table}")


class ArrayImages(ImageSource):
    """Images in memory, (n, h, w, 3) uint8; other arguments as in :class:`ImageSource`."""

    def __init__(self, pixels: np.ndarray, **source: Any) -> None:
        super().__init__(**source)
        self.pixels = pixels

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def decode(opened: Callable[[], Image.Image], what: str) -> Image.Image:
    """The image that ``opened`` opens, wholly decoded and in RGB of 8 bits.

    Of deeper grey values the upper 8 bits count, as Pillow itself does it with colours of 16 bits: 0, 255, 256, 4660
    and 65535 of 16 bits are 0, 0, 1, 18 and 255. (Pillow's own conversion cuts all grey values above 255 to white.)

    Raises:
        AssetError: it is missing, truncated, no image, or one whose grey values have no known range; ``what`` names it.
    """
    try:
        with opened() as image:
            return _eight_bits(image, what).convert("RGB")
    except FileNotFoundError as error:
        raise AssetError(f"{what} is not there any more; put it back and run the same command again") from error
    except UnidentifiedImageError as error:
        raise AssetError(f"{what} is not an image; fetch it again") from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        # Pillow raises SyntaxError for some damaged headers, and a table's missing image is None.
        raise AssetError(f"{what} cannot be read ({error}); it is damaged or truncated, fetch it again") from error


def say_unread(files: Sequence[str], where: str, why: str) -> None:
    """Say on standard error how many files of a data set are not read; nothing if there are none.

    Args:
        files: their names.
        where: the data set in words.
        why: what is wrong with them, with "they" or "their".
    """
    if files and distributed.is_first():
        print(
            f"Files of {where} that are not read, as {why}: {len(files):,}, the first is {files[0]}.", file=sys.stderr
        )


def _eight_bits(image: Image.Image, what: str) -> Image.Image:
    """The image itself, or its upper 8 bits where grey values are deeper."""
    if image.mode.startswith("I;16"):
        # Pillow reads TIFF files of 12 bits as they are, and scales whatever else is not of 16.
        bits = image.tag_v2[258][0] if image.format == "TIFF" else 16
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        bits = 16
    elif image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise AssetError(f"{what} holds {kind}, whose range is not known; store it with 8 or 16 bits")
    else:
        return image
    return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


def cifar100(root: str | Path | None, part: str, *, download: bool) -> ImageSource:
    """CIFAR-100 in its Python version, ``cifar-100-python/{train,test}``, with the 100 fine labels.

    A file with the official number of images must be the official file (by torchvision's MD5); one with fewer images is
    taken for what it is.

    Args:
        root: folder that holds ``cifar-100-python``.
        part: ``train`` or ``test``.
        download: fetch it through torchvision when it is not there.

    Raises:
        AssetError: the files are missing, damaged, or not in the official layout.
        ConfigError: no root is given.
    """
    from torchvision.datasets import CIFAR100

    files = {"train": CIFAR100.train_list, "test": CIFAR100.test_list}[part]
    name, md5 = files[0]
    path = _local_file(
        root,
        f"{CIFAR100.base_folder}/{name}",
        "CIFAR-100",
        CIFAR100.url,
        (lambda folder: CIFAR100(folder, download=True)) if download else None,
    )
    content = path.read_bytes()
    try:
        table = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        pixels, labels = table["data"], table["fine_labels"]
        pixels = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise AssetError(f"{path} is no readable batch of CIFAR-100, damaged or truncated; fetch it again") from error
    official = {"train": 50_000, "test": 10_000}[part]
    return _array_images(path, content, pixels, np.asarray(labels, dtype=np.int64), 100, (official, md5))


def svhn(root: str | Path | None, part: str, *, download: bool) -> ImageSource:
    """Street View House Numbers, cropped digits, ``{train,test}_32x32.mat``; label 10 stands for the digit 0.

    The same rule as for CIFAR-100 tells the official files from smaller ones.

    Args:
        root: folder that holds the two files.
        part: ``train`` or ``test``.
        download: fetch the file through torchvision when it is not there.

    Raises:
        AssetError: the file is missing, damaged, or not in the official layout.
        ConfigError: no root is given.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError
    from torchvision.datasets import SVHN

    url, name, md5 = SVHN.split_list[part]
    path = _local_file(
        root, name, "SVHN", url, (lambda folder: SVHN(folder, part, download=True)) if download else None
    )
    content = path.read_bytes()
    try:
        table = loadmat(io.BytesIO(content))
        pixels = np.ascontiguousarray(table["X"].transpose(3, 0, 1, 2))
        labels = table["y"].reshape(-1).astype(np.int64)
    except (MatReadError, KeyError, ValueError, TypeError, OSError, EOFError, IndexError) as error:
        raise AssetError(f"{path} is no readable file of SVHN, damaged or truncated; fetch it again") from error
    labels[labels == 10] = 0
    return _array_images(path, content, pixels, labels, 10, ({"train": 73_257, "test": 26_032}[part], md5))


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, strings, numbers and numpy arrays; anything else a pickle could run is refused."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            # Where numpy keeps the function depends on its version at the time of writing.
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _local_file(root: str | Path | None, name: str, title: str, url: str, fetch: Callable[[str], Any] | None) -> Path:
    """The file ``name`` below ``root``; fetched first when it is missing and ``fetch`` is given."""
    variable = "CIFAR= of make or " if title == "CIFAR-100" else ""
    folder = f"the folder that holds {name.split('/')[0]}"
    get = f"get it from {url} and name {folder} as {variable}data.root=, or set data.download=true with it"
    if not root:
        raise ConfigError(f"data.root is not set: {title} needs {folder}; {get}")
    path = Path(root).expanduser() / name
    if path.is_file():
        return path
    if fetch is None:
        raise AssetError(f"there is no {title} file {path}; {get}")
    try:
        fetch(str(path.parents[name.count("/")]))
    except (OSError, RuntimeError) as error:
        raise AssetError(f"{title} cannot be fetched ({first_line(error)}); get it from {url}") from error
    return path


def _array_images(
    path: Path, content: bytes, pixels: np.ndarray, labels: np.ndarray, num_classes: int, official: tuple[int, str]
) -> ImageSource:
    """A source from arrays that were read from ``content``; ``official`` is that file's number of images and MD5."""
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3):
        raise AssetError(f"{path} holds {pixels.dtype} images of shape {pixels.shape[1:]} instead of uint8 (32, 32, 3)")
    if labels.shape != (len(pixels),) or len(pixels) == 0:
        raise AssetError(f"{path} holds {len(pixels)} images but {labels.size} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise AssetError(f"{path} holds labels outside [0, {num_classes})")
    number, md5 = official
    if len(pixels) == number and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise AssetError(f"{path} is damaged: it is not the official file (its MD5 differs from {md5}); fetch it again")
    return ArrayImages(
        pixels,
        names=[str(index) for index in range(len(pixels))],
        labels=labels,
        num_classes=num_classes,
        revision=hashlib.sha256(content).hexdigest(),
    )
