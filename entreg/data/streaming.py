"""Images that are read from parquet files in place, on disk or from a URL, without a copy of the data set.

:func:`entreg.data.imagenet.imagenet` copies parquet files once into a file that gives any image at once. Where there
is no room for that copy, or the files are far away, images come in whole row groups instead: one such group is read at
a time and kept while its images are wanted. Training then asks for them in an order that makes this cheap, see
``blocks`` and :class:`entreg.training.batches.Positions`; this order is, like any other, a function of seed and epoch,
so each image is seen once per epoch by one process, and a resumed run goes on with exactly the images that are left.
(The iterable data sets of ``datasets`` resume approximately: their shuffle buffer is not part of their state.)
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entreg.atomic import write_bytes_atomic
from entreg.data.assets import cache_directory
from entreg.data.image_sources import ImageSource, decode
from entreg.errors import AssetError, ConfigError, first_line

_KEPT_BYTES = 2**28
"""Of row groups in each process that reads: as a rule some twenty of ImageNet's."""


class GroupedImages(ImageSource):
    """Encoded images in the row groups of parquet files; other arguments as in :class:`ImageSource`.

    Args:
        open_file: gives the file of a path, opened for reading bytes.
        files: paths of the files, in order.
        groups: (number of groups, 3) int64: number of the file, number of the group in it, rows; in order.

    Attributes:
        blocks: (number of groups,) int64 rows of each group: images that are read together.
    """

    def __init__(
        self, open_file: Callable[[str], Any], files: Sequence[str], groups: np.ndarray, **source: Any
    ) -> None:
        super().__init__(**source)
        self.blocks = groups[:, 2]
        self._open, self._files, self._groups = open_file, files, groups
        self._starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()

    def image(self, index: int) -> Image.Image:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        content = self._contents(group)[index - self._starts[group]]
        where = f"row {index} ({self.names[index]}) of {self._files[self._groups[group, 0]]}"
        return decode(lambda: Image.open(io.BytesIO(content)), where)

    def _contents(self, group: int) -> list[bytes | None]:
        """The encoded images of a group, from the file unless they are kept."""
        from pyarrow import ArrowException, parquet

        if group not in self._kept:
            number, place, _ = self._groups[group]
            path = self._files[number]
            try:
                with self._open(path) as file:
                    table = parquet.ParquetFile(file).read_row_group(int(place), columns=["image.bytes"])
                column = table.column("image").combine_chunks().field("bytes")
                self._kept[group] = column.to_pylist()
            except (OSError, ArrowException) as error:
                raise AssetError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
        self._kept.move_to_end(group)
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[group]

    def __getstate__(self) -> dict[str, Any]:
        # What is kept is each process's own.
        return {**self.__dict__, "_kept": OrderedDict()}


def _bytes(contents: Sequence[bytes | None]) -> int:
    return sum(len(content or b"") for content in contents)


def grouped_images(root: str, word: str, get: str) -> tuple[Callable[..., GroupedImages], list[str], np.ndarray, str]:
    """What is needed to read parquet files of images and labels in place.

    Args:
        root: a folder, or a URL that ``fsspec`` knows, such as ``hf://datasets/ILSVRC/imagenet-1k``.
        word: with which the files begin: ``train`` or ``validation``.
        get: how to get the data, for the sentence of an error.

    Returns:
        A function that makes the source from the keyword arguments of :class:`ImageSource`; names (their paths without
        ending, or numbers) and labels of all rows; and the files in words.

    Raises:
        AssetError: there are no such files, some are missing, or they are no tables of images and labels.
        ConfigError: the packages that read them are not installed.
    """
    try:
        import fsspec
        from pyarrow import ArrowException
    except ImportError as error:
        raise ConfigError("reading parquet files in place needs the package datasets: pip install datasets") from error
    try:
        system, folder = fsspec.core.url_to_fs(root)
        found = sorted(system.glob(f"{folder}/{word}-*.parquet")) or sorted(
            system.glob(f"{folder}/data/{word}-*.parquet")
        )
    except (OSError, ValueError, ImportError) as error:
        raise AssetError(f"{root} cannot be opened ({first_line(error)}); {get}") from error
    if not found:
        raise AssetError(f"{root} holds no {word}-*.parquet; {get}")
    require_all_parts([path.rsplit("/", 1)[1] for path in found], root)

    def make() -> dict[str, np.ndarray]:
        return _read_index(system.open, found)

    where = f"{root}/{word}-*.parquet"
    try:
        index = cached_index([[path, system.size(path), system.ukey(path)] for path in found], make)
    except (OSError, ArrowException, KeyError, ValueError) as error:
        raise AssetError(f"{where} cannot be read as a table of images and labels ({first_line(error)})") from error

    def source(**values: Any) -> GroupedImages:
        return GroupedImages(system.open, found, index["groups"], **values)

    return source, index["names"].tolist(), index["labels"], where


def _read_index(open_file: Callable[[str], Any], files: Sequence[str]) -> dict[str, np.ndarray]:
    """Row groups of the files, and names and labels of their rows; no image is read."""
    from pyarrow import parquet

    groups, names, labels = [], [], []
    for number, path in enumerate(files):
        with open_file(path) as opened:
            file = parquet.ParquetFile(opened)
            if not {"image", "label"} <= set(file.schema_arrow.names):
                raise KeyError(f"it has the columns {', '.join(file.schema_arrow.names)} where image, label are needed")
            for place in range(file.num_row_groups):
                groups.append([number, place, file.metadata.row_group(place).num_rows])
            table = file.read(columns=["image.path", "label"])
        for path_of_row in table.column("image").combine_chunks().field("path").to_pylist():
            names.append(str(len(names)) if path_of_row is None else Path(path_of_row).stem)
        labels.append(table.column("label").to_numpy())
    return {
        "groups": np.array(groups, dtype=np.int64),
        "names": np.array(names),
        "labels": np.concatenate(labels).astype(np.int64),
    }


def require_all_parts(names: Sequence[str], root: str | Path) -> None:
    """Make sure that no file is missing among files whose names say how many there are, or that are numbered from 0.

    Args:
        names: such as ``train-00000-of-00294.parquet`` or ``imagenet1k-train-0000.tar``, sorted, at least one.
        root: where they are, for the error.

    Raises:
        AssetError: some are missing.
    """
    first = names[0].split(".")[0]
    count = first.rpartition("-of-")[2] if "-of-" in first else None
    if count is not None and count.isdigit():
        if int(count) != len(names):
            raise AssetError(f"{root} holds {len(names)} files like {names[0]}; some are missing")
        return
    numbers = [name.split(".")[0].rpartition("-")[2] for name in names]
    if all(number.isdigit() for number in numbers):
        missing = sorted(set(range(max(map(int, numbers)) + 1)) - set(map(int, numbers)))
        if missing and missing != [0]:
            raise AssetError(f"{root} holds files like {names[0]}, but number {missing[-1]} is missing")


def cached_index(files: Any, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Arrays that take long to make, from the cache if they are there.

    Args:
        files: plain values that change when the arrays would.
        make: makes them.
    """
    key = hashlib.sha256(json.dumps(files, default=str).encode()).hexdigest()
    path = cache_directory() / "index" / f"{key}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as content:
                return {name: content[name] for name in content.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            # A cache that cannot be read is made again.
            pass
    arrays = dict(make())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes_atomic(path, buffer.getvalue())
    return arrays
